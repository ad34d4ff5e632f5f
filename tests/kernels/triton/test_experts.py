"""Mixtures of experts whose experts run together, as on a GPU, against the same model expert by expert, as on a CPU."""

import copy

import pytest
import torch

from lightning_qlora import convert, disable_adapter
from lightning_qlora.experts import experts
from lightning_qlora.kernels import backends
from lightning_qlora.kernels import triton as kernels
from lightning_qlora.kernels.backends import Backend
from lightning_qlora.layers.qlora_linear import adapted_layers
from tests.experts.test_experts import gpt_oss, made, qwen3_moe

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _in_c(monkeypatch):
    """Every op runs without Triton, except the launches for several experts."""
    made = Backend(CPU)
    for op in ("can_group", "grouped_linear", "grouped_linear_backward"):
        setattr(made, op, getattr(kernels, op))
    monkeypatch.setitem(backends._backends, CPU, made)


def model_of(build, dtype=torch.float32, **arguments):
    """One layer of experts of 64 x 64, with adapters that do something."""
    kind, config = build()
    config.num_hidden_layers, config.layer_types = 1, ["full_attention"]
    setattr(config, "moe_intermediate_size" if build is qwen3_moe else "intermediate_size", 64)
    model = made(lambda: (kind, config))
    if build is gpt_oss:
        for name, parameter in model.named_parameters():
            if name.endswith("proj_bias"):
                torch.nn.init.normal_(parameter)
    convert(model, r=2, lora_alpha=4, **{"lora_dropout": 0.0, **arguments})
    owner = model.model.layers[0].mlp.experts.to(dtype)
    for layer in adapted_layers(owner).values():
        torch.nn.init.normal_(layer.lora_B.data, std=0.05)
    return owner


def inputs(owner, dtype):
    """Rows, experts and weights of 9 tokens: expert 1 has none, and one choice means no expert."""
    torch.manual_seed(0)
    index = torch.tensor([[0, 2], [3, 0], [0, 3], [0, 2], [2, 3], [3, 0], [0, 2], [0, 99], [3, 2]])
    return torch.randn(9, 64).to(dtype).requires_grad_(), index, torch.rand(9, 2).to(dtype).requires_grad_()


def results(owner, dtype, monkeypatch, together):
    """Output, and gradients of the inputs and of every adapter."""
    called = []
    grouped = experts.grouped_linear
    with monkeypatch.context() as patch:
        patch.setattr(experts, "grouped_linear", lambda *a: called.append(1) or grouped(*a))
        if not together:
            patch.setattr(experts, "can_group", lambda *_: False)
        x, index, weights = inputs(owner, dtype)
        y = owner(x, index, weights)
        y.backward(torch.randn(9, 64, generator=torch.Generator().manual_seed(1)).to(dtype))
    assert len(called) == 2 * together
    adapters = {name: p.grad for name, p in owner.named_parameters() if p.requires_grad}
    owner.zero_grad()
    return {"y": y.detach(), "x": x.grad, "weights": weights.grad} | adapters


@pytest.mark.parametrize(("build", "dtype"), [(qwen3_moe, torch.bfloat16), (gpt_oss, torch.float32)])
def test_outputs_and_gradients_are_those_of_expert_by_expert(build, dtype, monkeypatch):
    owner = model_of(build, dtype)
    ours, theirs = (results(owner, dtype, monkeypatch, together) for together in (True, False))
    tolerance = 2e-4 if dtype is torch.float32 else 4e-2
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert (value - theirs[name]).abs().max() <= tolerance * max(theirs[name].abs().max().item(), 1e-3), name
    assert not ours["down_proj_experts.lora_B"][1].any()


def test_dropout_is_on_in_training_and_drawn_again_by_a_recomputation(monkeypatch):
    owner = model_of(qwen3_moe, lora_dropout=0.5).train()
    arguments = inputs(owner, torch.float32)
    torch.manual_seed(3)
    first = owner(*arguments)
    assert not torch.equal(owner(*arguments), first)
    torch.manual_seed(3)
    assert torch.equal(owner(*arguments), first)
    assert torch.equal(owner.eval()(*arguments), owner(*arguments))
    owner.train()
    torch.manual_seed(3)
    again = torch.utils.checkpoint.checkpoint(owner, *arguments, use_reentrant=False)
    grads = torch.autograd.grad(again.sum(), [p for p in owner.parameters() if p.requires_grad], retain_graph=False)
    expected = torch.autograd.grad(first.sum(), [p for p in owner.parameters() if p.requires_grad])
    assert all(map(torch.equal, grads, expected))


def test_disabled_adapters(monkeypatch):
    owner = model_of(qwen3_moe, torch.bfloat16, lora_dropout=0.5).train()
    untouched = copy.deepcopy(owner).eval()
    for layer in adapted_layers(untouched).values():
        torch.nn.init.zeros_(layer.lora_B)
    with disable_adapter(owner):
        ours = results(owner, torch.bfloat16, monkeypatch, together=True)
    theirs = results(untouched, torch.bfloat16, monkeypatch, together=True)
    assert all(torch.equal(ours[name], theirs[name]) for name in ("y", "x", "weights"))
    assert all(value is None for name, value in ours.items() if "lora" in name)


def test_experts_that_the_kernels_do_not_compute_run_one_by_one(monkeypatch):
    x, index, weights = inputs(model_of(qwen3_moe), torch.float32)
    called = []

    def count(x, ends, weight, lora):
        called.append(1)
        return x.new_zeros(x.shape[0], weight.shape[1])

    monkeypatch.setattr(experts, "grouped_linear", count)

    def launches(owner):
        called.clear()
        owner(x, index, weights)
        return len(called)

    owner = model_of(qwen3_moe)
    assert launches(owner) == launches(copy.deepcopy(owner)) == 2
    owner.down_proj_experts.lora_A.data = owner.down_proj_experts.lora_A.data.mT.contiguous().mT
    assert launches(owner) == 1
    assert launches(model_of(qwen3_moe, use_dora=True)) == 0
    assert launches(model_of(qwen3_moe, exclude_modules=["experts.down_proj"])) == 1
    monkeypatch.setattr(experts, "INTERPRETED", False)
    assert launches(model_of(qwen3_moe)) == 0
