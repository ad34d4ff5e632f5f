import copy
import io
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from lightning_qlora import convert, disable_adapter, merge
from lightning_qlora.layers.deferred_head import defer_logits
from tests.layers.test_experts import dbrx, gpt_oss, jetmoe, made, qwen3_moe
from tests.toys import delta, ids, perturb, toy


def trained(net=None, **arguments):
    """A converted module whose adapters changed, and the same before they did, in eval mode."""
    net = net or nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    convert(net, **{"r": 4, "lora_dropout": 0.3, **arguments})
    untouched = copy.deepcopy(net).eval()
    perturb(net, scale=0.5)
    return net.train(), untouched


@pytest.mark.parametrize("rows", [1, 3, 300])  # the C kernels decode inside the product for few rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
def test_it_computes_bit_for_bit_what_an_untouched_model_computes(rows, dtype, dora):
    dense = nn.Linear(128, 96).to(dtype)
    untouched = copy.deepcopy(dense)
    convert(untouched, r=4)
    net, _ = trained(dense, use_dora=dora)
    x = torch.randn(rows, 128, dtype=dtype)
    expected = untouched.eval()(x)
    with disable_adapter(net):
        assert torch.equal(net(x), expected)
        assert torch.equal(net.weight, untouched.decode())
    assert not torch.allclose(net.eval()(x), expected)


@pytest.mark.parametrize("build", [qwen3_moe, gpt_oss, dbrx, jetmoe])
def test_experts(build):
    model, untouched = trained(made(build).requires_grad_(True))
    with torch.no_grad(), disable_adapter(model.eval()):
        ours = model(input_ids=ids() % 96).logits
    with torch.no_grad():
        assert torch.equal(ours, untouched(input_ids=ids() % 96).logits)
        assert not torch.equal(ours, model(input_ids=ids() % 96).logits)


def test_gradients_reach_the_input_and_no_adapter():
    net, untouched = trained()
    x = torch.randn(5, 64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    with disable_adapter(net):
        net(x).square().sum().backward()
    untouched(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert all(p.grad is None for p in net.parameters())


def test_contexts_nest_overlap_and_end_with_an_exception():
    net, untouched = trained()
    x = torch.randn(5, 64)
    own = net.eval()(x)
    base = untouched(x)
    first = disable_adapter(net)
    second = disable_adapter(net)
    with pytest.raises(KeyError), disable_adapter(net), disable_adapter(net[0]):
        raise KeyError
    assert torch.equal(net(x), own)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(net(x), base)
    second.__exit__(None, None, None)
    with disable_adapter(net[0]):
        assert not torch.equal(net(x), own)
        assert not torch.equal(net(x), base)
    assert torch.equal(net(x), own)


def test_the_context_is_that_of_the_module_in_every_thread():
    net, untouched = trained()
    x = torch.randn(5, 64)
    seen = []
    with disable_adapter(net):
        thread = threading.Thread(target=lambda: seen.append(net(x)))
        thread.start()
        thread.join()
    assert torch.equal(seen[0], untouched(x))


def test_a_block_that_is_recomputed_without_its_adapters_is_an_error():
    net, _ = trained()
    own = checkpoint(net, torch.randn(5, 64, requires_grad=True), use_reentrant=False)
    with disable_adapter(net), pytest.raises(CheckpointError):
        own.square().sum().backward()


@pytest.mark.parametrize("kind", ["our checkpointing", "transformers"])
def test_gradient_checkpointing(kind):
    grads = []
    for on in (False, True):
        model = toy("llama").train()
        convert(model, r=4, lora_dropout=0.0, gradient_checkpointing=on and kind == "our checkpointing")
        perturb(model)
        if on and kind == "transformers":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.get_input_embeddings().weight.requires_grad_()
        own = model(input_ids=ids()).logits.square().mean()
        with pytest.warns(UserWarning, match="1 parameters train in full"), disable_adapter(model):
            (-0.5 * model(input_ids=ids()).logits.square().mean()).backward()
        own.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected)


def test_logits_of_a_head_with_an_adapter():
    head, untouched = trained(nn.Linear(64, 512))
    defer_logits(head)
    head.lora_dropout = 0.0
    hidden = torch.randn(6, 64, requires_grad=True)
    labels = torch.arange(6)
    with disable_adapter(head):
        base = head(hidden)
    torch.testing.assert_close(base, untouched(hidden))  # computed at once
    own = head(hidden)
    with disable_adapter(head), pytest.raises(RuntimeError, match="or its adapter is disabled now"):
        F.cross_entropy(own, labels)
    torch.testing.assert_close(F.cross_entropy(own, labels), F.cross_entropy(head.plain_forward(hidden), labels))


def test_a_compiled_module_is_compiled_once_more_and_not_each_time():
    net, untouched = trained(lora_dropout=0.0)
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(net, backend=count)
    x = torch.randn(5, 64)
    own = net(x)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), own)
        with torch.no_grad(), disable_adapter(compiled):
            torch.testing.assert_close(compiled(x), untouched(x))
    assert len(graphs) == 2

    @torch.compile(backend="eager")
    def step(x):
        with torch.no_grad(), disable_adapter(net):
            base = net(x)
        return net(x) - base

    torch.testing.assert_close(step(x), own - untouched(x))


