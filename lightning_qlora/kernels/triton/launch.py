"""What all launches share: tile sizes, little host time, and sums of several programs.

Triton compiles a variant of a kernel for each combination of constants, types, 16-byte alignment of addresses and
properties of integers. Its own launch takes 9 to 20 us of Python to find the variant. A `Launch` holds the variants of
one kernel, grid and set of constants, and takes 2.

`tiles.json` has the tile sizes. Nothing is timed while a model trains: `python -m benchmarks.tiles` measures them. Its
form is {kernel: {target: [{"up_to": size, constants of the kernel, "num_warps", ...}]}}, where the size is the number
of rows of x, and the block size for `quantize`. The first entry with size <= up_to is used. For a larger size there is
no tile. A target is a card ("sm_89 NVIDIA L4"), as it was measured, or else all of its architecture ("sm_89"), or of
its family, as sm_103 has the tiles of sm_100, or "default".
"""

import json
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

from lightning_qlora.kernels.scratch import scratch

OPTIONS = frozenset({"num_warps", "num_stages", "maxnreg", "waves_per_eu"})  # entries of a tile that are no constants
address_of = Tensor.data_ptr
ODD = (15).__and__  # what an address has beyond a multiple of 16
MAX_LAUNCHES = 4096  # of each kernel that are kept: one for every shape, and for every number of rows
PROGRAMS = 512  # that run at the same time, where the kernel and the card do not say it
REGISTERS = 65536  # of a multiprocessor, of every NVIDIA card with Triton


class Tile(dict[str, int]):
    """An entry of the table, not to be changed. Hashed by identity, so that launches can be cached by their tile."""

    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__


def read(file: Path) -> dict[str, dict[str, list[Tile]]]:
    targets = json.loads(file.read_text()).items()
    return {kernel: {name: [*map(Tile, tiles)] for name, tiles in table.items()} for kernel, table in targets}


FILE = Path(__file__).with_name("tiles.json")
TABLE = read(FILE)
NO_TILE = Tile()


