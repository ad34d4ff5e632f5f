"""Fine-tune a chat model in 4 bits, with the settings of the QLoRA paper.

    cd examples/chat
    python finetune.py fit --config paper.yaml --config smollm2.yaml
    python finetune.py fit --config paper.yaml --config 7b.yaml --data.path my.jsonl

`--fast` makes it a run of 2 steps. docs/chat.md describes the recipe.
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # smollm2.py and docstring_qa.py, for the model and data without a hub

from chat_model import Chat  # noqa: E402
from conversations import Conversations  # noqa: E402
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI  # noqa: E402


class CLI(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.base", "data.base")  # for the tokenizer


def main(args: list[str] | None = None, **options: bool) -> CLI:
    if args is None:
        args, sys.argv = sys.argv[1:], sys.argv[:1]  # LightningCLI warns if it has both
    if "--fast" in args:
        args = [*(word for word in args if word != "--fast"), f"--config={HERE / 'fast.yaml'}"]
    return CLI(Chat, Conversations, args=args, save_config_kwargs={"overwrite": True}, **options)


if __name__ == "__main__":
    main()
