"""Launch a kernel with little host time: compiled kernels are found by a small key, without Triton's argument binder.

Triton compiles a variant of a kernel for each combination of constants, types, 16-byte alignment of addresses and
properties of integers. Its own launch takes 9 to 20 us of Python to find the variant, `launch` takes 4.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel

OPTIONS = frozenset({"num_warps", "num_stages", "maxnreg", "waves_per_eu"})  # entries of a tile that are no constants

# key -> compiled kernel, its constants in their order, and the tile, which must live as long as its id is a key
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...], dict[str, int]]] = {}


def launch(
    kernel: Any, device: torch.device, grid: tuple[int, int, int], tensors: tuple[Tensor, ...],
    numbers: tuple[int, ...], tile: dict[str, int], unspecialized: tuple[int | float, ...] = (), fuse: bool = False,
    **constants: Any,
) -> None:  # fmt: skip
    """Run a `triton.jit` kernel, whose parameters are tensors, numbers, unspecialized, constants, in this order.

    Args:
        kernel: The kernel.
        device: Where the tensors are.
        grid: Number of programs in each dimension.
        tensors: The tensors.
        numbers: Integers that Triton specializes for (sizes and strides).
        tile: Constants and launch options from `tiles`; entries that are neither are ignored.
        unspecialized: Floats, and 32-bit integers that the kernel lists in `do_not_specialize`.
        fuse: Whether a * b + c may be rounded once (FMA) and not twice.
        constants: Further constants.
    """
    index = device.index
    if index is not None and index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current device
            return launch(kernel, device, grid, tensors, numbers, tile, unspecialized, fuse, **constants)
    key = (id(kernel), index, id(tile), numbers, *constants.values(), *[tensor.dtype for tensor in tensors])
    addresses = 0
    for tensor in tensors:
        addresses |= tensor.data_ptr()
    found = None if addresses & 15 else _compiled.get(key)
    if found is not None:
        found[0][grid](*tensors, *numbers, *unspecialized, *found[1])
        return None
    names = kernel.arg_names
    constants |= {name: value for name, value in tile.items() if name in names}
    options = {name: tile[name] for name in OPTIONS & tile.keys()}
    arguments = *tensors, *numbers, *unspecialized
    compiled = kernel[grid](*arguments, **constants, **options, enable_fp_fusion=fuse)
    # Not under the interpreter. Unaligned addresses are left to Triton, which compiles another variant for them.
    if isinstance(compiled, CompiledKernel) and not addresses & 15:
        _compiled[key] = compiled, tuple(constants[name] for name in names[len(arguments) :]), tile
    return None


@triton.jit
def _store_one(out):
    tl.store(out, 1)


def check_launch(device: torch.device) -> None:
    """Run a tiny kernel and raise what goes wrong: no C compiler, no driver, a card that Triton does not support."""
    out = torch.zeros(1, dtype=torch.int32, device=device)
    launch(_store_one, device, (1, 1, 1), (out,), (), {})
    if out.item() != 1:
        raise RuntimeError("a kernel ran without an error and did nothing")
