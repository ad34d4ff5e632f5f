"""Large frozen layers of a module that is held in fp32 for a card without bf16. The CPU stands in for such a card."""

import pytest
import torch
from torch import nn

from lightning_qlora import convert
from lightning_qlora.dtypes import compute_in
from lightning_qlora.kernels.backends import backend
from lightning_qlora.logits import piecewise_cross_entropy
from tests.toys import ids, perturb, toy

pytest.importorskip("transformers")


@pytest.fixture
def products(monkeypatch):
    """A T4's answer, and the rows of each product in fp16."""
    rows = []
    linear = compute_in.linear_in_half
    monkeypatch.setattr(compute_in, "lacks_bf16", lambda device: True)
    monkeypatch.setattr(compute_in, "LARGE", 1)
    monkeypatch.setattr(compute_in, "MANY", 2)
    monkeypatch.setattr(compute_in, "linear_in_half", lambda x, *rest: rows.append(len(x)) or linear(x, *rest))
    return rows


def held(**arguments):
    module = toy("llama").bfloat16()
    convert(module, **{"r": 4, "lora_dropout": 0.0, "compute_dtype": "fp16", **arguments})
    return perturb(module)


def step(module):
    module.zero_grad()
    loss = module(input_ids=ids(), labels=ids()).loss
    loss.backward()
    assert loss.isfinite()
    return [loss.detach(), *(p.grad for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize("deferred", [False, True])
def test_an_output_embedding_is_near_that_of_fp32(products, monkeypatch, deferred):
    module = held(deferred_logits=deferred)
    module.model.norm.weight.data *= 1e4  # what fp16 can't multiply
    module.lm_head.weight.data /= 1e4
    ours = step(module)
    assert products
    monkeypatch.setattr(compute_in, "lacks_bf16", lambda device: False)
    for one, other in zip(ours, step(module), strict=True):
        assert (one - other).norm() <= 2e-3 * other.norm()


def test_all_pieces_of_deferred_logits_use_one_cast_of_the_weight(products, monkeypatch):
    module = held(deferred_logits=True)
    head = module.lm_head.weight
    monkeypatch.setattr(piecewise_cross_entropy, "PIECE_ELEMENTS", 2 * len(head))
    computes = backend(head.device)
    rows_to_half = computes.rows_to_half
    casts = []
    monkeypatch.setattr(
        computes, "rows_to_half", lambda x, *rest: casts.append(x is head) or rows_to_half(x, *rest), raising=False
    )
    first = step(module)
    assert len(products) > 2 and sum(casts) == 1
    head.data.mul_(2)
    changed = step(module)
    assert sum(casts) == 2 and changed[0] != first[0]
    products.clear()
    monkeypatch.setattr(compute_in, "lacks_bf16", lambda device: False)
    for one, other in zip(changed, step(module), strict=True):
        assert (one - other).norm() <= 2e-3 * other.norm()
    assert not products


def test_what_stays_in_fp32(products):
    """One row; a layer that trains; a class of the user's; a forward of other code."""
    module = held()
    with torch.no_grad():
        module(input_ids=ids()[:1, :1])
        head = module.lm_head
        head.forward = type(head).forward.__get__(head)
        module(input_ids=ids())
        trained = held(modules_to_save=["lm_head"])
        trained(input_ids=ids())
    assert not products


def test_a_bias_and_a_second_derivative():
    layer = nn.Linear(32, 48)
    x = torch.randn(2, 5, 32, requires_grad=True)
    y = compute_in.linear_in_half(x, layer.weight.detach(), layer.bias.detach())
    torch.testing.assert_close(y, layer(x), rtol=1e-3, atol=1e-3)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
