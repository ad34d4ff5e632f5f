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


@pytest.mark.parametrize("reason", ["No module named 'triton'", "libtriton.so: undefined symbol: x"])
def test_where_triton_cannot_be_imported_a_gpu_gets_the_eager_path_and_the_user_hears_why_once(
    monkeypatch, recwarn, reason
):
    def fail(name):
        raise ImportError(reason)

    monkeypatch.setattr(backends, "import_module", fail)
    assert backends.backend(CUDA) is cpu
    assert backends.backend(CUDA) is cpu
    assert [f"Triton cannot be imported ({reason})" in str(warning.message) for warning in recwarn] == [True]
