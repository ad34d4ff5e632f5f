"""Bytes that a machine sends in a step of fine-tuning: computed, and counted at its network interface.

    python -m tests.hosts 2 torchrun --nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint host0:29400 \
        -m benchmarks.network ddp       # or hsdp, fsdp; full: DDP that trains all weights in bf16
    python -m benchmarks.network        # computed for 64 machines of 8 GPUs and models of 8B and 70B

The first command is for two hosts on one machine; on several machines run its end on each. The interface is the one
that GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names. Collectives are counted as rings, whose order passes through each
machine once: a machine sends what one of its ranks sends. In HSDP every rank sends, its part to other machines.
"""

import argparse
import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig

from benchmarks.llama import LLAMA_8B
from lightning_qlora import QLoRAConfig, QLoRAPrecision, to_parameters
from lightning_qlora.tools.fake_model import meta_model
from lightning_qlora.tools.memory_estimate import PlannedRun

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from machines import MODULES, from_environment, make_strategy

STEPS = 4
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
NAMES = {"ddp": "DDP", "hsdp": "HSDP", "fsdp": "FSDP2", "full": "full fine-tuning in bf16, DDP"}


def size(parameters: Any) -> int:
    """In bytes, of all ranks together."""
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def traffic(model: nn.Module, strategy: str, machines: int, gpus: int, gloo: bool = False) -> float:
    """Bytes that a machine sends in a step of one batch.

    With G bytes of gradients, B bytes of the blocks and R bytes of the other parameters, n machines, N ranks:

    - ddp: the sum of G over all ranks, 2 (N - 1)/N G
    - hsdp: the sum of G over machines, 2 (n - 1)/n G
    - fsdp: B for the forward and again for the backward pass, R once, and each rank's part of the sum of G,
      (N - 1)/N (2 B + R + G), on gloo 2 G: it sends each rank all parts of the sum
    """
    ranks = machines * gpus
    gradients = size(parameter for parameter in model.parameters() if parameter.requires_grad)
    if strategy == "hsdp":
        return 2 * (machines - 1) / machines * gradients
    if strategy == "fsdp":
        blocks = size(parameter for block in model.model.layers for parameter in block.parameters())
        others = size(model.parameters()) - blocks
        return (ranks - 1) / ranks * (2 * blocks + others + (1 + gloo) * gradients)
    return 2 * (ranks - 1) / ranks * gradients


def bytes_sent() -> int:
    """Since the start of the machine, with the headers of packets."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME") or os.environ["NCCL_SOCKET_IFNAME"]
    (line,) = [line for line in Path("/proc/net/dev").read_text().splitlines() if f"{interface}:" in line]
    return int(line.split(":")[1].split()[8])


class Count(Callback):
    """Bytes that this machine sent, after each step."""

    def __init__(self) -> None:
        self.sent = list[int]()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.strategy.barrier()
        self.sent.append(bytes_sent())


def count(strategy: str, base: str | None) -> dict[str, Any]:
    """Train for STEPS steps under torchrun; a step's bytes, counted and computed, without the first step."""
    machines, gpus = from_environment("GROUP_WORLD_SIZE"), from_environment("LOCAL_WORLD_SIZE")
    kind = "ddp" if strategy == "full" else strategy
    module: LightningModule = MODULES[kind](base)
    plugin = {"precision": "bf16-true"} if strategy == "full" else {"plugins": QLoRAPrecision(r=16)}
    counted = Count()
    trainer = Trainer(
        **plugin,
        strategy=make_strategy(kind, machines * gpus, timedelta(minutes=10)),
        num_nodes=machines,
        devices=gpus,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=counted,
    )
    ids = torch.arange(STEPS * trainer.world_size * 8).reshape(-1, 8)
    data = DataLoader([{"input_ids": row, "labels": row} for row in ids])
    trainer.fit(module, data)
    return {
        "strategy": strategy,
        "machine": trainer.node_rank,
        "counted": (counted.sent[-1] - counted.sent[0]) / (STEPS - 1),
        "computed": traffic(module.model, strategy, machines, gpus, gloo=dist.get_backend() == "gloo"),
    }


def without_values(shape: dict[str, int], quantized: bool) -> nn.Module:
    """A Llama in bf16, or in 4 bits with adapters, of which only the sizes are known."""
    config = LlamaConfig(**shape, tie_word_embeddings=False, dtype="bfloat16")
    if not quantized:
        return meta_model(config)
    model = PlannedRun(config, "adamw", QLoRAConfig(r=16)).model
    to_parameters(model)
    return model


def table(machines: int, gpus: int) -> str:
    """For machines whose networks have 10 and 100 Gbit in a second, in both directions at a time."""
    lines = ["| model | strategy | GB | s at 10 Gbit/s | s at 100 Gbit/s |", "| --- | --- | --- | --- | --- |"]
    for name, shape in (("8B", LLAMA_8B), ("70B", LLAMA_70B)):
        for strategy in NAMES:
            sent = traffic(without_values(shape, quantized=strategy != "full"), strategy, machines, gpus)
            seconds = [f"{sent / (gigabits * 1e9 / 8):.3g}" for gigabits in (10, 100)]
            lines.append(f"| {name} | {NAMES[strategy]} | {sent / 1e9:.3g} | {' | '.join(seconds)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("strategy", choices=NAMES, nargs="?")
    parser.add_argument("--base", help="hub name or folder of a model of Llama's classes; SmolLM2 if none is given")
    parser.add_argument("--machines", type=int, default=64)
    parser.add_argument("--gpus", type=int, default=8, help="of each machine")
    options = parser.parse_args()
    if options.strategy is None:
        print(table(options.machines, options.gpus))
        return
    counts = count(options.strategy, options.base)
    if os.environ["LOCAL_RANK"] == "0":
        print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    main()
