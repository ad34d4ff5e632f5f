"""A call of a layer that was prepared is the call that asks everything, bit for bit, whatever happened in between.

Random actions change the layer. After each of them it is called in a random form, without what it had prepared and with
it, with the same numbers of torch's generator. Outputs, gradients, what the generator gives next, and errors are equal,
and the outputs and gradients are those of the dense formula.
"""

import copy
import pickle
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import lightning_qlora
from lightning_qlora import convert, disable_adapter, merge
from lightning_qlora.kernels import reference
from lightning_qlora.layers.packed_layer import to_parameters
from lightning_qlora.layers.prepared_call import PreparedCall
from tests.conftest import run_python
from tests.scripts.prepared_on_ranks import counted
from tests.toys import assert_equal

PACKAGE = Path(lightning_qlora.__file__).parent
N, K = 48, 64
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 4e-2, torch.float16: 6e-3}


def made(seed=0, bias=True, **arguments):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(K, N, bias=bias))
    convert(net, **{"r": 4, "lora_alpha": 6, "lora_dropout": 0.2, **arguments})
    nn.init.normal_(net[0].lora_B, std=0.3)
    return net


# What may happen to a layer between two calls: (module, random numbers) -> the module that is called next.


def cast(net, chance):
    return net.to(chance.choice(TYPES))


def other_mode(net, chance):
    return net.train(chance.random() < 0.5)


def other_settings(net, chance):
    net[0].scaling = chance.choice([0, 1, 0.75, 2.0])
    net[0].lora_dropout = chance.choice([0.0, 0.3])


def other_values_by_data(net, chance):
    for parameter in (net[0].lora_A, net[0].lora_B):
        parameter.data = torch.randn_like(parameter)


def other_rank_by_data(net, chance):
    r = chance.choice([1, 3, 4, 9])
    net[0].lora_A.data, net[0].lora_B.data = torch.randn(r, K), torch.randn(N, r) / 4


def other_type_by_data(net, chance):
    net[0].lora_B.data = net[0].lora_B.data.to(chance.choice(TYPES[:2]))


def other_strides(net, chance):
    net[0].lora_A.data = net[0].lora_A.data.T.contiguous().T


def odd_address(net, chance):
    for parameter in (net[0].lora_A, net[0].lora_B):
        memory = parameter.data.new_empty(parameter.numel() + 1)
        parameter.data = memory[1:].view(parameter.shape).copy_(parameter.data)


def another_parameter(net, chance):
    net[0].lora_B = nn.Parameter(torch.randn_like(net[0].lora_B) / 4)


def a_gradient_or_none(net, chance):
    net[0].lora_A.requires_grad_(chance.random() < 0.5)


def another_bias(net, chance):
    form = chance.randrange(4)
    if form == 0 or net[0].bias is None:
        net[0].bias = nn.Parameter(torch.randn(N), requires_grad=chance.random() < 0.5)
    elif form == 1:
        net[0].bias = None
    elif form == 2:
        net[0].bias.data = torch.randn(N).to(chance.choice(TYPES[:2]))
    else:
        net[0].bias.data = torch.randn(2 * N)[::2]


def written_in_place(net, chance):
    with torch.no_grad():
        net[0].lora_A.mul_(-1.5)
        net[0].lora_B.add_(0.1)


def a_step(net, chance):
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    if trained:
        net.zero_grad()
        net(torch.randn(3, K)).float().square().mean().backward()
        torch.optim.SGD(trained, 0.1).step()


def bytes_in_place(net, chance):
    net[0].packed.data.random_(0, 256)


def other_bytes(net, chance):
    if "packed" in vars(net[0]):
        net[0].packed = torch.randint_like(net[0].packed, 256)
    else:
        net[0].packed.data = torch.randint_like(net[0].packed, 256)


def bytes_at_an_odd_address(net, chance):
    for name in ("packed", "absmax", "nested"):
        data = getattr(net[0], name).data
        memory = data.new_empty(data.numel() + 1)
        getattr(net[0], name).data = memory[1:].view(data.shape).copy_(data)


def bytes_become_parameters(net, chance):
    to_parameters(net)


def another_weight(net, chance):
    net[0].quantize_weight(torch.randn(N, K))


def loads_4_bits(net, chance):
    if net[0].lora_A.shape[0] == 4:
        other = made(chance.randrange(9), net[0].bias is not None)
        net[0].load_state_dict(other[0].state_dict())


def loads_a_dense_weight(net, chance):
    net[0].load_state_dict({"weight": torch.randn(N, K)}, strict=False)


def a_copy(net, chance):
    return copy.deepcopy(net)


def a_shallow_copy(net, chance):
    return nn.Sequential(copy.copy(net[0]))


def a_pickle(net, chance):
    return pickle.loads(pickle.dumps(net))


