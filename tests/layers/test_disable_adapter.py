import copy
import io
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import CheckpointError, checkpoint

from lightning_qlora import convert, disable_adapter
from lightning_qlora.logits.deferred_head import defer_logits
from tests.conftest import every_pair
from tests.toys import ids, perturb, toy


def trained(net=None, **arguments):
    """A converted module whose adapters changed, and the same before they did, in eval mode."""
    net = net or nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    convert(net, **{"r": 4, "lora_dropout": 0.3, **arguments})
    untouched = copy.deepcopy(net).eval()
    perturb(net, scale=0.5)
    return net.train(), untouched


# The C kernels decode inside the product for few rows.
@pytest.mark.parametrize(
    ("rows", "dtype", "dora"), every_pair([1, 3, 300], [torch.float32, torch.bfloat16], [False, True])
)
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


def test_the_context_is_that_of_the_module_in_every_thread_and_of_no_copy():
    net, untouched = trained(lora_dropout=0.0)
    x = torch.randn(5, 64)
    own = net(x)
    seen = []
    thread = threading.Thread(target=lambda: seen.extend([net(x), copy.deepcopy(net)]))
    with disable_adapter(net), pytest.warns(UserWarning, match="has its adapter enabled"):
        _run(thread)
    assert torch.equal(seen[0], untouched(x)) and torch.equal(seen[1](x), own)


def test_a_block_that_is_recomputed_without_its_adapters_is_an_error():
    net, _ = trained()
    own = checkpoint(net, torch.randn(5, 64, requires_grad=True), use_reentrant=False)
    with disable_adapter(net), pytest.raises(CheckpointError):
        own.square().sum().backward()


def test_gradient_checkpointing():
    grads = []
    for kind in ("none", "ours", "that of transformers"):
        model = toy("llama", num_hidden_layers=1).train()
        convert(model, r=4, lora_dropout=0.0, gradient_checkpointing=kind == "ours")
        perturb(model)
        if kind == "that of transformers":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.get_input_embeddings().weight.requires_grad_()
        own = model(input_ids=ids()).logits.square().mean()
        text = r"1 parameters train in full and have their trained values in it: model\.embed_tokens\.weight\.$"
        with pytest.warns(UserWarning, match=text), disable_adapter(model):
            (-0.5 * model(input_ids=ids()).logits.square().mean()).backward()
        own.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for others in grads[1:]:
        assert_close(others, grads[0])


def test_logits_of_a_head_with_an_adapter():
    head, untouched = trained(nn.Linear(64, 512))
    defer_logits(head)
    head.lora_dropout = 0.0
    hidden = torch.randn(6, 64, requires_grad=True)
    labels = torch.arange(6)
    with disable_adapter(head):
        base = head(hidden)
    assert_close(base, untouched(hidden))  # computed at once
    own = head(hidden)
    with disable_adapter(head), pytest.raises(RuntimeError, match="or its adapter is disabled now"):
        F.cross_entropy(own, labels)
    assert_close(F.cross_entropy(own, labels), F.cross_entropy(head.forward.original(hidden), labels))


def test_a_compiled_module_is_compiled_once_more_and_not_each_time():
    torch.compiler.reset()  # after eight other layers torch compiles this forward pass no more
    net, untouched = trained(nn.Linear(64, 64), lora_dropout=0.0)
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(net, backend=count)
    x = torch.randn(5, 64)
    own = net(x)
    for _ in range(3):
        assert_close(compiled(x), own)
        with torch.no_grad(), disable_adapter(compiled):
            assert_close(compiled(x), untouched(x))
    assert len(graphs) == 2

    @torch.compile(backend="eager")
    def step(x):
        with torch.no_grad(), disable_adapter(net):
            base = net(x)
        return net(x) - base

    assert_close(step(x), own - untouched(x))


def test_a_module_without_adapters_is_an_error():
    with (
        pytest.raises(ValueError, match=r"Sequential has no adapter\. Convert it first"),
        disable_adapter(nn.Sequential()),
    ):
        pass


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class Counting(nn.Linear):
    """A layer of a user whose copies have an attribute of their own."""

    def __getstate__(self):
        return {**vars(self), "copies": vars(self).get("copies", 0) + 1}


@pytest.mark.parametrize(
    ("copy_of", "dtype", "layer"),
    every_pair([copy.deepcopy, saved], [torch.float32, torch.bfloat16], [nn.Linear, Counting]),
)
def test_a_copy_made_inside_has_its_adapter_and_the_context_ends_for_the_module_alone(layer, dtype, copy_of):
    net, untouched = trained(nn.Sequential(layer(64, 128), nn.ReLU(), layer(128, 64)).to(dtype), lora_dropout=0.0)
    x = torch.randn(5, 64).to(dtype)
    with disable_adapter(net), disable_adapter(net):
        with pytest.warns(UserWarning, match="made inside disable_adapter has its adapter enabled"):
            other = copy_of(net)
        assert torch.equal(net(x), untouched(x))  # still without
        own = other(x)
        with disable_adapter(other):
            assert torch.equal(other(x), untouched(x))
    assert torch.equal(own, other(x)) and torch.equal(own, net(x))
    own.square().mean().backward()
    assert all(parameter.grad is not None for part in (other[0], other[2]) for parameter in part.adapter_parameters())
    assert getattr(other[0], "copies", 1) == 1


def _run(thread):
    thread.start()
    thread.join()
