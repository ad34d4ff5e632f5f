"""In which types a device computes well, bf16 or not, fp32 better than 16 bits."""

from contextlib import nullcontext
from functools import cache
from typing import NamedTuple

import torch

from lightning_qlora.kernels.cpu.matmul_16bit import products

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
IN_16_BITS = (torch.bfloat16, torch.float16)


class Held(NamedTuple):
    """The type that a device keeps a module of another 16-bit type in, and computes in."""

    dtype: torch.dtype
    reason: str  # a sentence without its end


def held_type(device: torch.device, dtype: torch.dtype) -> Held | None:
    """The type in which a device should keep a module of this type; None: the module keeps its own.

    The first question for a type of a CPU measures, in some milliseconds.
    """
    if dtype not in IN_16_BITS:
        return None
    if device.type == "cpu":
        measured = products(dtype)
        if measured.is_slow:
            return Held(torch.float32, f"on this CPU {measured} ({str(dtype).removeprefix('torch.')})")
    if lacks_bf16(device):
        card = torch.cuda.get_device_name(device)
        return Held(torch.float32, f"{card} has no bf16, and 4-bit layers multiply in fp16 with sums in fp32")
    if device.type in ("cuda", "xpu") and dtype is torch.float16:
        return Held(torch.bfloat16, "fp16 has no number for large activations and small gradients")
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # a question to the driver can't be traced
def has_bf16(device: torch.device) -> bool:
    """Whether a GPU computes in bf16. Cards before Ampere (V100, T4, RTX 20) emulate it, slower than fp32.

    A device without an index is the current one.
    """
    return device.type == "xpu" or (device.type == "cuda" and _cuda_has_bf16(device.index))


def lacks_bf16(device: torch.device) -> bool:
    """Whether it is a card that emulates bf16: products of a module held in fp32 are in fp16, with powers of two."""
    return device.type == "cuda" and not has_bf16(device)


@cache
def _cuda_has_bf16(index: int | None) -> bool:
    if torch.version.hip:  # torch says yes for all; GCN before MI100 and RDNA before its third generation have none
        card = str(torch.cuda.get_device_properties(index).gcnArchName)
        return not card.startswith(("gfx900", "gfx902", "gfx904", "gfx906", "gfx909", "gfx90c", "gfx10"))
    with nullcontext() if index is None else torch.cuda.device(index):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
