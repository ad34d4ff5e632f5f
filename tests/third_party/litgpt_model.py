"""A tiny checkpoint folder and data for LitGPT's scripts, with random weights."""

import json

import torch
from litgpt import GPT, Config
from litgpt.utils import save_config
from tokenizers import Tokenizer, models, pre_tokenizers

TEXT = "[UNK] </s> the quick fox jumps over a lazy dog Below is an instruction"


def make(folder):
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(TEXT.split())}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "</s>", "bos_token": "</s>", "tokenizer_class": "GPTNeoXTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    config = Config.from_name("pythia-14m", n_layer=3, n_embd=64, n_head=4, intermediate_size=128, padded_vocab_size=64)
    save_config(config, folder)
    torch.save(GPT(config).state_dict(), folder / "lit_model.pth")
    rows = [{"instruction": "the quick fox", "output": "jumps over a lazy dog"}] * 8
    (folder / "data.json").write_text(json.dumps(rows))
