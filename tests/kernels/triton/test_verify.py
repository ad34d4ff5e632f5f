"""The check of a backend in the kernels, which is right, and in kernels that are broken on purpose."""

import shutil
from importlib import util
from itertools import islice
from pathlib import Path

import pytest
import torch
from triton.runtime import interpreter

from lightning_qlora.kernels import backends, self_test
from lightning_qlora.kernels import triton as kernels
from tests.kernels import verify
from tests.kernels.test_verdict import train, train_by_eager
from tests.kernels.triton.interpreter import CONVERT, DOT
from tests.kernels.triton.launches import MODULES, forget_launches

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _forget():
    """No prepared launches of kernels that a test replaced, and no failures."""
    for clear in (backends._backends.clear, forget_launches):
        clear()
    yield
    for clear in (backends._backends.clear, forget_launches):
        clear()


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Replaces a function of a module by that of a copy of the module's file with another text."""

    def replace(name, function, old, new, where=kernels):
        text = Path(MODULES[name].__file__).read_text()
        shutil.copy(Path(MODULES[name].__file__).with_name("tiles.json"), tmp_path)
        assert old in text
        file = tmp_path / f"broken_{len(list(tmp_path.iterdir()))}.py"
        file.write_text(text.replace(old, new))
        spec = util.spec_from_file_location(file.stem, file)
        copy = util.module_from_spec(spec)
        spec.loader.exec_module(copy)
        monkeypatch.setattr(where, function, getattr(copy, function))

    return replace


@pytest.mark.parametrize("op", verify.OPS)
def test_the_kernels_are_right(op):
    assert verify.fault(kernels, CPU, op) is None


def test_the_self_test_finds_nothing():
    assert not any(self_test.faults(kernels, CPU).values())


ROWS = "inside = (row < end)[:, None]"
COLUMNS = f"{ROWS} & (column < k)[None, :]"
CAST = "tl.store(cast + place, inputs"
TWICE = "tl.store(cast + place, (2 * inputs.to(tl.float32)).to(cast.dtype.element_ty)"


@pytest.mark.parametrize(
    ("name", "function", "old", "new", "where", "op", "number", "text"),
    [
        ("quantize", "dequantize", "mask=mask)\n\n", "mask=mask | True)\n\n", "", "dequantize", 2, "writes past"),
        ("quantize", "quantize", "mask=i < n)\n\n", "mask=i == i)\n\n", "", "quantize", 0, "writes past"),
        ("quantize", "quantize", "rank += (scaled", "rank += undefined + (scaled", "", "quantize", 0, "Error: "),
        ("lora_products", "lora_up", "total *= s\n", "total *= 1.03 * s\n", "linear", "linear_into", 1, "differs"),
        (
            "adapter_sums",
            "sum_over_columns",
            COLUMNS,
            f"{ROWS} & (column >= 0)[None, :]",
            "lora_products",
            "lora_project",
            1,
            "differs",
        ),
        ("adapter_sums", "sum_over_columns", CAST, TWICE, "lora_products", "lora_project", 10, "differs"),
        ("lora_products", "finish", "total + sums", "sums", "linear", "linear_into", 10, "differs"),
        (
            "matmul",
            "matmul",
            "row[:, None] < n, other=0",
            "row[:, None] >= 0, other=0",
            "linear",
            "linear_into",
            2,
            None,
        ),
        (
            "matmul",
            "matmul",
            "mask=write)\n\n",
            "mask=write | True)\n\n",
            "linear",
            "linear_into",
            2,
            "writes past",
        ),
        ("grouped", "grouped_linear", "+= added * s", "+= added * (1.05 * s)", "", "grouped_linear", 0, "differs"),
    ],
)
def test_faults(monkeypatch, broken, name, function, old, new, where, op, number, text):
    """Also a mask of what nothing reads, which is no fault."""
    broken(name, function, old, new, MODULES[where] if where else kernels)
    found = verify.fault_in(next(islice(verify.cases(op), number, None)), kernels, CPU, op, [])
    assert found is None if text is None else text in found


def test_a_run_is_that_of_a_cpu_even_if_a_launch_fails_after_another_one_of_its_op(monkeypatch, recwarn):
    """The adapter's product is then in the output already."""
    expected = train_by_eager()
    assert train() == pytest.approx(expected, rel=1e-3) and not backends.backend(CPU).failures
    run = MODULES["launch"].Launch._launch_by_triton
    calls = []

    def fails_later(self, *arguments):
        calls.append(self._kernel.__name__)
        if calls[-1] == "_matmul_kernel" and calls.count("_matmul_kernel") > 2:
            raise RuntimeError("out of resource: shared memory")
        return run(self, *arguments)

    monkeypatch.setattr(MODULES["launch"].Launch, "_launch_by_triton", fails_later)
    assert train() == pytest.approx(expected, rel=1e-3)
    assert backends.backend(CPU).failures == {"linear_into": "RuntimeError: out of resource: shared memory"}
    assert len(recwarn) == 1 and calls.count("_matmul_kernel") == 3


def test_what_the_interpreter_makes_of_bf16_without_the_repairs_is_a_fault(monkeypatch):
    """It multiplies the bits: errors of 1e9 and more."""
    monkeypatch.setattr(interpreter, "_convert_float", CONVERT)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", DOT)
    arguments = next(islice(verify.cases("linear_into"), 2, None))
    assert "e+" in verify.fault_in(arguments, kernels, CPU, "linear_into", [])
