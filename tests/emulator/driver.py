"""A driver for Triton that executes launches on the CPU: `with emulated("sm_80"): kernel[grid](...)`.

Everything before the driver is what runs on a machine with a card: Triton's JIT with its hints, its cache of kernels and
its compiler, and the launches of `kernels/triton/launch.py`. For NVIDIA the last stage (ptxas) is left out.
"""

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from lightning_qlora.kernels import triton as kernels
from lightning_qlora.kernels.triton import tiles
from tests.emulator import accesses, arithmetic, tensor_cores, warps  # noqa: F401  they enter their instructions
from tests.emulator.machine import run
from tests.emulator.program import Program

SHARED = 227 * 1024  # of a block, at most
PROGRAMS: dict[bytes, Program] = {}


@dataclass
class Emulation:
    """What ran.

    Attributes:
        target: "sm_80", "gfx942", ...
        reachable: Gives the tensors that kernels reach without getting them as arguments, through tables of addresses.
        change: Changes the code before it runs, to see that a bug in it is noticed.
        executed: Instructions of each kernel, one for all threads that execute it at the same time.
    """

    target: str
    reachable: Callable[[], list[Tensor]] = list
    change: Callable[[bytes], bytes] | None = None
    executed: dict[str, int] = field(default_factory=dict)


@contextmanager
def emulated(target: str) -> Iterator[Emulation]:
    """Within it, launches of Triton kernels with CPU tensors are compiled for the target and executed.

    A kernel that does what it must not do raises `memory.Fault`, an instruction that is not known
    `machine.UnknownInstruction`.
    """
    emulation = Emulation(target)
    before = driver._active, tiles.target, torch.version.hip, knobs.runtime.add_stages_inspection_hook
    driver.set_active(_driver(emulation))
    tiles.target = lambda device: target
    torch.version.hip = "emulated" if target.startswith("gfx") else None
    knobs.runtime.add_stages_inspection_hook = _without_ptxas
    _forget_launches()
    try:
        yield emulation
    finally:
        driver._active, tiles.target, torch.version.hip, knobs.runtime.add_stages_inspection_hook = before
        _forget_launches()


def _without_ptxas(*stages: Any) -> tuple[str, str] | None:
    """Triton's hook: with arguments it may change the stages, without any it gives a key for the cache, twice."""
    if not stages:
        return "emulator", "emulator"
    if "cubin" in stages[1]:
        stages[1]["cubin"] = lambda source, metadata: source.encode()
    elif "hsaco" in stages[1]:
        assemble, texts = stages[1]["hsaco"], []
        make_assembly = stages[1]["amdgcn"]

        def keep(source: Any, metadata: Any) -> str:
            texts.append(make_assembly(source, metadata))
            return texts[-1]

        stages[1]["amdgcn"] = keep
        stages[1]["hsaco"] = lambda source, metadata: texts[-1].encode() + b"\0" + assemble(source, metadata)
    return None


def _forget_launches() -> None:
    """Prepared launches hold kernels that were compiled for one target."""
    for module in iter_modules(kernels.__path__):
        for value in vars(import_module(f"{kernels.__name__}.{module.name}")).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def _target(name: str) -> GPUTarget:
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)


def _driver(emulation: Emulation) -> Any:
    """What Triton asks of a driver. The device has a number of its own for each target: Triton's caches depend on it."""
    number = 1000 + sum(ord(letter) << 8 * place for place, letter in enumerate(emulation.target))

    class EmulatedDriver:
        class launcher_cls:
            def __init__(self, source: Any, metadata: Any) -> None:
                self._source, self._metadata = source, metadata

            def __call__(self, x: int, y: int, z: int, stream: int, code: bytes, *rest: Any) -> None:
                _, _, _, _, *arguments = rest  # the metadata of the kernel and of the launch, and two hooks
                _launch(emulation, self._source, self._metadata, (x, y, z), code, arguments)

        class utils:
            load_binary = staticmethod(lambda name, code, *_: (1, code, 32, 0, 1024))
            unload_module = staticmethod(lambda *_: None)
            get_device_properties = staticmethod(
                lambda _: {"max_shared_mem": SHARED, "multiprocessor_count": 4, "warpSize": 32, "max_num_regs": 65536}
            )

        get_current_device = staticmethod(lambda: number)
        set_current_device = staticmethod(lambda _: None)
        get_current_stream = staticmethod(lambda _: 0)
        get_current_target = staticmethod(lambda: _target(emulation.target))
        get_active_torch_device = staticmethod(lambda: torch.device("cpu"))
        get_benchmarker = staticmethod(lambda: lambda call, quantiles=(): [1.0 for _ in quantiles])  # the first tile

    return EmulatedDriver()


def _launch(
    emulation: Emulation, source: Any, metadata: Any, grid: tuple[int, int, int], code: bytes, arguments: list[Any]
) -> None:
    code = emulation.change(code) if emulation.change else code
    kinds = list(source.signature.values())
    given = [(kind, value) for kind, value in zip(kinds, arguments, strict=True) if kind != "constexpr"]
    tensors = [value for _, value in given if isinstance(value, Tensor)] + emulation.reachable()
    ranges = [extent(tensor) for tensor in tensors if tensor.numel()]
    threads = metadata.num_warps * metadata.warp_size
    if code not in PROGRAMS:
        PROGRAMS[code] = _program(emulation.target, code, metadata)
    program = PROGRAMS[code]
    if isinstance(program, Program):
        values = [_bits(kind, value) for kind, value in given]
        executed = run(program, grid, threads, metadata.shared, [*values, 0, 0], ranges)  # 0: two kinds of scratch
    else:
        executed = program.launch(grid, threads, given, ranges)
    emulation.executed[source.name] = emulation.executed.get(source.name, 0) + executed


def _program(target: str, code: bytes, metadata: Any) -> Any:
    if target.startswith("sm_"):
        return Program(code.decode())
    from tests.emulator.amd.machine import MachineCode  # needs tinygrad

    assembly, _, object_code = code.partition(b"\0")
    return MachineCode(object_code, assembly.decode(), target, metadata.shared)


def _bits(kind: str, value: Any) -> int:
    """An argument as the bits of a parameter."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    if value is None:
        return 0
    if kind in ("fp32", "fp64"):
        return int.from_bytes(struct.pack("<f" if kind == "fp32" else "<d", value), "little")
    if kind in ("fp16", "bf16"):
        dtype = torch.float16 if kind == "fp16" else torch.bfloat16
        return int(torch.tensor(value, dtype=dtype).view(torch.int16).item()) & 0xFFFF
    return int(value) & (1 << 64) - 1


def extent(tensor: Tensor) -> tuple[int, int]:
    """The addresses from the first to the last element."""
    last = sum((size - 1) * abs(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
