"""Whether a device computes a 16-bit module faster, or more exactly, in fp32, and why: one branch for a kind of device.

`fp32_module.py` holds such a module in fp32. It asks here only, with the device that the module is on.
"""

from functools import cache

import torch

from lightning_qlora.kernels.cpu.products import products

IN_16_BITS = (torch.bfloat16, torch.float16)


def reason_for_fp32(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a device should hold a module of this type in fp32, and compute in it; None: the module keeps its type.

    The reason is a sentence without its end. The first question for a type of a CPU measures, in some milliseconds.
    """
    if dtype not in IN_16_BITS:
        return None
    if device.type == "cpu":
        measured = products(dtype)
        if measured.is_slow:
            return f"on this CPU {measured} ({str(dtype).removeprefix('torch.')})"
    if device.type == "cuda" and not has_bf16("cuda"):
        return f"{torch.cuda.get_device_name(device)} has no bf16, and 4-bit layers multiply in fp16 with sums in fp32"
    if device.type in ("cuda", "xpu") and dtype is torch.float16:
        return "fp16 has no number for large activations and small gradients"
    return None


def reason_of_fp16(device: torch.device, dtype: torch.dtype) -> str | None:
    """The same for compute_dtype="fp16", on every device."""
    if dtype not in IN_16_BITS:
        return None
    return "compute_dtype='fp16': 4-bit layers multiply in fp16 with sums in fp32"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # a question to the driver can't be traced
def has_bf16(device: str) -> bool:
    """Whether GPUs of a type compute in bf16. Cards before Ampere (V100, T4, RTX 20) emulate it, slower than fp32."""
    return device == "xpu" or (device == "cuda" and _cuda_has_bf16())


@cache
def _cuda_has_bf16() -> bool:
    if torch.version.hip:  # torch says yes for all; GCN before MI100 and RDNA before its third generation have none
        card = str(torch.cuda.get_device_properties(torch.cuda.current_device()).gcnArchName)
        return not card.startswith(("gfx900", "gfx902", "gfx904", "gfx906", "gfx909", "gfx90c", "gfx10"))
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))
