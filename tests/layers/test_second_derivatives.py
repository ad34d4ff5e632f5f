"""Gradients of gradients against a module of dense layers with the decoded weights and LoRA in plain torch, in fp32."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from lightning_qlora import QLoRALinear, convert, disable_adapter
from lightning_qlora.kernels import reference
from lightning_qlora.layers.deferred_head import defer_logits
from tests.layers.test_experts import made, qwen3_moe
from tests.toys import perturb


class Dense(nn.Module):
    """A QLoRALinear in plain torch: W is decoded, dropout takes the seeds that the layer draws."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.bias = layer.decode(), layer.bias
        self.lora_A, self.lora_B = (nn.Parameter(p.detach().clone()) for p in (layer.lora_A, layer.lora_B))
        self.lora_magnitude_vector = copy.deepcopy(layer.lora_magnitude_vector)
        self.scaling, self.p = layer.scaling, layer.lora_dropout

    def forward(self, x):
        seed = torch.randint(1 << 62, (1,)) if self.p and self.training else None
        dropped = reference.dropout(x.reshape(-1, x.shape[-1]), self.p, seed).view(x.shape)
        y = F.linear(x, self.weight) + self.scaling * F.linear(F.linear(dropped, self.lora_A), self.lora_B)
        if self.lora_magnitude_vector is not None:
            norm = (self.weight + self.scaling * self.lora_B @ self.lora_A).detach().norm(dim=1)
            y = y * (self.lora_magnitude_vector / norm)
        return y + self.bias


