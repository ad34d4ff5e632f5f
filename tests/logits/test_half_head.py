"""The output embedding of a module that is held in fp32 for a card without bf16. The CPU stands in for such a card."""

import pytest
import torch
from torch import nn

from lightning_qlora import convert
from lightning_qlora.kernels.backends import backend
from lightning_qlora.logits import half_head, piecewise_cross_entropy
from tests.toys import ids, perturb, toy

pytest.importorskip("transformers")


@pytest.fixture
def casts(monkeypatch):
    """A T4's answer; the shapes of what is cast to fp16."""
    shapes = []
    computes = backend(torch.device("cpu"))
    rows_to_half = computes.rows_to_half
    monkeypatch.setattr(half_head, "lacks_bf16", lambda device: True)
    monkeypatch.setattr(half_head, "LARGE", 1)
    monkeypatch.setattr(half_head, "MANY", 2)
    monkeypatch.setattr(
        computes, "rows_to_half", lambda x, *rest: shapes.append(x.shape) or rows_to_half(x, *rest), raising=False
    )
    return shapes


def held(**arguments):
    module = toy("llama").bfloat16()
    convert(module, **{"r": 4, "lora_dropout": 0.0, "compute_dtype": "fp16", "deferred_logits": True, **arguments})
    return perturb(module)


def step(module):
    module.zero_grad()
    loss = module(input_ids=ids(), labels=ids()).loss
    loss.backward()
    assert loss.isfinite()
    return [loss.detach(), *(p.grad for p in module.parameters() if p.grad is not None)]


def test_the_loss_is_near_that_of_fp32_by_one_cast_of_the_weight(casts, monkeypatch):
    module = held()
    module.model.norm.weight.data *= 1e4  # what fp16 can't multiply
    module.lm_head.weight.data /= 1e4
    head = module.lm_head.weight
    monkeypatch.setattr(piecewise_cross_entropy, "PIECE_ELEMENTS", 2 * len(head))
    ours = step(module)
    assert casts.count(head.shape) == 1 and len(casts) > 3  # and a cast of the rows of each piece
    monkeypatch.setattr(half_head, "lacks_bf16", lambda device: False)
    for one, other in zip(ours, step(module), strict=True):
        assert (one - other).norm() <= 2e-3 * other.norm()


def test_what_stays_in_fp32(casts):
    """Few rows; a head that trains; a forward of other code; a module that was fp32 before."""
    module = held()
    assert half_head.half_weight(module.lm_head, rows=1) is None
    assert half_head.half_weight(held(modules_to_save=["lm_head"]).lm_head, rows=8) is None
    head = module.lm_head
    head.forward = type(head).forward.__get__(head)
    step(module)
    of_fp32 = toy("llama")
    convert(of_fp32, r=4, compute_dtype="fp16", deferred_logits=True)
    assert half_head.half_weight(of_fp32.lm_head, rows=8) is None
    assert head.weight.shape not in casts


def test_a_head_with_rows_that_train_computes_with_them(casts, monkeypatch):
    """It is tied to the embedding whose rows train."""
    torch.manual_seed(0)
    module = toy("llama", tie_word_embeddings=True).bfloat16()
    convert(module, r=4, lora_dropout=0.0, compute_dtype="fp16", deferred_logits=True, trainable_token_indices=[1, 2])
    ours = step(perturb(module))
    assert module.lm_head.weight.shape not in casts
    monkeypatch.setattr(half_head, "lacks_bf16", lambda device: False)
    torch.testing.assert_close(ours, step(module), rtol=0, atol=0)


def test_a_bias_and_a_second_derivative():
    layer = nn.Linear(32, 48)
    x = torch.randn(5, 32, requires_grad=True)
    weight = backend(x.device).rows_to_half(layer.weight.detach())
    y = half_head.half_logits(x, weight, layer.bias.detach())
    torch.testing.assert_close(y, layer(x), rtol=1e-3, atol=1e-3)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
