"""State dicts of parts of a converted module, of modules around it, and of modules that were converted twice."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.nn.parallel import DistributedDataParallel

from lightning_qlora import CheckpointMismatchError, convert
from lightning_qlora.layers.qlora_linear import adapted_layers

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))


def encoder():
    return nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Identity(), nn.Linear(64, 64))


def build(seed=0, **arguments):
    torch.manual_seed(0)
    module = nn.Sequential()
    module.encoder = encoder()
    module.head = nn.Linear(64, 64)
    if seed:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    convert(module, **{"r": 4, **arguments})
    for number, layer in enumerate(adapted_layers(module).values()):
        nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(100 * seed + number))
    return module.eval()


def same(one, other):
    return torch.equal(one(X), other(X))


@pytest.mark.parametrize("arguments", [{}, {"checkpoint": "full"}], ids=str)
def test_a_part_and_a_single_layer_load_alone_into_parts_of_another_base(arguments):
    source, target = build(**arguments), build(seed=3, **arguments)
    file = io.BytesIO()
    torch.save(source.encoder.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert "_qlora_conversion" not in state and {"0.weight.absmax", "1.bias", "3.bias"} <= state.keys()
    target.encoder.load_state_dict(state)
    target.head.load_state_dict(source.head.state_dict())
    assert same(target, source) and same(target.encoder, source.encoder)


def test_a_module_around_a_part_saves_and_loads_it():
    source, target = build(), build(seed=3)
    state = nn.ModuleDict({"policy": source.encoder}).state_dict()
    assert not [key for key in state if key.endswith("_qlora_conversion")]
    around = nn.ModuleDict({"policy": target.encoder})
    around.load_state_dict(state)
    assert same(target.encoder, source.encoder)
    without = {key: value for key, value in state.items() if ".3.weight" not in key}
    with pytest.raises(RuntimeError, match=r"Missing key.*policy\.3\.weight"):
        around.load_state_dict(without)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda part: pickle.loads(pickle.dumps(part))], ids=["copy", "pickle"])
def test_copies_of_parts_save_and_load_themselves(how):
    source = build()
    part = how(source.encoder)
    assert not part._state_dict_hooks and not part._load_state_dict_pre_hooks
    assert part.state_dict().keys() == source.encoder.state_dict().keys()
    target = build(seed=3)
    target.encoder.load_state_dict(part.state_dict())
    assert same(target.encoder, source.encoder)
    again = how(source)
    assert again.state_dict().keys() == source.state_dict().keys()


def test_a_part_with_another_scale_is_refused_and_one_without_its_base_is_incomplete():
    state = build().encoder.state_dict()
    with pytest.raises(CheckpointMismatchError, match=r"0: lora_alpha is 16 in the checkpoint and 8 here"):
        build(lora_alpha=8).encoder.load_state_dict(state)
    with pytest.raises(ValueError, match=r"3\.adapter_arguments: not valid JSON"):
        build().encoder.load_state_dict({**state, "3.adapter_arguments": torch.zeros(2, dtype=torch.uint8)})
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):  # the bytes
        encoder().load_state_dict(state, strict=False)
    of_whole = {key: value for key, value in build().state_dict().items() if key.startswith("encoder.")}
    without_base = {key.removeprefix("encoder."): value for key, value in of_whole.items()}
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.weight.*3\.weight"):
        build().encoder.load_state_dict(without_base)
    with pytest.raises(RuntimeError, match=r"Missing key.*_qlora_conversion"):
        build().load_state_dict({key: value for key, value in build().state_dict().items() if ".lora_" in key})


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_an_average_of_the_floats_of_state_dicts_of_a_part_has_its_base(decay, double_quant):
    source = build(double_quant=double_quant).encoder
    average = copy.deepcopy(source)
    state = average.state_dict()
    expected = source[0].lora_B.detach().clone()
    for _ in range(3):
        with torch.no_grad():
            source[0].lora_B.normal_()
        expected = expected * decay + source[0].lora_B.detach() * (1 - decay)
        for key, value in source.state_dict().items():
            if value.is_floating_point():
                state[key] = state[key] * decay + value * (1 - decay)
        average.load_state_dict(state)
    assert torch.equal(average[0].lora_B, expected) and torch.equal(average[0].packed, source[0].packed)
    torch.testing.assert_close(average[0].decode(), source[0].decode())


def test_an_average_of_bytes_says_what_to_leave_out():
    mean = {key: value * 0.9 for key, value in build().encoder.state_dict().items()}
    with pytest.raises(ValueError, match="Code that averages state dicts has to leave out what is not floating point"):
        build().encoder.load_state_dict(mean)


def test_a_part_of_a_dense_checkpoint_is_quantized():
    torch.manual_seed(5)
    dense = encoder()
    target = build()
    adapters = {name: layer.lora_B.clone() for name, layer in adapted_layers(target.encoder).items()}
    target.encoder.load_state_dict(dense.state_dict())
    convert(dense, r=4)
    for name, layer in adapted_layers(dense).items():
        assert torch.equal(adapted_layers(target.encoder)[name].packed, layer.packed)
        assert torch.equal(adapted_layers(target.encoder)[name].lora_B, adapters[name])


@pytest.mark.parametrize("outer", ["adapter", "full"])
@pytest.mark.parametrize("inner", ["adapter", "full"])
@pytest.mark.parametrize("first", ["part", "whole"])
def test_a_part_that_was_converted_as_a_module_too(first, inner, outer):
    """The outer module's arguments decide what its state dict holds, the part's those of its own."""

    def twice(seed=0):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
        module = nn.ModuleDict({"net": net, "other": nn.Linear(64, 64)})
        with torch.no_grad():
            net[0].weight.mul_(1 - 2 * seed)
        calls = [(net, inner), (module, outer)]
        for part, checkpoint in calls if first == "part" else reversed(calls):
            convert(part, r=4, checkpoint=checkpoint)
        nn.init.normal_(net[0].lora_B)
        return module.eval()

    source = twice()
    state = source.state_dict()
    assert [key for key in state if key.endswith("_qlora_conversion")] == ["_qlora_conversion"]
    assert ("net.0.weight.absmax" in state) is ("net.1.weight" in state) is (outer == "full")
    target = twice()
    target.load_state_dict(state)
    assert torch.equal(target["net"](X), source["net"](X))
    assert target.state_dict().keys() == state.keys()
    of_part = source["net"].state_dict()
    assert ("0.weight.absmax" in of_part) is (inner == "full")
    target["net"].load_state_dict(of_part)
    if outer == inner == "adapter":
        with pytest.raises(CheckpointMismatchError, match=r"net\.0"):
            twice(seed=1).load_state_dict(state)
    source["net"][1].bias.data += 1  # a write after conversion
    target.load_state_dict(source.state_dict())
    assert torch.equal(target["net"](X), source["net"](X))
    again = twice()
    again.load_state_dict(target.state_dict())  # it is not taken for the base
    assert torch.equal(again["net"](X), source["net"](X))


@pytest.mark.parametrize("arguments", [{}, {"checkpoint": "full"}], ids=str)
def test_wrappers_of_the_whole_and_of_parts(arguments, one_rank):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    source, target = build(**arguments), build(**arguments)
    plain = source.state_dict()
    wrapped = DistributedDataParallel(source)
    assert {key.removeprefix("module.") for key in wrapped.state_dict()} == plain.keys()
    DistributedDataParallel(target).load_state_dict(wrapped.state_dict())
    assert same(target, source)
    compiled = torch.compile(source)
    assert {key.removeprefix("_orig_mod.") for key in compiled.state_dict()} == plain.keys()
    state = get_model_state_dict(wrapped)
    assert state.keys() == plain.keys()
    other = build(seed=0 if not arguments else 3, **arguments)
    set_model_state_dict(other, state)
    assert same(other, source)
    part = get_model_state_dict(source.encoder)
    set_model_state_dict(other.encoder, part)
    assert same(other.encoder, source.encoder)
    source.encoder = torch.compile(source.encoder)
    assert "encoder._orig_mod.0.weight.absmax" not in source.state_dict() or arguments
    source.load_state_dict(source.state_dict())


def test_a_layer_that_is_also_held_outside_of_its_module_is_whole_there():
    source, target = build(), build()
    around = nn.ModuleDict({"model": source, "alias": source.head})
    state = around.state_dict()
    assert "alias.weight.absmax" in state and "model.head.weight.absmax" not in state
    nn.ModuleDict({"model": target, "alias": target.head}).load_state_dict(state)
    assert same(target, source)