@cache
def target(device: torch.device) -> str:
    """A device's instruction set and name: "sm_89 NVIDIA L4", "gfx942"; "interpreter" under TRITON_INTERPRET=1."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor} {torch.cuda.get_device_name(device)}"


def tiles_of(kernel: str, name: str) -> list[Tile]:
    """The entries of the table for a target."""
    targets = TABLE[kernel]
    instructions = name.split()[0]
    names = [name, instructions]
    if name.startswith("sm_1"):
        names.append(f"{instructions[:-1]}0")  # from sm_100 on, the cards of one major version are a family
    return next((targets[each] for each in names if each in targets), targets["default"])


def find_tile(kernel: str, device: torch.device, size: int = 0) -> Tile:
    """The entry of the table; empty if there is none for so large a size."""
    for tile in tiles_of(kernel, target(device)):
        if size <= tile.get("up_to", size):
            return tile
    return NO_TILE


class Launch:
    """A kernel with its grid, sizes and constants; call it with the tensors, of the same types in each call.

    The parameters of a kernel are tensors, numbers, unspecialized, constants, in this order. Triton specializes for
    `numbers` (sizes and strides). `tile` has constants and launch options; other entries are ignored. `fuse`: a * b + c
    may be rounded once (FMA) and not twice.
    """

    def __init__(
        self,
        kernel: Any,
        device: torch.device,
        grid: tuple[int, int, int],
        numbers: tuple[int, ...],
        tile: Tile,
        fuse: bool = False,
        **constants: Any,
    ) -> None:
        names = kernel.arg_names
        self.sums = 0  # fp32 numbers of `memory`
        constants |= {name: value for name, value in tile.items() if name in names}
        options = {name: tile[name] for name in OPTIONS & tile.keys()}
        self._kernel = kernel
        self._index = device.index
        self._grid = grid
        self._numbers = numbers
        self._keywords = {**constants, **options, "enable_fp_fusion": fuse}
        self._constants = tuple(constants[name] for name in names if name in constants)
        # The launch for tensors at multiples of 16. It is the short one once Triton compiled the variant.
        self.aligned: Callable[..., None] = self._compile

    def __call__(
        self,
        tensors: tuple[Tensor, ...],
        unspecialized: tuple[int | float, ...] = (),
    ) -> None:
        """Run the kernel; `unspecialized`: floats, and 32-bit integers that it lists in `do_not_specialize`."""
        if not any(map(ODD, map(address_of, tensors))):
            self.aligned(tensors, unspecialized)
        else:  # left to Triton, which compiles another variant
            self._launch_by_triton(tensors, unspecialized)

    def _launch_by_triton(self, tensors: tuple[Tensor, ...], unspecialized: tuple[int | float, ...]) -> Any:
        if self._index is not None and self._index != torch.cuda.current_device():
            with torch.cuda.device(self._index):  # Triton launches on the current device
                return self._launch_by_triton(tensors, unspecialized)
        return self._kernel[self._grid](*tensors, *self._numbers, *unspecialized, **self._keywords)

    def _compile(self, tensors: tuple[Tensor, ...], unspecialized: tuple[int | float, ...] = ()) -> None:
        variant = self._launch_by_triton(tensors, unspecialized)
        if isinstance(variant, CompiledKernel):  # not under the interpreter
            self.aligned = self._short(variant)

    def _short(self, variant: CompiledKernel) -> Callable[..., None]:
        """As CompiledKernel.__getitem__, without the hooks of Triton's profiler.

        Of a tensor the launcher would ask the address, and then the driver about it.
        """
        run = variant.run
        current_stream = driver.active.get_current_stream
        index = self._index
        current_device = None if index is None else torch._C._cuda_getDevice  # torch.cuda's asks more than it
        grid = self._grid
        fixed = variant.function, variant.packed_metadata, None, None, None
        numbers = self._numbers
        constants = self._constants

        def launch(tensors: tuple[Tensor, ...], unspecialized: tuple[int | float, ...] = ()) -> None:
            if current_device is not None and index != current_device():
                with torch.cuda.device(index):
                    return launch(tensors, unspecialized)
            run(*grid, current_stream(index), *fixed, *map(address_of, tensors), *numbers, *unspecialized, *constants)
            return None

        return launch

    def memory(self, out: Tensor) -> Tensor:
        """For `add_shares`: the counters, which are zero before and after a launch, and the sums; `out` if it has none.

        It is `scratch`, so each stream has its own.
        """
        return scratch((self.sums,), torch.float32, out.device, "shares", COUNTERS.value) if self.sums else out

    def _load(self, arguments: tuple[Any, ...]) -> CompiledKernel | None:
        """Compile and load the kernel for these arguments, so that errors of both come before it writes."""
        if isinstance(self._kernel, triton.JITFunction):  # the interpreter has nothing to compile
            variant = self._kernel.warmup(*arguments, grid=self._grid, **self._keywords)
            if isinstance(variant, CompiledKernel):
                _ = variant.run  # the property loads it
                return variant
        return None

    def programs_at_once(self, types: Sequence[torch.dtype], unspecialized: tuple[int | float, ...]) -> int:
        """How many programs a card runs at the same time, with aligned tensors of these types.

        A multiprocessor has registers, shared memory and threads for some programs.
        """
        variant = None
        if self._index is not None:
            variant = self._load((*types, *self._numbers, *unspecialized))
        if variant is None:
            return PROGRAMS
        card: Any = driver.active.utils.get_device_properties(self._index)
        threads = torch.cuda.get_device_properties(self._index).max_threads_per_multi_processor
        warps = variant.metadata.num_warps
        # Each quarter of a multiprocessor has its own registers, and gives 256 at a time to a warp of 32 threads.
        registers_of_warp = -(-32 * variant.n_regs // 256) * 256
        warps_of_quarter = REGISTERS // 4 // registers_of_warp
        by_registers = 4 * warps_of_quarter // warps
        by_memory = (card["max_shared_mem"] + 1024) // (variant.metadata.shared + 1024)  # 1 KiB is the driver's
        at_once = max(1, min(by_registers, by_memory, threads // (32 * warps)))
        return int(card["multiprocessor_count"] * at_once)


@lru_cache(4 * MAX_LAUNCHES)
def launch_of(types: tuple[torch.dtype, ...], *arguments: Any, **constants: Any) -> Launch:
    """The launch of a kernel, for tensors of these types, whose grid takes no time to compute."""
    return Launch(*arguments, **constants)


@triton.jit
def _store_one(out):
    tl.store(out, 1)


def check_launch(device: torch.device) -> None:
    """Run a tiny kernel and raise what goes wrong: no C compiler, no driver, a card that Triton does not support."""
    out = torch.zeros(1, dtype=torch.int32, device=device)
    Launch(_store_one, device, (1, 1, 1), (), Tile())((out,))
    if out.item() != 1:
        raise RuntimeError("a kernel ran without an error and did nothing")


# Sums that several programs compute together are added in a fixed order: the same bits each time, and no second launch.
# Each program writes its share of a tile to its own place and then counts itself. The program that counts last adds all
# shares in their order, so the order does not depend on which program that is.
COUNTERS = tl.constexpr(1024)  # tiles that may be split


@triton.jit
def add_shares(total, memory, share, shares, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum over all shares of a tile [ROWS, COLUMNS], and a mask that is true in the program that has the sum."""
    tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tiles = tl.num_programs(0) * tl.num_programs(1)
    counter = memory.to(tl.pointer_type(tl.int32)) + tile
    sums = memory + COUNTERS
    place = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(sums + (share * tiles + tile).to(tl.int64) * (ROWS * COLUMNS) + place, total)
    tl.debug_barrier()  # all threads have written before one of them counts
    before = tl.atomic_add(counter, 1, sem="acq_rel")
    if before == shares - 1:
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for other in range(shares):
            # .cg: from the L2 cache, where the other programs' values are
            at = sums + (other * tiles + tile).to(tl.int64) * (ROWS * COLUMNS) + place
            total += tl.load(at, cache_modifier=".cg")
        tl.store(counter, 0)  # for the next launch on this stream
    return total, place * 0 + before == shares - 1


