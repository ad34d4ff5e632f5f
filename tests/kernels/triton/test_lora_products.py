import pytest
import torch

from benchmarks.products import lora_down, lora_gradients, lora_up
from lightning_qlora.kernels import reference
from lightning_qlora.kernels.scratch import scratch
from lightning_qlora.kernels.triton import launch
from lightning_qlora.kernels.triton.launch import COUNTERS
from tests.conftest import every_pair
from tests.kernels.triton.test_linear import HALVES, assert_near

# One row; a few; a whole tile and one row more; ranks below, at and above a tile; sizes that no tile divides.
SHAPES = [(1, 64, 8), (7, 100, 16), (65, 192, 33), (130, 72, 70), (64, 64, 64)]
SEEDS = [None, torch.tensor([2**40 + 7])]


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).to(dtype)


ADAPTERS = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)]
CASES = pytest.mark.parametrize(("dtype", "adapters", "seed", "shape"), every_pair(HALVES, ADAPTERS, SEEDS, SHAPES))


@CASES
def test_the_three_products(dtype, adapters, seed, shape):
    """A matrix of an adapter in both layouts: [r, n] as A, and the transpose of [n, r] as B."""
    m, n, r = shape
    adapter_dtype = adapters[0]
    x = draw(m, n, dtype=dtype)
    h = draw(m, r, dtype=dtype)
    dropped = reference.dropout(x.double(), 0.3, seed)
    for w in (draw(r, n, dtype=adapter_dtype), draw(n, r, dtype=adapter_dtype).T):
        rounded = w.to(dtype).double()
        assert_near(lora_down(x, w, 0.5, 0.3, seed).double(), 0.5 * dropped @ rounded.T, dtype)
        up = 0.5 * h.double() @ rounded
        ours = lora_up(h, w.T, torch.empty_like(x), 0.5, 0.3, seed)
        assert_near(ours.double(), reference.dropout(up, 0.3, seed), dtype)


@CASES
def test_the_gradients(dtype, adapters, seed, shape):
    """More columns of A than of B, and fewer; matrices in both layouts, of different types."""
    m, n, r = shape
    out_features = 48 if r % 16 else 130
    x = draw(m, n, dtype=dtype)
    grad_xa = draw(m, r, dtype=dtype)
    xa = draw(m, r, dtype=dtype).flip(0)
    grad = draw(m, out_features, dtype=dtype)
    dropped = reference.dropout(x.double(), 0.3, seed)
    (of_a, of_b), (k, n) = adapters, (n, out_features)
    for grad_a, grad_b in (
        (torch.full((r, k), 7.0, dtype=of_a), torch.full((n, r), 7.0, dtype=of_b)),
        (torch.full((k, r), 7.0, dtype=of_a).T, torch.full((r, n), 7.0, dtype=of_b).T),
    ):
        lora_gradients(grad_xa, x, grad_a, xa, grad, grad_b, 0.5, 0.3, seed)
        for made, exact in ((grad_a, grad_xa.double().T @ dropped), (grad_b, 0.5 * grad.double().T @ xa.double())):
            assert_near(made.double(), exact, max(dtype, made.dtype, key=lambda one: torch.finfo(one).eps))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mask_is_that_of_the_reference_in_every_element(dtype):
    """Products with the identity, so that each output is one input."""
    x = draw(64, 64, dtype=dtype).abs() + 1
    seed = torch.tensor([5])
    eye = torch.eye(64)
    expected = reference.dropout(x, 0.5, seed)
    assert torch.equal(lora_down(x, eye, 1.0, 0.5, seed), expected)
    assert torch.equal(lora_up(x, eye, torch.empty_like(x), 1.0, 0.5, seed), expected)
    grad_a = torch.empty(64, 64)
    grad_b = torch.empty(64, 64)
    lora_gradients(eye.to(dtype), x, grad_a, eye.to(dtype), x, grad_b, 1.0, 0.5, seed)
    assert torch.equal(grad_a, expected.float())
    assert torch.equal(grad_b, x.float().T)  # the input of B is not dropped


def test_sums_of_several_programs_have_the_same_bits_every_time(monkeypatch):
    seed = SEEDS[1]
    x = draw(200, 64).bfloat16()
    h = draw(200, 8).bfloat16()
    wide = draw(4, 800).bfloat16()
    long = draw(8, 800)
    results = []
    for programs in (1, 64, 64):
        monkeypatch.setattr(launch, "PROGRAMS", programs)
        for kernel, size in (("lora_down", "K"), ("lora_gradients", "N")):
            tile = launch.Tile({"M": 16, size: 64, "num_warps": 4})
            monkeypatch.setitem(launch.TABLE, kernel, {"default": [tile]})
        grad_a = torch.empty(8, 64)
        grad_b = torch.empty(64, 8)
        lora_gradients(h, x, grad_a, h, x, grad_b, 1.0, 0.3, seed)
        results.append((lora_down(wide, long, 1.0, 0.3, seed), grad_a, grad_b))
        assert not scratch((COUNTERS.value,), torch.float32, x.device, "shares", COUNTERS.value).any()
    assert all(torch.equal(one, other) for one, other in zip(*results[1:], strict=True))
    for one, other in zip(*results[:2], strict=True):
        assert_near(one, other, torch.bfloat16)
