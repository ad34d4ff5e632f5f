from threading import Thread

import pytest
import torch

from lightning_qlora.kernels import scratch


@pytest.fixture
def made(monkeypatch):
    """The buffers that are allocated: a stand-in for the card, whose tensors are here, full of ones."""
    made = []
    monkeypatch.setattr(torch, "empty", lambda *a, device, **k: made.append(torch.ones(*a, **k)) or made[-1])
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    scratch.release()
    yield made
    scratch.release()


def test_each_thread_device_stream_and_purpose_has_a_buffer(made, monkeypatch):
    """Kernels of two streams run at the same time; those of one stream run one after the other."""
    cards = [torch.device("cuda", index) for index in (0, 1)]
    first = scratch.scratch(8, torch.float32, cards[0])
    assert scratch.scratch(4, torch.float32, cards[0]).data_ptr() == first.data_ptr() and len(made) == 1
    scratch.scratch(8, torch.float32, cards[1])
    scratch.scratch(8, torch.float32, cards[0], "dropped")
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 8)
    scratch.scratch(8, torch.float32, cards[0])
    thread = Thread(target=scratch.scratch, args=(8, torch.float32, cards[0]))
    thread.start()
    thread.join()
    assert len(made) == len({buffer.data_ptr() for buffer in made}) == 5


def test_a_captured_graph_gets_memory_of_its_own(made, monkeypatch):
    """Its replays would use a buffer that was freed or whose counters are not zero; sums are not set to zero."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    card = torch.device("cuda", 0)
    ones = [scratch.scratch(4, torch.int32, card, "shares", 2) for _ in range(2)]
    assert ones[0] is not ones[1] and ones[0] is made[0] and ones[1].tolist() == [0, 0, 1, 1]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    others = [scratch.scratch(4, torch.int32, card, "shares", 2) for _ in range(2)]
    assert others[0] is others[1] and all(others[0] is not one for one in ones)
    assert [(one.dtype, one.shape) for one in (*ones, others[0])] == 3 * [(torch.int32, (4,))]