ACTIONS = (
    cast, other_mode, other_settings, other_values_by_data, other_rank_by_data, other_type_by_data, other_strides,
    odd_address, another_parameter, a_gradient_or_none, another_bias, written_in_place, a_step, bytes_in_place,
    other_bytes, bytes_at_an_odd_address, bytes_become_parameters, another_weight, loads_4_bits, loads_a_dense_weight,
    a_copy, a_shallow_copy, a_pickle,
)  # fmt: skip


# How a layer is called: (module, x) -> y.


def plainly(net, x):
    return net(x)


def recomputed(net, x, use_reentrant=False):
    return checkpoint(net, x, use_reentrant=use_reentrant)


def within(context):
    def call(net, x):
        with context():
            return net(x)

    return call


def disabled(net, x):
    with disable_adapter(net):
        return net(x)


def functionally(net, x):
    return torch.func.functional_call(net, {"0.lora_B": net[0].lora_B * 2}, x)


def with_hooks(net, x):
    """Saved tensors that come back at other addresses."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.clone()):
        return net(x)


FORMS = {
    plainly: 4,
    recomputed: 2,
    partial(recomputed, use_reentrant=True): 1,
    within(torch.no_grad): 2,
    within(torch.inference_mode): 1,
    within(partial(torch.autocast, "cpu", torch.bfloat16)): 2,
    disabled: 1,
    functionally: 1,
    with_hooks: 1,
}
SHAPES = ((0, K), (1, K), (2, K), (5, K), (64, K), (65, K), (100, K), (3, 5, K), (2, 0, K), (1, 1, K), (K,), (2, 63))


def inputs(chance):
    """x of some shape, type and layout, of which few do not fit."""
    shape = chance.choice(SHAPES)
    x = torch.randn(shape)
    layout = chance.randrange(6)
    if layout == 0 and x.dim() == 2:
        x = x.T.contiguous().T
    elif layout == 1:
        x = torch.randn(x.numel() + 1)[1:].view(shape)
    elif layout == 2 and x.dim() == 2:
        x = torch.randn(1, shape[1]).expand(shape)
    dtype = chance.choice((*TYPES[:1] * 5, *TYPES, torch.int64))
    x = x.to(dtype)
    return x.requires_grad_(chance.random() < 0.8) if x.is_floating_point() else x


def outcome(net, form, x):
    """y, the gradients, and the next number of torch's generator, or the error."""
    torch.manual_seed(5)
    leaves = [leaf for leaf in (x, *net.parameters()) if leaf.requires_grad]
    try:
        y = form(net, x)
        gradients = [y.detach().clone()]
        if y.requires_grad:
            grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
            gradients += torch.autograd.grad(y, leaves, grad, allow_unused=True)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        return type(error), str(error)
    return [*gradients, torch.rand(1)]


def assert_same(ours, theirs):
    assert type(ours) is type(theirs), (ours, theirs)
    if isinstance(ours, tuple):
        assert ours == theirs
        return
    assert [value is None for value in ours] == [value is None for value in theirs]
    for one, other in zip(ours, theirs, strict=True):
        if one is not None:
            assert one.dtype is other.dtype and one.stride() == other.stride()
            assert torch.equal(one, other)


def assert_dense(net, form, x, ours):
    """y = x W^T + bias + s drop(x) A^T B^T, and its gradients, in fp64."""
    layer = net[0]
    if isinstance(ours, tuple) or form not in (plainly, recomputed, with_hooks) or not x.numel():
        return
    torch.manual_seed(5)
    seed = torch.randint(1 << 62, (1,)) if layer.training and layer.lora_dropout else None
    names = {name: leaf for name, leaf in (("x", x), *net.named_parameters()) if leaf.is_floating_point()}
    values = {name: leaf.detach().double().requires_grad_(leaf.requires_grad) for name, leaf in names.items()}
    x, a, b = values["x"], values["0.lora_A"], values["0.lora_B"]
    dropped = reference.dropout(x, layer.lora_dropout, seed)
    y = x @ layer.decode().double().T + layer.scaling * dropped @ a.T @ b.T + values.get("0.bias", 0)
    leaves = [value for value in values.values() if value.requires_grad]
    expected = [y.detach()]
    if leaves:
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(ours[0].dtype).double()
        expected += torch.autograd.grad(y, leaves, grad)
    for one, other in zip(ours[:-1], expected, strict=True):
        types = layer.compute_dtype(torch.device("cpu")), ours[0].dtype, one.dtype
        assert (one.double() - other).abs().max() <= max(map(TOLERANCE.get, types)) * max(other.abs().max(), 1)


LIVES = given(st.integers(0, 2**32), st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=6), st.booleans())


@settings(max_examples=15, deadline=None)
@LIVES
def test_whatever_happens_between_two_calls(seed, actions, bias):
    live(seed, actions, bias)


@pytest.mark.slow
@settings(max_examples=600, deadline=None)
@LIVES
def test_whatever_happens_in_many_lives(seed, actions, bias):
    live(seed, actions, bias)


