from contextlib import contextmanager
from threading import get_ident

import pytest
import torch

from lightning_qlora.quantization.kept_memory import kept


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "meta"])
def test_without_a_gpu_nothing_else_runs(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", None)
    assert kept(get_ident, device) == get_ident()


def test_on_a_gpu_another_thread_makes_it_on_the_stream_of_the_caller(monkeypatch):
    streams = []

    @contextmanager
    def use(stream):
        streams.append(stream)
        yield
        streams.append("end")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the caller's on {device}")
    monkeypatch.setattr(torch.cuda, "stream", use)
    assert kept(lambda: (get_ident(), [*streams]), "cuda:1")[1] == ["the caller's on cuda:1"]
    assert streams == ["the caller's on cuda:1", "end"]
    assert kept(get_ident, "cuda") != get_ident()


def test_an_error_of_the_other_thread_is_raised(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)

    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        kept(fail, "cuda")
