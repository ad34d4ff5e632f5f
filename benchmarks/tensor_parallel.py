"""Tensor parallelism against one device, on CPUs: losses, gradients, and the frozen bytes that a rank holds.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 4 -m benchmarks.tensor_parallel [--data 2] [--arguments use_dora=true]

`--data N`: FSDP2 over N groups of ranks, and tensor parallelism within each. With use_dora the layers are split by
outputs alone. docs/results.md has the results.
"""

import argparse
import copy
import json
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_qlora import convert
from lightning_qlora.layers.packed_layer import BASE
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.tensors.dtensor import gather

SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1280,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
STEPS = 20


def plan(use_dora: bool) -> dict[str, Any]:
    """Of one block: as in Megatron-LM, or with DoRA the MLP by outputs, which are gathered."""
    mlp = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    if use_dora:
        return {name: ColwiseParallel(output_layouts=Replicate()) for name in mlp}
    by_outputs = [*(f"self_attn.{name}_proj" for name in "qkv"), *mlp[:2]]
    by_inputs = ["self_attn.o_proj", mlp[2]]
    return {name: ColwiseParallel() for name in by_outputs} | {name: RowwiseParallel() for name in by_inputs}


def frozen_bytes(model: nn.Module) -> int:
    """Bytes of the 4-bit weights on this rank."""
    weights = [layer._parameters[name] for layer in adapted_layers(model).values() for name in BASE]
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in weights if p is not None)


def main() -> None:
    """Train both, compare every step, print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=int, default=1)
    parser.add_argument("--arguments", nargs="*", default=[], help="of convert, as NAME=JSON")
    chosen = parser.parse_args()
    pairs = (pair.split("=", 1) for pair in chosen.arguments)
    arguments = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0} | {name: json.loads(value) for name, value in pairs}
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (chosen.data, ranks // chosen.data), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(0)
    one = LlamaForCausalLM(LlamaConfig(**SIZES)).train()
    convert(one, **arguments)
    for layer in adapted_layers(one).values():
        nn.init.normal_(layer.lora_B, std=0.02)  # so that A has gradients in the first step
    split = copy.deepcopy(one)
    for layer in split.model.layers:
        parallelize_module(layer, mesh["tensor"], plan("use_dora" in arguments))
    for module in (*split.model.layers, split) if chosen.data > 1 else ():
        fully_shard(module, mesh=mesh["data"])
    ids = torch.randint(0, 512, (4, 32), generator=torch.Generator().manual_seed(2)).chunk(chosen.data)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-3) for m in (one, split)]
    loss_off = grad_off = 0.0
    for step in range(STEPS):
        expected = 0.0
        for part in ids:
            torch.manual_seed(step)
            loss = one(input_ids=part, labels=part).loss / len(ids)
            loss.backward()
            expected += loss.item()
        torch.manual_seed(step)
        mine = ids[mesh["data"].get_local_rank()]
        mean = split(input_ids=mine, labels=mine).loss
        mean.backward()
        mean = mean.detach().clone()
        dist.all_reduce(mean)
        loss_off = max(loss_off, abs(mean.item() / ranks - expected) / expected)
        for ours, theirs in zip(split.parameters(), one.parameters(), strict=True):
            if step == 0 and theirs.grad is not None:  # later, AdamW has made parameters differ
                grad_off = max(grad_off, ((gather(ours.grad) - theirs.grad).norm() / theirs.grad.norm()).item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    layers = zip(adapted_layers(one).values(), adapted_layers(split).values(), strict=True)
    same = all(a.base_fingerprint() == b.base_fingerprint() for a, b in layers)
    share = frozen_bytes(split) / frozen_bytes(one)
    if dist.get_rank() == 0:
        print(
            f"{ranks} ranks, {chosen.data} of data: losses of {STEPS} steps differ by {loss_off:.1e}, gradients of the "
            f"first by {grad_off:.1e}; frozen bytes on a rank {share:.2%}, fingerprints {'equal' if same else 'DIFFER'}"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
