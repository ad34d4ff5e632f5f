"""Run by test_activation_budget.py: steps with growing batches under a limit that not all activations fit in."""

import torch

from lightning_qlora import convert
from lightning_qlora.activations.activation_budget import MARGIN
from lightning_qlora.activations.device_memory import memory_of
from lightning_qlora.activations.gradient_checkpointing import budget_of
from tests.toys import toy

CPU = torch.device("cpu")
SHAPE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "max_position_embeddings": 2048}


def step(module, tokens):
    tokens = torch.zeros(1, tokens, dtype=torch.long)
    module.zero_grad()
    module(input_ids=tokens, labels=tokens).loss.backward()


def main():
    measured = toy("llama", **SHAPE)
    convert(measured, r=8, lora_dropout=0.0, gradient_checkpointing="auto")
    for _ in range(2):
        step(measured, 512)
    budget = budget_of(measured.modules())
    size = budget.kept_bytes // budget.kept_blocks
    module = toy("llama", **SHAPE)
    limit = int((memory_of(CPU).peak + 8 * size) / (1 - MARGIN))
    convert(module, r=8, lora_dropout=0.0, gradient_checkpointing=limit)
    kept = []
    for tokens in (512, 512, 1024, 512, 1536):
        step(module, tokens)
        peak = memory_of(CPU).peak
        print(tokens, budget_of(module.modules()), peak, limit, size)
        assert peak <= limit + size * tokens // 512
        kept.append(budget_of(module.modules()).kept_blocks)
    assert max(kept) > 0 and min(kept[1:]) < 8, kept
    print("below the limit")


if __name__ == "__main__":
    main()
