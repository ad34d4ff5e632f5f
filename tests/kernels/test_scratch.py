import torch

from lightning_qlora.kernels import scratch


def test_a_captured_graph_gets_memory_of_its_own(monkeypatch):
    """Its replays would use a buffer that was freed or is not zero; a stand-in for the card, whose tensors are here."""
    made = []
    for name in ("empty", "zeros"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, make=make, device, **k: made.append(make(*a, **k)) or made[-1])
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    scratch.release()
    card = torch.device("cuda", 0)
    ones = [scratch.scratch(4, torch.float32, card, "shares", zero=True) for _ in range(2)]
    assert ones[0] is not ones[1] and ones[0] is made[0] and not ones[1].any()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    others = [scratch.scratch(4, torch.float32, card, "shares", zero=True) for _ in range(2)]
    assert others[0] is others[1] and all(others[0] is not one for one in ones)
    scratch.release()
