# %% [markdown]
# # Fine-tune a language model in 4 bits
#
# SmolLM2-135M learns to say what functions of Python's standard library do: QLoRA in an ordinary LightningModule. On a free
# GPU of Colab or Kaggle, or on a CPU (some minutes). Each cell is explained in
# [the tutorial](https://lightning-qlora.github.io/lightning-qlora/tutorial/).

# %% Install; after it restart the runtime if the notebook asks for it
# %pip install -q "lightning-qlora[hf,cli,plots] @ git+https://github.com/lightning-qlora/lightning-qlora"

# %%
# !lightning-qlora doctor

# %% The data: questions and answers from the documentation of this Python
import inspect
from importlib import import_module

MODULES = ["calendar", "glob", "itertools", "json", "os", "os.path", "random", "shutil", "statistics", "textwrap"]
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def questions_and_answers():
    for module in MODULES:
        for name, function in inspect.getmembers(import_module(module), callable):
            first_lines = (inspect.getdoc(function) or "").split("\n\n")[0]
            if not name.startswith("_") and 20 < len(first_lines) < 200:
                yield f"What does `{module}.{name}` do?", first_lines.replace("\n", " ")


pairs = list(questions_and_answers())
print(len(pairs), pairs[0])

# %% An ordinary LightningModule: nothing in it is about 4 bits or adapters
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer


class Tuner(LightningModule):
    def __init__(self, base: str = BASE):
        super().__init__()
        self.save_hyperparameters()
        self.losses = []
        self.tokenizer = AutoTokenizer.from_pretrained(base, padding_side="right")
        self.model = AutoModelForCausalLM.from_pretrained(base)

    def prompt(self, question):
        messages = [{"role": "user", "content": question}]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def collate(self, pairs):
        prompts = [self.prompt(question) for question, _ in pairs]
        texts = [prompt + answer + self.tokenizer.eos_token for prompt, (_, answer) in zip(prompts, pairs)]
        batch = self.tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        for row, prompt in zip(labels, prompts):  # only the answer counts
            row[: len(self.tokenizer(prompt, add_special_tokens=False).input_ids)] = -100
        return {**batch, "labels": labels}

    def train_dataloader(self):
        return DataLoader(pairs, batch_size=8, shuffle=True, collate_fn=self.collate)

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


# %% Train; the table says what becomes of each layer
from lightning_qlora import QLoRAPrecision

STEPS = 60
seed_everything(0)
tuner = Tuner()
trainer = Trainer(max_steps=STEPS, devices=1, plugins=QLoRAPrecision(r=16), logger=False)
trainer.fit(tuner)
trainer.save_checkpoint("tuned.ckpt")

# %% The report, again
trainer.precision_plugin.report

# %%
import matplotlib.pyplot as plt

plt.plot(tuner.losses)
plt.xlabel("step")
plt.ylabel("loss of the answers")
plt.show()

# %% Base and adapters as one model in 16 bits, for transformers, vLLM, llama.cpp and Ollama
# !lightning-qlora merge tuned.ckpt merged

# %% Ask it
model = AutoModelForCausalLM.from_pretrained("merged")
batch = tuner.tokenizer(tuner.prompt("What does `os.path.join` do?"), add_special_tokens=False, return_tensors="pt")
tokens = model.generate(**batch, max_new_tokens=40, do_sample=False)
print(tuner.tokenizer.decode(tokens[0, batch.input_ids.shape[1] :], skip_special_tokens=True))