def live(seed, actions, bias):
    chance = random.Random(seed)
    net = made(bias=bias)
    for action in actions:
        (form,) = chance.choices([*FORMS], FORMS.values())
        x = inputs(chance)
        outcome(net, form, x)  # prepares, or has prepared, a call before the action
        net = action(net, chance) or net
        for _ in range(2):  # what was prepared before the action, and after it
            prepared = vars(net[0]).pop("_prepared", None)
            expected = outcome(net, form, x)
            vars(net[0])["_prepared"] = prepared
            ours = outcome(net, form, x)
            assert_same(ours, expected)
        assert_dense(net, form, x, ours)
    merge(net)
    assert type(net[0]) is nn.Linear and "_prepared" not in vars(net[0])


def count_kept_calls(monkeypatch):
    """A list that gets, for each call that finds one of before, whether that is used."""
    kept: list[bool] = []
    monkeypatch.setattr(PreparedCall, "facts_of", counted(kept))
    return kept


@pytest.mark.parametrize("lead", [(), (2,), (100,), (3, 5)])
def test_the_second_call_is_prepared(monkeypatch, lead):
    net = made()
    x = torch.randn(*lead, K)
    kept = count_kept_calls(monkeypatch)
    for _ in range(3):
        net(x)
    assert kept == [True, True]
    for form in (recomputed, within(torch.no_grad), with_hooks):
        kept.clear()
        outcome(net, form, x.clone().requires_grad_())
        assert kept and all(kept)


def test_the_second_batch_asks_nothing_again():
    """Types, operands, plans and memory were asked and made by the first."""
    net = made()
    x = torch.randn(100, K, requires_grad=True)
    net(x).sum().backward()
    used = set()

    def note(frame, event, _):
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(PACKAGE):
            used.add(file.relative_to(PACKAGE).as_posix())

    previous = sys.getprofile()
    sys.setprofile(note)
    try:
        net(x).sum().backward()
    finally:
        sys.setprofile(previous)
    assert {"layers/prepared_call.py", "kernels/eager.py", "kernels/scratch.py"} <= used
    asked = {f"kernels/{name}.py" for name in ("backends", "lora", "half")}
    asked |= {"layers/lora_layer.py", "layers/packed_layer.py", "quantization/kept_memory.py"}
    assert used.isdisjoint(asked)


def test_threads_that_call_one_layer():
    """Each in its own mode; one thread changes the layer meanwhile, and back."""
    net = made().eval()
    inputs = [torch.randn(rows, K) for rows in (1, 2, 70, 100)]
    expected = []
    for grad_mode in (False, True):  # few rows without gradients are one call of C
        with torch.set_grad_enabled(grad_mode):
            expected.append([net(x).detach() for x in inputs])

    def work(number):
        for turn in range(60):
            if number == 0:
                vars(net[0]).pop("_prepared", None)
            place, grad_mode = (number + turn) % len(inputs), turn % 3 > 0
            with torch.set_grad_enabled(grad_mode):
                y = net(inputs[place])
            assert_equal(y.detach(), expected[grad_mode][place])
        return True

    with ThreadPoolExecutor(5) as pool:
        assert all(pool.map(work, range(5)))


def test_a_copy_prepares_its_own_and_a_moved_layer_keeps_no_memory():
    net = made()
    net(torch.randn(2, K))
    assert net[0]._prepared is not None
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert other[0]._prepared is None
    net.to(torch.bfloat16)
    assert net[0]._prepared is None
    net(torch.randn(2, K))
    to_parameters(net)
    assert net[0]._prepared is None


def test_an_adapter_of_functional_call_is_not_kept():
    net = made()
    a = torch.randn(4, K, requires_grad=True) * 2
    torch.func.functional_call(net, {"0.lora_A": a}, torch.randn(2, K))
    assert net[0]._prepared is None


@pytest.mark.parametrize("change", [other_rank_by_data, other_strides, odd_address, other_type_by_data])
def test_a_parameter_with_other_data_in_the_backward_pass(change):
    """Autograd does not see `.data =`. Kernels write gradients by address, so their sizes are those of now."""
    net = made(lora_dropout=0.0)
    x = torch.randn(3, K, requires_grad=True)
    net(x)
    y = net(x)
    change(net, random.Random(1))
    layer = net[0]
    if layer.lora_A.shape[0] != 4:  # drop(x) A^T of the forward pass has another rank
        with pytest.raises(RuntimeError):
            y.sum().backward()
        return
    y.sum().backward()
    expected = made(lora_dropout=0.0)
    expected[0].lora_B.data = layer.lora_B.data
    expected(x.detach().requires_grad_()).sum().backward()
    assert_close(layer.lora_A.grad, expected[0].lora_A.grad)


@pytest.mark.slow
def test_fsdp_on_two_ranks():
    run_python("-m", "tests.scripts.prepared_on_ranks")
