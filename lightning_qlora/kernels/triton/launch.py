"""Launch a kernel with little host time: what stays the same from call to call is prepared once.

Triton compiles a variant of a kernel for each combination of constants, types, 16-byte alignment of addresses and
properties of integers. Its own launch takes 9 to 20 us of Python to find the variant. A `Launch` holds the variants of
one kernel, grid and set of constants, and takes 2.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

from lightning_qlora.kernels.triton.tiles import Tile

OPTIONS = frozenset({"num_warps", "num_stages", "maxnreg", "waves_per_eu"})  # entries of a tile that are no constants
MAX_LAUNCHES = 4096  # of each kernel that are kept: one for every shape, and for every number of rows


class Launch:
    """A kernel with its grid, sizes and constants; call it with the tensors.

    Args:
        kernel: A `triton.jit` kernel, whose parameters are tensors, numbers, unspecialized, constants, in this order.
        device: Where the tensors are.
        grid: Number of programs in each dimension.
        numbers: Integers that Triton specializes for (sizes and strides).
        tile: Constants and launch options from `tiles`; entries that are neither are ignored.
        fuse: Whether a * b + c may be rounded once (FMA) and not twice.
        constants: Further constants.
    """

    def __init__(
        self, kernel: Any, device: torch.device, grid: tuple[int, int, int], numbers: tuple[int, ...], tile: Tile,
        fuse: bool = False, **constants: Any,
    ) -> None:  # fmt: skip
        names = kernel.arg_names
        constants |= {name: value for name, value in tile.items() if name in names}
        options = {name: tile[name] for name in OPTIONS & tile.keys()}
        self._kernel, self._index, self._grid, self._numbers = kernel, device.index, grid, numbers
        self._keywords = {**constants, **options, "enable_fp_fusion": fuse}
        self._constants = tuple(constants[name] for name in names if name in constants)
        self._compiled: dict[tuple[torch.dtype, ...], tuple[Any, Any, Any]] = {}

    def __call__(self, tensors: tuple[Tensor, ...], unspecialized: tuple[int | float, ...] = ()) -> None:
        """Run the kernel; `unspecialized`: floats, and 32-bit integers that it lists in `do_not_specialize`."""
        index = self._index
        if index is not None and index != torch.cuda.current_device():
            with torch.cuda.device(index):  # Triton launches on the current device
                return self(tensors, unspecialized)
        addresses = 0
        for tensor in tensors:
            addresses |= tensor.data_ptr()
        types = tuple([tensor.dtype for tensor in tensors])
        # Unaligned addresses are left to Triton, which compiles another variant for them.
        found = None if addresses & 15 else self._compiled.get(types)
        if found is not None:
            # As in CompiledKernel.__getitem__, without the hooks of Triton's profiler.
            run, function, metadata = found
            stream = driver.active.get_current_stream(index)
            run(
                *self._grid, stream, function, metadata, None, None, None, *tensors, *self._numbers, *unspecialized,
                *self._constants,
            )  # fmt: skip
            return None
        compiled = self._kernel[self._grid](*tensors, *self._numbers, *unspecialized, **self._keywords)
        if isinstance(compiled, CompiledKernel) and not addresses & 15:  # not under the interpreter
            self._compiled[types] = compiled.run, compiled.function, compiled.packed_metadata
        return None


@triton.jit
def _store_one(out):
    tl.store(out, 1)


def check_launch(device: torch.device) -> None:
    """Run a tiny kernel and raise what goes wrong: no C compiler, no driver, a card that Triton does not support."""
    out = torch.zeros(1, dtype=torch.int32, device=device)
    Launch(_store_one, device, (1, 1, 1), (), Tile())((out,))
    if out.item() != 1:
        raise RuntimeError("a kernel ran without an error and did nothing")
