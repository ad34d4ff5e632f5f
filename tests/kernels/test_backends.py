import pytest
import torch

from lightning_qlora.kernels import backends, cpu

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def forget():
    backends._triton.cache_clear()
    yield
    backends._triton.cache_clear()


def test_a_gpu_gets_the_kernels_and_a_cpu_the_eager_path(monkeypatch):
    monkeypatch.setattr(backends, "INTERPRETED", False)
    pytest.importorskip("triton")
    assert backends.backend(CUDA).__name__ == "lightning_qlora.kernels.triton"
    assert backends.backend(torch.device("cpu")) is cpu


def test_without_triton_a_gpu_gets_the_eager_path_and_the_user_hears_it_once(monkeypatch, recwarn):
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert backends.backend(CUDA) is cpu
    assert backends.backend(CUDA) is cpu
    assert ["Triton is not installed" in str(warning.message) for warning in recwarn] == [True]
