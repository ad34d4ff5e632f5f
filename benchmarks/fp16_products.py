"""Products in fp16 with a power of two (`kernels/half.py`) beside fp32 and bf16: losses, gradients, held-out loss.

    python -m benchmarks.fp16_products [--steps 30] [--tokens 96] [--only toy]      # on a CPU; SmolLM2 from PyPI

All models are in fp32, and only the products of the 4-bit layers differ (compute_dtype). On a CPU factors are rounded
to fp16 and the sums are those of fp32, as on tensor cores. The toy is a small random Gemma 2 whose up_proj is large:
the inputs of down_proj reach 1e6, which fp16 does not have. "fp16, plain" is torch's autocast.
"""

import argparse
import pydoc_data.topics
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM

from lightning_qlora import convert

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from smollm2 import load_model, load_tokenizer

LR = 2e-4
RANK = 16
HELD_OUT = 8
KINDS = ("fp32", "bf16", "fp16", "fp16, plain")
TOY = Gemma2Config(
    vocab_size=512, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=4, head_dim=64, tie_word_embeddings=False,
)  # fmt: skip
Batches = list[Tensor]


def toy() -> nn.Module:
    """A model whose activations pass the end of fp16."""
    torch.manual_seed(0)
    model: Any = Gemma2ForCausalLM._from_config(TOY, attn_implementation="eager")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.mul_(1e6)
    return model  # type: ignore[no-any-return]


def toy_batches(count: int, tokens: int) -> Batches:
    """Sequences in which each token decides the next one."""
    draw = torch.Generator().manual_seed(1)
    next_token = torch.randperm(TOY.vocab_size, generator=draw)
    batches = []
    for _ in range(count):
        row = torch.randint(TOY.vocab_size, (8,), generator=draw)
        rows = [row]
        for _ in range(tokens // 8 - 1):
            rows.append(next_token[rows[-1]])
        batches.append(torch.stack(rows, 1))
    return batches


def smollm2() -> nn.Module:
    """SmolLM2-135M."""
    return load_model(dtype=torch.float32)


def text_batches(count: int, tokens: int) -> Batches:
    """Python's help texts."""
    text = "\n\n".join(pydoc_data.topics.topics.values())
    ids = load_tokenizer()(text, return_tensors="pt")["input_ids"][0]
    starts = torch.linspace(0, len(ids) - tokens - 1, count).long()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(2))
    return [ids[starts[i] : starts[i] + tokens][None] for i in order.tolist()]


def train(
    make: Callable[[], nn.Module], batches: Batches, steps: int, kind: str
) -> tuple[list[float], float, Tensor, float]:
    """The loss before each step, the held-out loss after all, the first gradient, and the largest input of a layer."""
    dtype = kind.split(",")[0]
    model = make()
    torch.manual_seed(1)
    convert(model, r=RANK, lora_alpha=RANK, lora_dropout=0.05, compute_dtype=dtype)
    largest = [0.0]
    for name, part in model.named_modules():
        if name.endswith("down_proj"):
            part.register_forward_pre_hook(
                lambda _, inputs: largest.append(max(inputs[0].abs().max().item(), largest.pop()))
            )
    trained = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR)
    context: Any = torch.autocast("cpu", torch.float16) if kind.endswith("plain") else nullcontext()

    def loss_of(ids: Tensor) -> Tensor:
        with context:
            return model(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]

    losses = []
    first = torch.empty(0)
    torch.manual_seed(3)
    for ids in batches[:steps]:
        loss = loss_of(ids)
        loss.backward()
        if not len(first):
            first = torch.cat([parameter.grad.flatten() for parameter in trained if parameter.grad is not None])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        held_out = sum(loss_of(ids).item() for ids in batches[-HELD_OUT:]) / HELD_OUT
    return losses, held_out, first, largest[0]


def main(arguments: list[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--only", choices=("toy", "smollm2"))
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    models: dict[str, Any] = {"toy": (toy, toy_batches, KINDS), "smollm2": (smollm2, text_batches, KINDS[:3])}
    for name in [options.only] if options.only else models:
        make, batches_of, kinds = models[name]
        batches = batches_of(options.steps + HELD_OUT, options.tokens)
        print(
            f"| {name}, {options.steps} steps | first loss | last loss | held-out loss | largest difference of a loss "
            "to fp32 | error of the first gradient | largest input of down_proj |\n|---|---:|---:|---:|---:|---:|---:|"
        )
        exact: Any = None
        for kind in kinds:
            losses, held_out, gradient, largest = train(make, batches, options.steps, kind)
            exact = exact or (losses, gradient)
            off = max(abs(one - other) for one, other in zip(losses, exact[0], strict=True))
            if any(loss != loss for loss in losses):
                off = float("nan")
            error = ((gradient - exact[1]).norm() / exact[1].norm()).item()
            print(
                f"| {kind} | {losses[0]:.4f} | {losses[-1]:.4f} | {held_out:.4f} | {off:.4f} | {error:.1e} | "
                f"{largest:.1e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
