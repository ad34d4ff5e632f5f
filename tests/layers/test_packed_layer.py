"""4-bit layers in code that was written for dense ones: loops over `parameters()`, `buffers()` and `state_dict()`.

Each loop must do what it does to a dense module, to what trains, and change no byte of a 4-bit weight. Others, such as
vectors and moving averages by hand, are actions of tests/test_twin.py.
"""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from lightning_qlora import convert, merge
from lightning_qlora.layers.packed_layer import BASE, to_parameters
from lightning_qlora.layers.qlora_linear import adapted_layers
from tests.conftest import tensors
from tests.toys import assert_equal, perturb


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(64, 48)
        self.norm = nn.BatchNorm1d(48)
        self.head = nn.Linear(48, 8)

    def forward(self, x):
        x = x.to(next(self.parameters()).dtype)  # as many modules do
        return self.head(self.norm(self.inner(x)).relu())


def converted(seed=0, base_seed=0, **arguments):
    torch.manual_seed(base_seed)
    module = Net()
    convert(
        module, **{"r": 4, "lora_dropout": 0.0, "target_modules": ["inner"], "modules_to_save": ["head"], **arguments}
    )
    return perturb(module, 0.1, seed)


def base(module):
    return {name: value.clone() for name, value in tensors(module).items() if name.rpartition(".")[2] in BASE}


def trained(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def by_foreach(module):
    torch._foreach_mul_(list(module.parameters()), 0.9)


def by_subtraction(module):  # torch_ema
    shadows = [parameter.clone().detach() for parameter in module.parameters()]
    for shadow, parameter in zip(shadows, module.parameters(), strict=True):
        shadow.sub_(0.1 * (shadow - 0 * parameter))
        parameter.data.copy_(shadow.data)


def by_state_dict(module):
    state = module.state_dict()
    module.load_state_dict({k: 0.9 * v if v.is_floating_point() else v for k, v in state.items()})


def by_buffers_too(module):
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.mul_(0.9)


@pytest.mark.parametrize("loop", [by_foreach, by_subtraction, by_state_dict, by_buffers_too])
@torch.no_grad()
def test_arithmetic_over_all_parameters_changes_what_trains_and_no_byte(loop):
    module = converted()
    bytes_before = base(module)
    before = trained(module)
    loop(module)
    torch.testing.assert_close(trained(module), {name: 0.9 * value for name, value in before.items()})
    assert_equal(base(module), bytes_before)


def test_what_is_read_from_all_parameters_is_that_of_what_trains_and_of_what_is_dense():
    module = converted()
    parameters = list(module.parameters())
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert all(buffer.dtype in (torch.float32, torch.int64) for buffer in module.buffers())
    assert sum(map(torch.numel, parameters)) == sum(map(torch.numel, trained(module).values())) + 48 * 3
    sum(parameter.pow(2).sum() for parameter in parameters).backward()
    assert torch.equal(module.inner.lora_B.grad, 2 * module.inner.lora_B)
    assert nn.utils.clip_grad_norm_(parameters, 1.0) > 0
    assert module(torch.randn(4, 64, dtype=torch.float64)).dtype is torch.float32
    module.requires_grad_(True)
    module(torch.randn(4, 64)).sum().backward()
    assert all(parameter.grad is not None for parameter in parameters)
    torch.optim.AdamW(parameters, weight_decay=0.1).step()
    assert_equal(base(module), base(converted()))


@pytest.mark.parametrize(
    ("average", "use_buffers", "expected"), [({}, True, 1.0), ({"avg_fn": get_ema_avg_fn(0.9)}, False, 0.29)]
)
def test_torchs_averages_average_what_trains(average, use_buffers, expected):
    module = converted()
    del module.norm.num_batches_tracked  # torch's own averages of integers differ from version to version
    module.norm.track_running_stats = False
    averaged = AveragedModel(module, use_buffers=use_buffers, **average)
    for number in range(3):
        with torch.no_grad():
            module.inner.lora_B.fill_(number)
            module.norm.running_mean.fill_(number)
        averaged.update_parameters(module)
    assert averaged.module.inner.lora_B[0, 0].item() == pytest.approx(expected)
    assert averaged.module.norm.running_mean[0].item() == pytest.approx(expected if use_buffers else 2.0)
    assert_equal(base(averaged.module), base(converted()))
    assert isinstance(merge(averaged.module).inner.weight, nn.Parameter)


def test_copies_and_casts_keep_the_bytes_and_a_transfer_moves_them():
    module = converted()
    other = copy.deepcopy(module)
    assert other.inner.packed is not module.inner.packed
    for cast in (nn.Module.half, nn.Module.double, lambda m: m.type(torch.float32)):
        assert_equal(base(cast(other)), base(module))
    assert all(tensor.is_meta for tensor in tensors(other.to("meta")).values())


@pytest.mark.parametrize(("clients", "checkpoint"), [(2, "adapter"), (5, "adapter"), (5, "full")])
def test_the_mean_of_whole_state_dicts_loads_and_another_base_is_refused(clients, checkpoint):
    modules = [converted(seed, checkpoint=checkpoint) for seed in range(clients)]
    states = [module.state_dict() for module in modules]
    if checkpoint == "full":  # the bytes of the base are uint8, whose sum wraps in any federated average
        mean = {k: sum(s[k] for s in states) / clients if v.is_floating_point() else v for k, v in states[0].items()}
    else:
        mean = {key: sum(state[key] for state in states) / clients for key in states[0]}
    expected = sum(module.inner.lora_A.detach().clone() for module in modules) / clients
    modules[0].load_state_dict(mean)
    torch.testing.assert_close(modules[0].inner.lora_A.detach(), expected)
    assert_equal(base(modules[0]), base(modules[1]))
    if checkpoint == "adapter":
        other = converted(base_seed=1)
        mixed = {key: (states[1][key] + value) / 2 for key, value in other.state_dict().items()}
        with pytest.raises(RuntimeError, match="another base weight"):
            modules[1].load_state_dict(mixed)


def test_bytes_are_parameters_for_a_strategy_that_splits_them_and_state_dicts_stay_the_same():
    module = converted()
    split = converted()
    to_parameters(split)
    layer = adapted_layers(split)["inner"]
    assert all(isinstance(layer._parameters[name], nn.Parameter) for name in BASE)
    assert not any(layer._parameters[name].requires_grad for name in BASE)
    assert_equal(tensors(split), tensors(module))
    assert split.state_dict().keys() == module.state_dict().keys()
    split.load_state_dict(module.state_dict())
    x = torch.randn(4, 64)
    assert torch.equal(split.eval()(x), module.eval()(x))
    parameters = dict(split.named_parameters())
    other = converted(checkpoint="full")
    other.inner.quantize_weight(torch.randn(48, 64))
    split.load_state_dict(other.state_dict())
    assert all(parameter is parameters[name] for name, parameter in split.named_parameters())
    assert torch.equal(split(x), other.eval()(x))
    assert type(merge(split).inner) is nn.Linear
    assert set(dict(split.inner.named_parameters())) == {"weight", "bias"}
