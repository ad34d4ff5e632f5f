import pytest
import torch

from lightning_qlora.kernels import cpu, ops

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def forget():
    ops._triton.cache_clear()
    yield
    ops._triton.cache_clear()


def test_a_gpu_gets_the_kernels_and_a_cpu_the_eager_path(monkeypatch):
    monkeypatch.setattr(ops, "INTERPRETED", False)
    pytest.importorskip("triton")
    assert ops.backend(CUDA).__name__ == "lightning_qlora.kernels.triton"
    assert ops.backend(torch.device("cpu")) is cpu


def test_without_triton_a_gpu_gets_the_eager_path_and_the_user_hears_it_once(monkeypatch, recwarn):
    monkeypatch.setattr(ops, "find_spec", lambda name: None)
    assert ops.backend(CUDA) is cpu
    assert ops.backend(CUDA) is cpu
    assert ["Triton is not installed" in str(warning.message) for warning in recwarn] == [True]
