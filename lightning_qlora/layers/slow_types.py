"""Whether a device computes a 16-bit module faster, or more exactly, in fp32, and why: one branch for a kind of device.

`fp32_module.py` holds such a module in fp32. It asks here only, with the device that the module is on.
"""

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
    return None