def both(**arguments):
    """A converted module and the same in plain torch."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64), nn.Softplus(), nn.Linear(64, 32))
    convert(net, **{"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, **arguments})
    perturb(net, 0.2)
    dense = nn.Sequential(*(Dense(part) if isinstance(part, QLoRALinear) else part for part in net))
    return net.train(), dense.train()


def parameters(net):
    return {name: p for name, p in net.named_parameters() if p.requires_grad and "bias" not in name}


def points(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def penalty(net, call):
    """WGAN-GP (Gulrajani et al. 2017)."""
    x = points(5, 64).requires_grad_()
    (grad,) = torch.autograd.grad(call(net, x).sum(), x, create_graph=True)
    return (grad.norm(dim=1) - 1).square().mean()


def forces(net, call):
    """A molecular potential is trained on its energy and on the forces, the gradient with respect to positions."""
    positions = points(2, 7, 64).requires_grad_()
    energy = call(net, positions).square().sum(dim=(1, 2))
    (force,) = torch.autograd.grad(energy.sum(), positions, create_graph=True)
    return energy.mean() + (force + 1).square().mean()


def maml(net, call):
    """One step of MAML (Finn et al. 2017): the loss after a step of gradient descent, with its derivative."""
    names, values = zip(*parameters(net).items(), strict=True)
    loss = call(net, points(5, 64)).square().mean()
    grads = torch.autograd.grad(loss, values, create_graph=True)
    moved = {name: p - 0.1 * grad for name, p, grad in zip(names, values, grads, strict=True)}
    return functional_call(net, moved, (points(3, 64),)).square().mean()


def third(net, call):
    x = points(3, 64).requires_grad_()
    (grad,) = torch.autograd.grad(call(net, x).square().sum(), x, create_graph=True)
    (grad,) = torch.autograd.grad(grad.square().sum(), x, create_graph=True)
    return grad.square().sum()


LOSSES = {"penalty": penalty, "forces": forces, "maml": maml, "third": third}


def gradients(net, loss, call):
    torch.manual_seed(0)
    value = loss(net, call)
    return [value.detach(), *torch.autograd.grad(value, list(parameters(net).values()))]


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("arguments", [{}, {"lora_dropout": 0.3}, {"use_dora": True}], ids=["lora", "dropout", "dora"])
def test_they_are_those_of_dense_layers(loss, arguments):
    net, dense = both(**arguments)
    calls = [lambda net, x: net(x)]
    if loss is not maml:
        calls.append(lambda net, x: checkpoint(net, x, use_reentrant=False))
    expected = gradients(dense, loss, calls[0])
    for call in calls:
        for ours, theirs in zip(gradients(net, loss, call), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * max(1, theirs.abs().max().item()))


def test_disabled_adapters_and_the_op_of_torch_library():
    net, dense = both()
    for part in dense:
        part.scaling = 0.0
    expected = gradients(
        dense, lambda *a: penalty(*a) + 0 * sum(p.sum() for p in dense.parameters()), nn.Module.__call__
    )

    def without(net, x):
        with disable_adapter(net):
            return net(x)

    torch.testing.assert_close(penalty(net, without), expected[0])

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    eager = gradients(net, penalty, nn.Module.__call__)
    with Mode():
        torch.testing.assert_close(gradients(net, penalty, nn.Module.__call__), eager)


def test_no_decoded_weight_is_kept():
    layer = nn.Linear(256, 256)
    convert(layer, r=4, lora_dropout=0.0)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        penalty_of = layer(points(2, 256).requires_grad_()).square().sum()
        torch.autograd.grad(penalty_of, list(parameters(layer).values()), create_graph=True)
    assert kept and torch.Size([256, 256]) not in kept


def effective(layer):
    """W + s B A in plain torch."""
    return layer.decode() + layer.scaling * layer.lora_B @ layer.lora_A


def of_squares(y, x, inputs):
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), inputs)


def test_experts():
    model = made(qwen3_moe).requires_grad_(True)
    convert(model, r=2, lora_dropout=0.0)
    owner = perturb(model, 0.2).model.layers[0].mlp.experts
    x, adapters = points(9, 64).requires_grad_(), [p for p in owner.parameters() if p.requires_grad]
    index = torch.arange(18).view(9, 2) % len(owner.down_proj_experts)
    y = owner(x, index, torch.full((9, 2), 0.5))
    up, down = (
        torch.stack([effective(layer) for layer in stack])[index]
        for stack in (owner.gate_up_proj_experts, owner.down_proj_experts)
    )
    gate, hidden = torch.einsum("ti,tkoi->tko", x, up).chunk(2, -1)
    expected = torch.einsum("tki,tkoi->to", F.silu(gate) * hidden, down) / 2
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(of_squares(y, x, adapters), of_squares(expected, x, adapters), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * max(1, theirs.abs().max().item()))


def test_weights_that_are_read_and_deferred_logits():
    layer = nn.Linear(64, 48)
    convert(layer, r=4, use_dora=True)
    perturb(layer, 0.2)
    x, adapter = points(3, 64, 5).requires_grad_(), list(parameters(layer).values())
    ours, theirs = (
        of_squares(F.conv1d(x, weight[..., None]), x, adapter)
        for weight in (layer.weight, layer.dora_scale()[:, None] * effective(layer))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-2)

    head = nn.Linear(64, 96)
    convert(head, r=4, lora_dropout=0.0)
    hidden, adapter = points(5, 64).requires_grad_(), list(parameters(perturb(head, 0.2)).values())
    expected = of_squares(head(hidden).tanh(), hidden, adapter)
    defer_logits(head)
    torch.testing.assert_close(of_squares(head(hidden).tanh(), hidden, adapter), expected)


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_weight_that_is_read_in_a_functional_call_has_the_gradients_of_that_call(use_dora):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 48)

        def forward(self, x):
            return F.conv1d(x, self.fc.weight[..., None])

    net, x = Net(), points(3, 64, 5)
    convert(net, r=4, use_dora=use_dora)
    moved = {
        name: (1.5 * p.detach()).requires_grad_()
        for name, p in perturb(net, 0.2).named_parameters()
        if "_A" in name or "_B" in name
    }
    a, b = moved.values()
    weight = net.fc.decode() + net.fc.scaling * b @ a
    if use_dora:
        weight = (net.fc.lora_magnitude_vector / weight.detach().norm(dim=1))[:, None] * weight
    results = functional_call(net, moved, (x,)), F.conv1d(x, weight[..., None])
    ours, theirs = (torch.autograd.grad(y.square().sum(), [a, b]) for y in results)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-2)
