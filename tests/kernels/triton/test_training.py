"""Training through the public op with every kernel interpreted, against the reference backend."""

import pytest
import torch

from lightning_qlora.kernels import ops, reference
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.kernels.lora_linear import lora_linear


def losses(p: float, steps: int = 10, dtype: torch.dtype = torch.float32, rows: int = 24) -> list[float]:
    """A two-layer model learns a fixed target: only adapters and biases train."""
    draw = torch.Generator().manual_seed(0)
    sizes = [(128, 64), (16, 128)]
    weights = [ops.quantize(torch.randn(size, generator=draw) / 8).to_bytes() for size in sizes]
    biases = [torch.zeros(size[0], requires_grad=True) for size in sizes]
    a = [(torch.randn(4, size[1], generator=draw) / 8).requires_grad_() for size in sizes]
    b = [(torch.randn(size[0], 4, generator=draw) / 8).requires_grad_() for size in sizes]
    optimizer = torch.optim.AdamW([*a, *b, *biases], lr=1e-2)
    x = torch.randn(rows, 64, generator=draw).to(dtype)
    target = torch.randn(rows, 16, generator=draw)
    found = []
    for step in range(steps):
        hidden = x
        for layer in range(2):
            seed = torch.tensor([1000 * step + layer]) if p else None
            hidden = lora_linear(hidden, weights[layer], biases[layer], LoRA(a[layer], b[layer], 0.5, p, seed))
            hidden = torch.relu(hidden) if layer == 0 else hidden
        loss = torch.nn.functional.mse_loss(hidden.float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_ten_steps_equal_the_reference(monkeypatch, p):
    ours = losses(p)
    monkeypatch.setattr(ops, "backend", lambda device: reference)
    theirs = losses(p)
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert ours[-1] < ours[0]
