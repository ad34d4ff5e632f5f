"""Decoding 4-bit weights to bf16 as a share of the copy bandwidth, and quantizing the linear layers of an 8B model."""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu_cells import Row
from benchmarks.peers import why_missing
from benchmarks.timing import Function, seconds
from lightning_qlora.kernels import ops

SHAPES = {
    "8B q, o": (4096, 4096),
    "8B k, v": (1024, 4096),
    "8B gate, up": (14336, 4096),
    "8B down": (4096, 14336),
    "70B q, o": (8192, 8192),
    "70B gate, up": (28672, 8192),
}
LAYERS_8B = ["8B q, o"] * 2 + ["8B k, v"] * 2 + ["8B gate, up"] * 2 + ["8B down"]


def measure(device: torch.device, small: bool) -> Iterator[Row]:
    """GB/s of the bytes read and written, against a copy that moves as many."""
    shapes = {"small": (128, 128)} if small else SHAPES
    reason = why_missing("bitsandbytes")
    if reason:
        yield {"variant": "bitsandbytes", "skipped": reason}
    for name, shape in shapes.items():
        weight = ops.quantize(_normal(shape, device)).to_bytes()
        moved = 2 * weight.numel + sum(part.numel() for part in weight[:3])
        source = torch.empty(moved // 2, dtype=torch.uint8, device=device).random_()
        target = torch.empty_like(source)
        functions: dict[str, Function] = {
            "copy": lambda target=target, source=source: target.copy_(source),
            "ours": lambda weight=weight: ops.dequantize(weight, torch.bfloat16),
        }
        if reason is None:
            from bitsandbytes.functional import dequantize_4bit, quantize_4bit

            packed, state = quantize_4bit(_normal(shape, device), quant_type="nf4", compress_statistics=True)
            functions["bitsandbytes"] = lambda packed=packed, state=state: dequantize_4bit(packed, state)
        rates = {key: moved / took / 1e9 for key, took in seconds(functions, device).items()}
        yield {"shape": name, "gb_per_second": rates, "share_of_copy": rates["ours"] / rates["copy"]}
    yield {"quantize_8b_seconds": _quantize(device, small)}


def _quantize(device: torch.device, small: bool) -> dict[str, float]:
    shapes = [(64, 64)] if small else [SHAPES[name] for name in LAYERS_8B]
    weights = [_normal(shape, device) for shape in shapes]
    functions: dict[str, Function] = {"ours": lambda: [ops.quantize(weight) for weight in weights]}
    if why_missing("bitsandbytes") is None:
        from bitsandbytes.functional import quantize_4bit

        functions["bitsandbytes"] = lambda: [
            quantize_4bit(weight, quant_type="nf4", compress_statistics=True) for weight in weights
        ]
    return {name: 32 * value for name, value in seconds(functions, device, rounds=5).items()}


def _normal(shape: tuple[int, int], device: torch.device) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02
