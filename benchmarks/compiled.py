"""Compile a launch for any card without having one, and read from the machine code what it will cost.

`recorded` catches what the launch functions would run; `compile_launch` builds it as the JIT would, with the same
constants and alignment hints, and counts registers, spills and instructions. The tools come inside Triton's wheel.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_qlora.kernels.triton import launch

# Shared memory one block may ask for, by compute capability (CUDA C++ programming guide, technical specifications).
SHARED_LIMIT = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
SHARED_LIMIT_AMD = 64
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion", "maxnreg", "waves_per_eu"}


@dataclass
class Launch:
    """One call `kernel[grid](*args, **kwargs)` that a launch function made."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


@dataclass
class Report:
    """What the machine code of a launch needs."""

    registers: int = 0
    spill_bytes: int = 0
    local_operations: int = 0
    shared_kib: float = 0.0
    shared_limit_kib: int = 0
    instructions: int = 0
    loop_instructions: int = 0
    warnings: list[str] = field(default_factory=list)


@contextmanager
def recorded(target: str) -> Iterator[list[Launch]]:
    """Within it no kernel runs: the launches, with the target's tiles, are listed instead."""
    launches: list[Launch] = []
    run = triton.JITFunction.run
    real_target = launch.target

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if warmup:  # the same launch follows
            return
        options = {name: kwargs.pop(name) for name in OPTIONS & set(kwargs)}
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        launches.append(Launch(kernel, grid, arguments, options))

    triton.JITFunction.run, launch.target = record, lambda device: target
    try:
        yield launches
    finally:
        triton.JITFunction.run, launch.target = run, real_target


def source(launch: Launch, target: str) -> ASTSource:
    """The launch as the JIT would specialize it: types, constants, ones, and what is divisible by 16.

    On AMD also which tensors are smaller than 2 GiB: they are read with buffer instructions.
    """
    signature = {}
    constants = {}
    hints = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if (
            parameter.is_constexpr
            or value is None
            or (type(value) is int and value == 1 and not parameter.do_not_specialize)
        ):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            hints[(index,)] = _divisibility(value.data_ptr())
            if target.startswith("gfx") and value.untyped_storage().size() < 2**31:
                hints[(index,)].append(["tt.pointer_range", 32])
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if not parameter.do_not_specialize:
                hints[(index,)] = _divisibility(value)
        else:
            signature[parameter.name] = "fp32"
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=hints)


def _divisibility(number: int) -> list[Any]:
    """The JIT's hint; an empty one too is a part of the key in Triton's cache."""
    return [] if number % 16 else [["tt.divisibility", 16]]


def compile_launch(launch: Launch, target: str) -> Report:
    """Compile for "sm_90", "gfx942", ... and read the result; raises what the compiler raises."""
    target = target.split()[0]  # without the name of a card
    if target.startswith("sm_"):
        arch = int(target[3:])
        compiled = triton.compile(source(launch, target), target=GPUTarget("cuda", arch, 32), options=launch.options)
        report = _read_nvidia(compiled, arch)
        report.shared_limit_kib = SHARED_LIMIT.get(arch, min(SHARED_LIMIT.values()))
    else:
        compiled = triton.compile(source(launch, target), target=GPUTarget("hip", target, 64), options=launch.options)
        report = _read_amd(compiled.asm["amdgcn"])
        report.shared_limit_kib = SHARED_LIMIT_AMD
    report.shared_kib = compiled.metadata.shared / 1024
    return report


def _read_nvidia(compiled: Any, arch: int) -> Report:
    # Triton drops what `ptxas -v` says, the one place where spilled bytes are told: ask again.
    tool = (
        knobs.nvidia.ptxas_blackwell if arch >= 90 and hasattr(knobs.nvidia, "ptxas_blackwell") else knobs.nvidia.ptxas
    )
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        cubin = Path(folder) / "kernel.cubin"
        ptx.write_text(compiled.asm["ptx"])
        cubin.write_bytes(compiled.asm["cubin"])
        command = [
            tool.path,
            "-v",
            f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}",
            str(ptx),
            "-o",
            f"{folder}/again",
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        listing = subprocess.run(
            [knobs.nvidia.nvdisasm.path, "-c", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
    instructions, longest_loop = _instructions(listing)
    return Report(
        registers=int(re.search(r"Used (\d+) registers", said)[1]),
        spill_bytes=sum(int(found) for found in re.findall(r"(\d+) bytes spill", said)),
        local_operations=sum(name.split(".")[0] in ("LDL", "STL") for name in instructions),
        instructions=len(instructions),
        loop_instructions=longest_loop,
        warnings=[line.strip() for line in said.splitlines() if "serialized" in line or "warning" in line.lower()],
    )


_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][A-Z0-9_.]*)([^;]*)")


def _instructions(listing: str) -> tuple[list[str], int]:
    """The names of the instructions, without padding, and the length of the longest loop.

    Code that waits for a barrier may stand behind the end of the kernel: a loop of at most four instructions, and
    directly after it a jump back to where the kernel goes on, which is no loop.
    """
    names = []
    labels = {}
    longest = 0
    waited = -1
    for line in listing.splitlines():
        if label := re.match(r"^(\.L_[\w.]+):", line.strip()):
            labels[label[1]] = len(names)
        elif found := _INSTRUCTION.match(line):
            name, operands = found.groups()
            goal = re.search(r"\.L_[\w.]+", operands) if name.startswith("BRA") else None
            if goal and goal[0] in labels and len(names) != waited:
                length = len(names) - labels[goal[0]]
                longest = max(longest, length)
                waited = len(names) if length <= 4 else -1
            if name not in ("NOP", "BRA", "EXIT"):
                names.append(name)
    return names, longest


def _read_amd(assembly: str) -> Report:
    def figure(pattern: str) -> int:
        match = re.search(pattern + r":\s+(\d+)", assembly)
        return int(match[1]) if match else 0

    instructions = re.findall(r"^\t(?:[vs]|ds|global|buffer|flat|scratch)_\w+", assembly, re.MULTILINE)
    return Report(
        registers=figure(r"\.vgpr_count"),
        # Not scalar registers: they are kept in lanes of a vector register, and no memory is used.
        spill_bytes=max(4 * figure(r"\.vgpr_spill_count"), figure(r"\.private_segment_fixed_size")),
        instructions=len(instructions),
    )