def number_of_shares(tiles: int, at_once: int, steps: int) -> int:
    """How many programs share the `steps` of the loop of each tile, so that all end soonest; each has a step at least.

    A card runs `at_once` programs in a round. A round takes as long as the steps of a program and about four more.

    One share on AMD: on CDNA (MI200, MI300) Triton 3.6 to 3.9 compiles the barrier to `s_barrier` alone, and the wave
    that counts waits for its own stores only, so the last program could read a share before another wave's part of it
    is there. LLVM says that its fences do not cover the stores of other waves (llvm-project pull request 161638).
    """
    if torch.version.hip or tiles > COUNTERS.value:
        return 1
    most = max(1, min(2 * at_once // tiles, steps // 4))

    def time(shares: int) -> int:
        rounds = -(-tiles * shares // at_once)
        return rounds * (-(-steps // shares) + 4)

    shares = min(range(1, most + 1), key=time)
    per_share = -(-steps // shares)
    return -(-steps // per_share)


def shared_launch(
    kernel: Any,
    device: torch.device,
    grid: tuple[int, int],
    numbers: tuple[int, ...],
    tile: Tile,
    steps: int,
    numel: int,
    types: Sequence[torch.dtype],
    unspecialized: tuple[int | float, ...] = (),
    **constants: Any,
) -> Launch:
    """A launch of a kernel that adds shares, in its `memory`, with tensors of these types.

    Several programs share the `steps` of a loop, for each tile of `numel` elements of a result. Their number is the
    third dimension of the grid and the last of the numbers.
    """
    tiles = grid[0] * grid[1]

    def with_shares(shares: int) -> Launch:
        split = {**constants, "SPLIT": shares > 1}
        launch = Launch(kernel, device, (*grid, shares), (*numbers, shares), tile, fuse=True, **split)
        if shares > 1:
            launch.sums = COUNTERS.value + shares * tiles * numel
        return launch

    launch = with_shares(number_of_shares(tiles, PROGRAMS, steps))
    if launch.sums:
        at_once = launch.programs_at_once(types, unspecialized)
        launch = with_shares(number_of_shares(tiles, at_once, steps))
    return launch
