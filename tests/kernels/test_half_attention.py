"""Attention in fp16 with powers of two, on a CPU, whose fused attention in fp16 rounds as that of a card does."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_qlora.kernels.half_attention import attention_in_half

QUERIES, WIDTH = 192, 32
SCALE = WIDTH**-0.5


def tensors(of_q=1.0, of_k=1.0, of_v=1.0, of_grad=1.0):
    q, k, v, grad = (torch.randn(2, 3, QUERIES, WIDTH) for _ in range(4))
    return q * of_q, k * of_k, v * of_v, grad * of_grad


def causal(q, k, v):
    return attention(q, k, v, is_causal=True)


def in_half(attend=causal, sums=QUERIES):
    return lambda q, k, v: attention_in_half(attend, q, k, v, SCALE, sums)


def run(function, q, k, v, grad):
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    y = function(*inputs)
    return y.detach(), *torch.autograd.grad(y, inputs, grad.to(y.dtype))


def errors(ours, exact):
    return [((one.double() - other).norm() / other.norm()).item() for one, other in zip(ours, exact, strict=True)]


SIZES = {
    "ordinary": {},
    "values of 1e5": {"of_v": 1e5, "of_grad": 1e-9},
    "values of 1e-7": {"of_v": 1e-7, "of_grad": 1e6},
    "all of 1e-7": {"of_q": 1e-7, "of_k": 1e-7, "of_v": 1e-7},
    "queries of 1e5, keys of 1e-5": {"of_q": 1e5, "of_k": 1e-5},
    "queries of 1e-20": {"of_q": 1e-20},
    "values whose squares fp32 does not have": {"of_v": 1e22, "of_grad": 1e-25},
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_error_is_below_a_third_of_that_of_bf16_for_every_size(sizes):
    given = tensors(**sizes)
    exact = run(causal, *(x.double() for x in given))
    ours = run(in_half(), *given)
    assert all(one.dtype is torch.float32 for one in ours)
    of_bf16 = errors(run(causal, *(x.bfloat16() for x in given)), exact)
    for one, other in zip(errors(ours, exact), of_bf16, strict=True):
        assert one < max(other / 3, 2.5e-3)


def test_nothing_of_the_size_of_an_input_is_copied_to_fp64():
    large = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            y = func(*args, **(kwargs or {}))
            large.extend(func for each in tree_leaves((y, kwargs)) if each is torch.float64 and args[0].numel() > 1)
            return y

    given = tensors()
    with Watch():
        run(in_half(), *given)
    assert not large


def test_one_column_of_3000_leaves_the_others_their_digits():
    q, k, v, grad = tensors()
    k[..., 3] *= 3000
    q[..., 3] /= 3000
    v[..., 5] *= 3000
    exact = run(causal, *(x.double() for x in (q, k, v, grad)))
    assert max(errors(run(in_half(), q, k, v, grad), exact)) < 1.5e-3


def test_queries_and_keys_of_1e5_choose_the_key_that_fp32_chooses():
    """Plain fp16 has no such number; the scores are 1e11."""
    q, k, v, _ = tensors(1e5, 1e5)
    y, expected = in_half()(q, k, v), causal(q, k, v)
    assert y.isfinite().all()
    assert ((y - expected).abs().amax(-1) < 1e-2).float().mean() > 0.99  # else two keys are alike


def test_nothing_overflows_where_all_queries_use_two_keys_and_agree():
    q, k, v, grad = torch.full((4, 1, 1, 2000, WIDTH), 3.0)
    k = torch.randn_like(k) / 10 - 3
    k[..., 0, :] = torch.randn(WIDTH) + 3
    k[..., 1, :] = k[..., 0, :].flip(-1)  # the same scores, of another key
    v[..., 1, :] = -2
    plain = lambda q, k, v: attention(q, k, v)  # noqa: E731
    exact = run(plain, *(x.double() for x in (q, k, v, grad)))
    assert max(errors(run(in_half(plain, 2000), q, k, v, grad), exact)) < 1e-2


def test_masks_and_zeros():
    q, k, v, grad = tensors()
    mask = torch.rand(2, 1, QUERIES, QUERIES) < 0.7
    masked = lambda q, k, v: attention(q, k, v, mask)  # noqa: E731
    exact = run(masked, *(x.double() for x in (q, k, v, grad)))
    assert max(errors(run(in_half(masked), q, k, v, grad), exact)) < 1.5e-3
    for zeros in (0, 1, 2, 3):
        given = [x * 0 if number == zeros else x for number, x in enumerate((q, k, v, grad))]
        for one, other in zip(run(in_half(), *given), run(causal, *given), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=2e-3)


def test_a_second_derivative_is_refused():
    q, k, v, _ = tensors()
    y = in_half()(q.requires_grad_(), k, v)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), q, create_graph=True)
