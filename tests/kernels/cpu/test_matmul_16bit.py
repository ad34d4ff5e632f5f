"""The speed of 16-bit products: both kinds of processors, from wherever it is asked for."""

import threading

import pytest
import torch

from lightning_qlora.kernels.cpu import matmul_16bit as module
from lightning_qlora.kernels.cpu.matmul_16bit import Products, products
from tests.machines.products import measured

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch):
    """This processor, which nothing was measured of."""
    monkeypatch.setattr(module, "_measured", measured)
    measured.cache_clear()
    yield
    measured.cache_clear()


@pytest.fixture
def without_onednn():
    with torch.backends.mkldnn.flags(enabled=False):
        yield


@pytest.mark.parametrize("dtype", HALVES)
def test_without_onednn_sixteen_bits_are_slow(dtype, without_onednn):
    measured = products(dtype)
    assert measured.slowdown > module.SLOW
    assert measured.is_slow
    assert f"{measured.slowdown:.0f} times as long as in fp32" in str(measured)


@pytest.mark.skipif(
    not (torch.backends.mkldnn.enabled and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="oneDNN has no products of bf16 for this processor",
)
def test_with_onednn_bf16_is_fast():
    measured = products(torch.bfloat16)
    assert measured.slowdown < module.SLOW
    assert measured.error <= 0.51 or torch.backends.cpu.get_cpu_capability().startswith("SVE")


def test_the_limits_and_the_text():
    for values, slow, text in (
        ((15.0, 0.75), False, "matmuls are fast and rounded once (error 0.8 eps)"),
        ((15.4, 0.5), True, "a matmul takes 15 times as long as in fp32"),
        ((1.0, 0.76), True, "the sums of a matmul are rounded several times (error 0.8 eps; 0.5 with one rounding)"),
    ):
        measured = Products(*values)
        assert (measured.is_slow, str(measured)) == (slow, text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int16, torch.float8_e4m3fn])
def test_only_floats_of_16_bits_are_measured(dtype, monkeypatch):
    monkeypatch.setattr(module, "_measure", lambda _: pytest.fail("measured"))
    assert products(dtype) == Products(1.0, 0.5)


def test_it_is_measured_once_for_each_type_and_with_and_without_onednn(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "_measure", lambda dtype: calls.append(dtype) or Products(1.0, 0.5))
    for _ in range(2):
        assert not products(torch.bfloat16).is_slow
    assert calls == [torch.bfloat16]
    with torch.backends.mkldnn.flags(enabled=not torch.backends.mkldnn.enabled):
        products(torch.bfloat16)
    assert calls == [torch.bfloat16] * 2


def test_sums_that_are_rounded_between_blocks_count_as_slow(monkeypatch):
    """As torch 2.10 has them on ARM with bf16 instructions."""

    def rounded_between_blocks(x, weight):
        total = 0
        for rows, columns in zip(x.split(256, 1), weight.split(256, 0), strict=True):
            total = total + (rows.double() @ columns.double()).to(x.dtype)
        return total

    exact = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor,
        "__matmul__",
        lambda x, weight: exact(x, weight) if x.dtype == torch.float64 else rounded_between_blocks(x, weight),
    )
    monkeypatch.setattr(module, "_seconds", lambda *_: 1.0)
    measured = products(torch.bfloat16)
    assert measured.slowdown == 1.0
    assert measured.is_slow
    assert "rounded several times" in str(measured)


@pytest.mark.parametrize(
    "context",
    [
        torch.inference_mode,
        torch.no_grad,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),
        lambda: torch._subclasses.FakeTensorMode(),
    ],
    ids=["inference_mode", "no_grad", "autocast", "meta", "fake"],
)
def test_it_measures_the_same_in_every_context_of_torch(context, without_onednn):
    with context():
        assert products(torch.bfloat16).is_slow


def test_other_settings_of_torch_do_not_matter_and_do_not_change(without_onednn):
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    random = torch.get_rng_state()
    threads = torch.get_num_threads()
    try:
        assert products(torch.bfloat16).is_slow
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_num_threads() == threads
    other = []
    thread = threading.Thread(target=lambda: other.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert other == [threads]


def test_a_compiled_function_takes_the_measured_value_as_a_constant(without_onednn):
    @torch.compile(fullgraph=True, backend="eager")
    def double_if_slow(x):
        return x * 2 if products(torch.bfloat16).is_slow else x

    assert double_if_slow(torch.ones(3)).tolist() == [2.0] * 3
