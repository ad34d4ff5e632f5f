"""Copies of layers that `__init__` made: averages of weights, teachers."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_qlora import convert
from lightning_qlora.conversion.notes import COPY, HELD
from tests.conftest import every_pair
from tests.experts.test_experts import made, qwen3_moe


class Buffers(nn.Module):
    """An average in buffers whose names have no dots, as latent-diffusion's LitEma."""

    def __init__(self, net):
        super().__init__()
        for name, parameter in net.named_parameters():
            self.register_buffer(name.replace(".", ""), parameter.detach().clone())


def body(width=64):
    return nn.Sequential(nn.Linear(width, 128), nn.GELU(), nn.Linear(128, width))


def copies_of(module):
    """Name of each copy -> that of its original."""
    notes = convert(module, r=4, lora_dropout=0.0).notes
    return {
        name: text.removeprefix("copy of ").partition(": ")[0]
        for text, names in notes.items()
        for name in names
        if COPY in text
    }


AVERAGES = {  # how a copy that stays dense is made -> its name and that of the original, and these where it comes first
    copy.deepcopy: ({"average": "net"}, {"net": "average"}),
    AveragedModel: ({"average.module": "net"}, {"net": "average.module"}),
    Buffers: ({"average": "net.* (x2)"},) * 2,
    lambda net: copy.deepcopy(net).float(): ({"average": "net"}, {"net": "average"}),  # held in fp32
}


@pytest.mark.parametrize(
    ("average", "trains", "dtype", "is_first"),
    every_pair([*AVERAGES], (False, True), (torch.float32, torch.bfloat16), (False, True)),
)
def test_a_row_names_a_copy_and_says_when_to_make_it(average, trains, dtype, is_first):
    net = body().to(dtype)
    parts = {"net": net, "average": average(net).requires_grad_(trains)}
    module = nn.ModuleDict(dict(reversed(parts.items())) if is_first else parts)
    expected = {} if trains and average is not Buffers else AVERAGES[average][is_first]  # else both are in 4 bits
    assert copies_of(module) == expected


def test_a_row_names_the_layers_where_those_of_the_original_stand_beside_the_copy():
    class Beside(nn.Module):
        def __init__(self, is_first):
            super().__init__()
            parts = {"first": nn.Linear(64, 128), "second": nn.Linear(128, 64)}
            average = nn.ModuleDict(copy.deepcopy(parts)).requires_grad_(False)
            parts = {"average": average, **parts} if is_first else {**parts, "average": average}
            for name, part in parts.items():
                setattr(self, name, part)

    assert copies_of(Beside(False)) == {"average": "first, second"}
    assert copies_of(Beside(True)) == {"first": "average", "second": "average"}


def test_copies_that_train_begin_with_the_same_adapters_and_are_no_matter():
    net = body()
    others = {"copied": copy.deepcopy(net), "other": body()}
    module = nn.ModuleDict({"net": net, **others})
    assert len(copies_of(module)) == 0
    for index in (0, 2):
        assert torch.equal(module["copied"][index].lora_A, net[index].lora_A)
        assert not torch.equal(module["other"][index].lora_A, net[index].lora_A)


def test_stacks_of_experts_too():
    model = made(qwen3_moe).requires_grad_(True)
    module = nn.ModuleDict({"model": model, "average": copy.deepcopy(model)})
    assert copies_of(module) == {}
    first, second = (module[name].model.layers[0].mlp.experts.gate_up_proj_experts for name in ("model", "average"))
    assert torch.equal(first.lora_A, second.lora_A)


def test_what_is_no_copy_has_no_row():
    torch.manual_seed(0)
    zeros = nn.ModuleDict({"one": body(), "two": body()})
    for part in zeros.values():
        nn.init.zeros_(part[2].weight)  # as diffusion models begin
    tied = nn.ModuleDict({"one": nn.Linear(64, 64), "two": nn.Linear(64, 64), "three": nn.Linear(64, 64)})
    tied["two"].weight = tied["one"].weight
    tied["three"].weight = nn.Parameter(tied["one"].weight.detach())  # the same memory
    similar = nn.ModuleDict({"one": body()})
    similar["two"] = copy.deepcopy(similar["one"])
    for layer in (similar["two"][0], similar["two"][2]):
        layer.weight.data[1, 1] += 1
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 2, 128), 3, enable_nested_tensor=False)
    ensemble = nn.ModuleList([body()])
    ensemble.append(copy.deepcopy(ensemble[0]))
    net = body()
    assert not copies_of(net)
    after = nn.ModuleDict({"net": net, "average": AveragedModel(net)})  # made after conversion
    for module in (after, zeros, tied, similar, encoder, ensemble, nn.ModuleDict({"one": body(), "two": body()})):
        assert not copies_of(module)


class Shadow:
    """An average in a list of tensors, as torch_ema."""

    def __init__(self, net):
        self.shadow = [parameter.detach().clone() for parameter in net.parameters()]


@pytest.mark.parametrize(
    "hold",
    [Shadow, lambda net: [copy.deepcopy(net)], lambda net: list(net.parameters()), lambda net: net.state_dict()],
    ids=["average", "hidden module", "weights", "state dict"],
)
def test_an_attribute_that_holds_weights_of_before_is_named(hold):
    module = nn.ModuleDict({"net": body()})
    module.held = hold(module["net"])
    assert convert(module, r=4, lora_dropout=0.0).notes[HELD.format("net.* (x2)")] == ["held"]


@pytest.mark.parametrize("hold", [lambda net: [net[0]], lambda net: torch.optim.SGD(net.parameters(), 0.1), Shadow])
def test_other_attributes_are_not(hold):
    module = nn.ModuleDict({"net": body()})
    module.held = hold(body() if hold is Shadow else module["net"])
    assert not any("holds weights" in text for text in convert(module, r=4, lora_dropout=0.0).notes)
