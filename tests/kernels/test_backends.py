import pytest
import torch

from lightning_qlora.kernels import backends, eager

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def forget():
    backends._triton.cache_clear()
    yield
    backends._triton.cache_clear()


@pytest.fixture
def kernels():
    pytest.importorskip("triton")
    from lightning_qlora.kernels import triton

    return triton


def test_a_gpu_gets_the_kernels_after_one_trial_launch_and_a_cpu_the_eager_path(monkeypatch, kernels):
    tried = []
    monkeypatch.setattr(backends, "INTERPRETED", False)
    monkeypatch.setattr(kernels, "check_launch", tried.append)
    assert backends.backend(CUDA) is backends.backend(CUDA) is kernels
    assert tried == [CUDA]
    assert backends.backend(torch.device("cpu")) is eager


@pytest.mark.parametrize("reason", ["No module named 'triton'", "libtriton.so: undefined symbol: x"])
def test_without_triton_a_gpu_gets_the_eager_path_and_one_warning_with_the_reason(monkeypatch, recwarn, reason):
    def fail(name):
        raise ImportError(reason)

    monkeypatch.setattr(backends, "import_module", fail)
    assert backends.backend(CUDA) is eager
    assert backends.backend(CUDA) is eager
    assert [f"ImportError: {reason}" in str(warning.message) for warning in recwarn] == [True]


def test_a_failing_first_launch_gives_the_eager_path_and_a_warning_for_each_device(monkeypatch, recwarn, kernels):
    """As in a container without a C compiler, or on a card that Triton does not support."""

    def fail(device):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(kernels, "check_launch", fail)
    other = torch.device("cuda", 1)
    assert [backends.backend(device) for device in (CUDA, CUDA, other)] == [eager] * 3
    assert ["cuda:0" in str(w.message) or "cuda:1" in str(w.message) for w in recwarn] == [True, True]
    assert "Failed to find C compiler" in str(recwarn[0].message)


def test_the_trial_launch_raises_what_the_driver_raises(kernels):
    """Here there is no GPU, or one on which it runs."""
    if torch.cuda.is_available():
        return kernels.check_launch(CUDA)
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA|HIP"):
        kernels.check_launch(CUDA)
    return None
