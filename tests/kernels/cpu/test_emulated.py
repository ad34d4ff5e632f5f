"""The C kernels of processors that this machine does not have, compiled for them and run by qemu.

Decoded and quantized bytes and dropout masks are those of the reference; a layer's output is within fp32's rounding.
"""

import shutil
import struct
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch

from lightning_qlora.kernels import reference
from lightning_qlora.kernels.cpu import build, library
from lightning_qlora.kernels.ops import LoRA
from lightning_qlora.quantization import blockwise
from tests.kernels.cpu.test_library import DTYPES, TOLERANCES

pytestmark = pytest.mark.slow
SHAPES = [(1, 1), (3, 5), (37, 101), (16, 720), (8, 1376), (70, 2112)]
# name -> compiler, its flags, qemu with the processor
MACHINES = {
    "Haswell": ("gcc", ("-march=haswell",), ("qemu-x86_64-static", "-cpu", "Haswell")),
    "x86-64": ("gcc", ("-march=x86-64",), ("qemu-x86_64-static", "-cpu", "Haswell")),
    "ARM": ("aarch64-linux-gnu-gcc", ("-march=armv8-a",), ("qemu-aarch64-static", "-cpu", "cortex-a72")),
    "ARM with bf16": (
        "aarch64-linux-gnu-gcc",
        ("-march=armv8.4-a+sve+fp16+bf16",),
        ("qemu-aarch64-static", "-cpu", "neoverse-v1"),
    ),
}
FORMS = {"Haswell": "AVX2", "x86-64": "plain C", "ARM": "NEON", "ARM with bf16": "NEON"}


class Calls:
    """The input file of driver.c, and what it must write."""

    def __init__(self) -> None:
        self.input = bytearray()
        self.checks = []  # bytes of an output, and a function of these bytes that asserts

    def add(self, function, *arguments):
        for argument in (function, 2, *arguments):  # two threads
            if isinstance(argument, torch.Tensor):
                data = raw(argument)
                self.input += struct.pack("<q", len(data)) + data
            elif argument is None:
                self.input += struct.pack("<q", 0)
            elif isinstance(argument, float):
                self.input += struct.pack("<fi", argument, 0)
            else:
                self.input += struct.pack("<q", argument)

    def expect(self, *tensors):
        for tensor in tensors:
            self.checks.append((tensor.numel() * tensor.element_size(), partial(equal, raw(tensor))))

    def run(self, machine, folder):
        compiler, flags, emulator = MACHINES[machine]
        for program in (compiler, emulator[0]):
            if shutil.which(program) is None:
                pytest.skip(f"no {program}")
        source = Path(__file__).with_name("driver.c")
        include = library.SOURCE.parent
        command = [compiler, *build.FLAGS, *flags, build.THREADS, "-static", f"-I{include}", source, "-o", "driver"]
        subprocess.run(command, cwd=folder, check=True)
        (folder / "input").write_bytes(self.input + struct.pack("<q", 0))
        result = subprocess.run(
            [*emulator, "./driver", "input", "output"], cwd=folder, capture_output=True, timeout=600
        )
        assert result.returncode == 0, result
        assert result.stdout.decode().strip() == FORMS[machine]
        output = (folder / "output").read_bytes()
        assert len(output) == sum(size for size, _ in self.checks)
        for size, check in self.checks:
            check(output[:size])
            output = output[size:]


def raw(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def equal(expected, output):
    assert output == expected


def close(expected, output):
    error = torch.frombuffer(bytearray(output), dtype=expected.dtype).view(expected.shape) - expected
    assert error.abs().max() <= TOLERANCES[expected.dtype] * expected.abs().max()


def fields(weight):
    """As driver.c, `weight`, reads them."""
    book = library.codebook(weight.quant_type)
    nested = weight.nested.view(torch.float32)
    scales = (nested[:-1], nested[-1:]) if nested.numel() else (None, None)
    shift = weight.block_size.bit_length() - 1
    return weight.packed, weight.absmax, scales[0], book.levels, library.dynamic_map(), scales[1], *weight.shape, shift


@pytest.mark.parametrize("machine", MACHINES)
def test_bytes_are_those_of_the_reference(machine, tmp_path):
    calls = Calls()
    for shape in SHAPES:
        for code, dtype in enumerate(DTYPES):
            x = torch.randn(shape).to(dtype)
            x.view(-1)[: min(70, x.numel() // 2)] = 0
            for quant_type, block_size, double_quant in [("nf4", 64, True), ("fp4", 32, False), ("int4", 4096, True)]:
                weight = reference.quantize(x, quant_type, block_size, double_quant)
                book = library.codebook(quant_type)
                absmax = reference.quantize(x, quant_type, block_size, False).absmax
                calls.add(2, code, x.numel(), block_size.bit_length() - 1, x, book.bounds, book.order)
                calls.expect(weight.packed, absmax)
                if double_quant:
                    nested = weight.nested.view(torch.float32)
                    places = blockwise.code_of_place()
                    calls.add(3, weight.absmax.numel(), nested[-1].item(), absmax, places)
                    calls.expect(weight.absmax, nested[:-1])
                for out_code, out_dtype in enumerate(DTYPES):
                    calls.add(1, *fields(weight), out_code)
                    calls.expect(reference.dequantize(weight, out_dtype))
            least, scale = library.dropout_threshold(0.3)
            calls.add(4, code, x.numel(), 2**61 + 12345, least, scale, x)
            calls.expect(reference.dropout(x, 0.3, torch.tensor([2**61 + 12345])))
    calls.run(machine, tmp_path)


@pytest.mark.parametrize("machine", ["Haswell", "ARM", "ARM with bf16"])
def test_few_rows_are_the_references(machine, tmp_path):
    calls = Calls()
    for shape in [(8, 1376), (5, 4096), (64, 128), (7, 96), (37, 101)]:
        for block_size, double_quant in [(32, True), (64, True), (128, False)]:
            weight = reference.quantize(torch.randn(shape) * shape[1] ** -0.5, "nf4", block_size, double_quant)
            for i, (m, r) in enumerate([(1, 16), (2, 3), (3, 64), (4, 0), (7, 17), (16, 8), (5, 1)]):
                code = (i + block_size) % 3
                dtype = DTYPES[code]
                x = torch.randn(m, shape[1]).to(dtype)
                lora = LoRA(torch.randn(r, shape[1]) * shape[1] ** -0.5, torch.randn(shape[0], r), 0.5)
                bias = torch.randn(shape[0]) if m > 1 else None
                expected = torch.empty(m, shape[0], dtype=dtype)
                reference.linear_into(expected, x, reference.lora_project(x, lora), weight, bias, lora)
                calls.add(5, *fields(weight), code, m, r, lora.scaling, x, bias, lora.a, lora.b)
                calls.checks.append((expected.nbytes, partial(close, expected)))
    calls.run(machine, tmp_path)
