"""Ask a model in a folder, such as the merged one of the quickstart; without a question, a conversation.

python examples/ask.py FOLDER ["What does shutil.move do?"]
"""

import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    folder, *question = sys.argv[1:]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if question:
        print(answer(model, tokenizer, [{"role": "user", "content": " ".join(question)}]))
        return
    messages: list[dict[str, str]] = []
    print("Ctrl+D ends the conversation.")
    while True:
        try:
            messages.append({"role": "user", "content": input("> ")})
        except EOFError:
            return
        messages.append({"role": "assistant", "content": answer(model, tokenizer, messages)})
        print(messages[-1]["content"])


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """The model's answer to a conversation, with greedy decoding."""
    batch = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**batch, max_new_tokens=100, do_sample=False)
    return str(tokenizer.decode(tokens[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


if __name__ == "__main__":
    main()
