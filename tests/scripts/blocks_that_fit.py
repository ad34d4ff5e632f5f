"""Run by test_activation_budget.py, MODEL LIMIT: steps under a limit; prints how many blocks keep their activations."""

import sys

import torch
import transformers

from lightning_qlora import convert
from tests.toys import toy

ARGUMENTS = {"r": 8, "lora_dropout": 0.0}
LLAMA = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 10, "max_position_embeddings": 1024}
BERT = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 10, "max_position_embeddings": 256}
SWIN = {"image_size": 224, "embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "num_labels": 4}


def model(name):
    if name == "swin":  # the blocks of its four stages have other sizes
        torch.manual_seed(0)
        return transformers.SwinForImageClassification(transformers.SwinConfig(**SWIN)).train()
    return toy(name, **{"llama": LLAMA, "bert": BERT}[name]).train()


def inputs(name):
    if name == "swin":
        return {"pixel_values": torch.zeros(4, 3, 224, 224), "labels": torch.zeros(4, dtype=torch.long)}
    tokens = torch.zeros({"llama": (1, 1024), "bert": (4, 256)}[name], dtype=torch.long)
    return {"input_ids": tokens, "labels": tokens if name == "llama" else tokens[:, 0]}


def main(name, limit):
    module = model(name)
    report = convert(module, **ARGUMENTS, gradient_checkpointing=limit)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad])
    for _ in range(3):
        optimizer.zero_grad()
        module(**inputs(name)).loss.backward()
        optimizer.step()
    print("kept", report.activations.kept_blocks, report.activations.blocks)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
