"""Models with Liger's norms, RoPE, SwiGLU and loss: the same steps as without, in either order with conversion.

Liger's functions run in plain torch here, with what they do to their inputs: they write gradients over saved values.
"""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from lightning_qlora import convert, merge

CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
CALLS = Counter()


class SwiGLU(Function):
    @staticmethod
    def forward(ctx, gate, up, *multipliers):
        CALLS["swiglu"] += 1
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, gradient):
        saved = ctx.saved_tensors
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in saved]
            gradients = torch.autograd.grad(F.silu(inputs[0]) * inputs[1], inputs, gradient)
        for tensor, each in zip(saved, gradients, strict=True):
            tensor.data.copy_(each)
        return *(tensor.data for tensor in saved), None, None


class RMSNorm(Function):
    @staticmethod
    def forward(ctx, x, weight, epsilon, offset, casting_mode, in_place, row_mode):
        CALLS["norm"] += 1
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        return F.rms_norm(x, weight.shape, weight, epsilon)

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            x, weight = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
            y = F.rms_norm(x, weight.shape, weight, ctx.epsilon)
            of_x, of_weight = torch.autograd.grad(y, (x, weight), gradient)
        gradient.data.copy_(of_x)
        return gradient, of_weight, *[None] * 5


def rope(name, q, k, cos, sin, *_):
    CALLS["rope"] += 1

    def rotated(x):
        half = x.shape[-1] // 2
        return x * cos.unsqueeze(1) + torch.cat((-x[..., half:], x[..., :half]), -1) * sin.unsqueeze(1)

    return rotated(q), rotated(k)


def fused_loss(hidden, weight, target, reduction="mean", ignore_index=-100, **_):
    CALLS["loss"] += 1
    return F.cross_entropy(F.linear(hidden, weight), target, reduction=reduction, ignore_index=ignore_index)


@pytest.fixture
def liger(monkeypatch):
    """Apply Liger's layers to a model; with its loss or ours."""
    transformers = pytest.importorskip("liger_kernel.transformers")
    monkeypatch.setattr(transformers.rms_norm, "LigerRMSNormFunction", RMSNorm)
    monkeypatch.setattr(transformers.swiglu, "LigerSiLUMulFunction", SwiGLU)
    monkeypatch.setattr(transformers.rope, "dispatch", rope)
    monkeypatch.setattr(transformers.functional, "liger_fused_linear_cross_entropy", fused_loss)
    from transformers.models.llama import modeling_llama

    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    CALLS.clear()
    return transformers.apply_liger_kernel_to_llama


def build():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG).train()


def converted(model, **arguments):
    torch.manual_seed(1)
    convert(model, r=4, lora_dropout=0.0, **arguments)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.05)
    return model


def step(model, tokens):
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss, {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.third_party
@pytest.mark.parametrize("arguments", [{}, {"gradient_checkpointing": "offload"}], ids=["kept", "recomputed in tiles"])
@pytest.mark.parametrize("own_loss", [False, True])
@pytest.mark.parametrize("first", ["liger", "conversion"])
def test_steps_are_those_of_the_model_without_it(liger, first, own_loss, arguments):
    tokens = torch.randint(0, 512, (1, 4096 if arguments else 24), generator=torch.Generator().manual_seed(2))
    loss, gradients = step(converted(build()), tokens)
    model = build()
    if first == "liger":
        liger(model=model, fused_linear_cross_entropy=own_loss)
    converted(model, **arguments)
    if first == "conversion":
        liger(model=model, fused_linear_cross_entropy=own_loss)
    with_liger, others = step(model, tokens)
    torch.testing.assert_close(with_liger, loss)
    assert others.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-7, msg=name)
    assert CALLS["loss"] == own_loss and min(CALLS["norm"], CALLS["rope"], CALLS["swiglu"]) > 1
    merge(model)
    assert model.get_submodule("model.layers.0.mlp.up_proj").__class__ is nn.Linear


@pytest.mark.third_party
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_compute_the_same(checkpointing):
    """The other way to fuse what surrounds the linear layers."""
    tokens = torch.randint(0, 512, (2, 24), generator=torch.Generator().manual_seed(2))
    loss, gradients = step(converted(build()), tokens)
    model = build()
    for block in model.model.layers:
        block.compile(backend="aot_eager")
    compiled, others = step(converted(model, gradient_checkpointing=checkpointing), tokens)
    torch.testing.assert_close(compiled, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, msg=name)
