"""A driver for Triton that executes launches on the CPU: `with emulated("sm_80"): kernel[grid](...)`.

Everything before the driver is what runs on a machine with a card: Triton's JIT with its hints, its cache, its compiler
and the launches of `kernels/triton/launch.py`. For NVIDIA the last stage, ptxas, is left out.
"""

import struct
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from lightning_qlora.kernels.triton import launch
from tests.emulator import accesses, arithmetic, tensor_cores, warps  # noqa: F401  they enter their instructions
from tests.emulator.machine import run
from tests.emulator.program import Program
from tests.kernels.triton.launches import forget_launches

SHARED = {"cuda": 227 * 1024, "hip": 64 * 1024}  # of a block, at most
PROGRAMS = {}


@dataclass
class Emulation:
    """What ran.

    Attributes:
        target: "sm_80", "sm_90", ... or "gfx942", "gfx1100", ...
        reachable: Gives the tensors that kernels reach without getting them as arguments, through tables of addresses.
        change: Changes the code before it runs, to see that a bug in it is noticed.
    """

    target: str
    reachable: Callable[[], list[Tensor]] = list
    change: Callable[[bytes], bytes] | None = None


@contextmanager
def emulated(target):
    """Within it, launches of Triton kernels with CPU tensors are compiled for the target and executed.

    `torch.version.hip` says which company the card is from. A kernel that does what it must not do raises
    `memory.Fault`, an instruction that is not known `machine.UnknownInstruction`.
    """
    emulation = Emulation(target)
    before = driver._active, launch.target, knobs.runtime.add_stages_inspection_hook, torch.version.hip
    launch.address_of = _Address
    driver.set_active(EmulatedDriver(emulation))
    launch.target = lambda device: target
    knobs.runtime.add_stages_inspection_hook = _without_ptxas
    torch.version.hip = "emulated" if _target(target).backend == "hip" else None
    forget_launches()
    try:
        yield emulation
    finally:
        driver._active, launch.target, knobs.runtime.add_stages_inspection_hook, torch.version.hip = before
        launch.address_of = Tensor.data_ptr
        forget_launches()


def _without_ptxas(*stages):
    """Triton's hook: with arguments it may change the stages, without any it gives a key for the cache, twice."""
    if not stages:
        return "emulator", "emulator"
    if "cubin" in stages[1]:
        stages[1]["cubin"] = lambda source, metadata: source.encode()
    return None


def _target(name):
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)


class Launcher:
    """Takes the launches of one compiled kernel. Triton keeps it longer than an emulation."""

    def __init__(self, source, metadata):
        self._source, self._metadata = source, metadata

    def __call__(self, x, y, z, stream, code, *rest):
        _, _, _, _, *arguments = rest  # the metadata of the kernel and of the launch, and two hooks
        _launch(driver.active.emulation, self._source, self._metadata, (x, y, z), code, arguments)


class EmulatedDriver:
    """What Triton asks of a driver."""

    launcher_cls = Launcher

    def __init__(self, emulation):
        self.emulation = emulation
        target = self.get_current_target()
        properties = {"max_shared_mem": SHARED[target.backend], "warpSize": target.warp_size}
        properties |= {"multiprocessor_count": 4, "max_num_regs": 65536}
        self.utils = SimpleNamespace(
            load_binary=lambda name, code, *_: (1, code, 32, 0, 1024),  # the code is its own handle
            unload_module=lambda *_: None,
            get_device_properties=lambda _: properties,
        )
        # A number for each target: Triton keeps the kernels of a device.
        self._number = 1000 + int.from_bytes(emulation.target.encode(), "big")

    def get_current_device(self):
        return self._number

    def set_current_device(self, _):
        pass

    def get_current_stream(self, _):
        return 0

    def get_current_target(self):
        return _target(self.emulation.target)

    def get_active_torch_device(self):
        return torch.device("cpu")


class _Address(int):
    """The address of a tensor, which says how long the tensor is."""

    def __new__(cls, tensor):
        address = super().__new__(cls, tensor.data_ptr())
        address.tensor = tensor
        return address


def _launch(emulation, source, metadata, grid, code, arguments):
    code = emulation.change(code) if emulation.change else code
    kinds = list(source.signature.values())
    arguments = [getattr(value, "tensor", value) for value in arguments]
    given = [(kind, value) for kind, value in zip(kinds, arguments, strict=True) if kind != "constexpr"]
    tensors = [value for _, value in given if isinstance(value, Tensor)] + emulation.reachable()
    ranges = [extent(tensor) for tensor in tensors if tensor.numel()]
    threads = metadata.num_warps * metadata.warp_size
    values = [*(_bytes(kind, value) for kind, value in given), bytes(8), bytes(8)]  # the last two: no scratch memory
    execute, make = run, lambda: Program(code.decode())
    if _target(emulation.target).backend == "cuda":
        values = [int.from_bytes(value, "little") for value in values]
    else:  # these need tinygrad; two of them enter their instructions
        machine, *_ = (import_module(f"tests.emulator.amd.{name}") for name in ("machine", "accesses", "lanes"))
        execute, make = machine.run, lambda: machine.Program(code, emulation.target)
    if code not in PROGRAMS:
        PROGRAMS[code] = make()
    execute(PROGRAMS[code], grid, threads, metadata.shared, values, ranges)


def _bytes(kind, value):
    """An argument as the bytes of a parameter. An address of 0 is none."""
    if kind.startswith("*"):
        return (value.data_ptr() if isinstance(value, Tensor) else value or 0).to_bytes(8, "little")
    if kind == "fp32":
        return struct.pack("<f", value)
    size = max(int(kind[1:]) // 8, 1)
    return (int(value) & (1 << 8 * size) - 1).to_bytes(size, "little")


def extent(tensor):
    """The addresses from the first to the last element."""
    last = sum((size - 1) * abs(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
