import pytest
import torch

from lightning_qlora.merging.rounding import round_at_random


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_the_type_holds_stays(dtype):
    weight = torch.cat([torch.randn(4096), torch.zeros(3), torch.tensor([1.0, -2.0, 0.5, 1e-3])]).to(dtype)
    assert torch.equal(round_at_random(weight.float(), dtype, "a"), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 1e-2, 2e-7])
def test_the_mean_is_kept_and_the_error_is_within_a_step(dtype, size):
    """A change of a tenth of a step, which rounding to the nearest would lose altogether."""
    base = (torch.randn(1 << 16).abs() + 0.5).mul(size).to(dtype).float()
    step = torch.nextafter(base.to(dtype), torch.full_like(base, 9).to(dtype)).float() - base
    moved = base + 0.1 * step
    assert torch.equal(moved.to(dtype).float(), base)
    rounded = round_at_random(moved, dtype, "a").float()
    assert ((rounded - moved).abs() <= step * 1.001).all()
    kept = ((rounded - base).sum() / (moved - base).sum()).item()
    assert kept == pytest.approx(1, abs=0.1)


def test_the_same_name_rounds_the_same():
    weight = torch.randn(64, 64)
    first, again, other = (round_at_random(weight, torch.bfloat16, name) for name in ("a", "a", "b"))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert round_at_random(weight, torch.float32, "a") is weight