def test_parameters_that_train_in_full_keep_their_trained_values():
    net, _ = trained(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 10)), target_modules=["0"], modules_to_save=["1"])
    with torch.no_grad():
        net[1].bias += 1
    x = torch.randn(3, 64)
    with pytest.warns(UserWarning, match=r"2 parameters train in full .* 1.weight, 1.bias"), disable_adapter(net):
        torch.testing.assert_close(net(x), net[1](F.linear(x, net[0].decode(), net[0].bias)))


def test_a_module_without_adapters_and_pissa_are_errors():
    with pytest.raises(ValueError, match="Sequential has no converted layer"), disable_adapter(nn.Sequential()):
        pass
    net = nn.Linear(64, 64)
    convert(net, r=4, init_lora_weights="pissa")
    with pytest.raises(ValueError, match="init_lora_weights='pissa', which moves"), disable_adapter(net):
        pass


def copied(module):
    return copy.deepcopy(module)


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class Counting(nn.Linear):
    """A layer of a user whose copies have an attribute of their own."""

    def __getstate__(self):
        return {**vars(self), "copies": vars(self).get("copies", 0) + 1}


@pytest.mark.parametrize("copy_of", [copied, saved])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [nn.Linear, Counting])
def test_a_copy_made_inside_has_its_adapter_and_the_context_ends_for_the_module_alone(layer, dtype, copy_of):
    net, untouched = trained(nn.Sequential(layer(64, 128), nn.ReLU(), layer(128, 64)).to(dtype), lora_dropout=0.0)
    dense = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    for index in (0, 2):
        dense[index].weight.data = net[index].decode().float() + delta(net[index])
        dense[index].bias.data = net[index].bias.detach().float()
    x = torch.randn(5, 64).to(dtype)
    with disable_adapter(net), disable_adapter(net):
        with pytest.warns(UserWarning, match="made inside disable_adapter has its adapter enabled"):
            other = copy_of(net)
        assert torch.equal(net(x), untouched(x))  # still without
        own = other(x)
        with disable_adapter(other):
            assert torch.equal(other(x), untouched(x))
    expected = dense(x.float())
    assert (own - expected).norm() < (1e-5 if dtype is torch.float32 else 1e-2) * expected.norm()
    assert torch.equal(own, other(x)) and torch.equal(own, net(x))
    own.square().mean().backward()
    assert all(parameter.grad is not None for part in (other[0], other[2]) for parameter in part.adapter_parameters())
    assert getattr(other[0], "copies", 1) == 1
    assert (merge(other, "fp32")(x.float()) - expected).norm() < 1e-2 * expected.norm()


def test_copies_of_experts_and_of_rows_of_tokens_have_them_too():
    model, _ = trained(made(qwen3_moe).requires_grad_(True), trainable_token_indices=[3, 5], lora_dropout=0.0)
    own = model.eval()(input_ids=ids() % 96).logits
    with disable_adapter(model), pytest.warns(UserWarning, match="has its adapter enabled"):
        other = copy.deepcopy(model)
    assert torch.equal(other(input_ids=ids() % 96).logits, own)


def test_a_copy_made_by_another_thread_has_its_adapter():
    net, _ = trained(lora_dropout=0.0)
    x = torch.randn(5, 64)
    own = net(x)
    copies = []
    thread = threading.Thread(target=lambda: copies.append(copy.deepcopy(net)))
    with disable_adapter(net), pytest.warns(UserWarning, match="has its adapter enabled"):
        _run(thread)
    assert torch.equal(copies[0](x), own)


def _run(thread):
    thread.start()
    thread.join()
