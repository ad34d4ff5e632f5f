"""The state dict of a converted module: what it holds, what loads, what is refused."""

import copy
import warnings

import pytest
import torch
from lightning.fabric.utilities.load import _lazy_load
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from lightning_qlora import (
    CheckpointMismatchError,
    QLoRALinear,
    QLoRAPrecision,
    convert,
    load_adapter,
    merge,
    save_adapter,
)
from tests.conftest import Classifier, fingerprints, loader


def mlp(scale=1.0):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(10, 128), nn.Linear(128, 256), nn.BatchNorm1d(256), nn.Linear(256, 128), nn.Linear(128, 2)
    )
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    return model


def fresh(**arguments):
    model = mlp()
    convert(model, **{"r": 8, **arguments})
    return model


def trained(**arguments):
    model = fresh(**arguments)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, QLoRALinear):
                layer.lora_B.normal_()
        model[4].weight.normal_()
        model[2].running_mean.normal_()
    return model


def same_output(one, other):
    x = torch.arange(10)
    return torch.equal(one.eval()(x), other.eval()(x))


class Around(nn.Module):
    """A model in an attribute, as in a LightningModule, beside a part of the same shape."""

    def __init__(self, model):
        super().__init__()
        self.other = nn.Linear(128, 256)
        self.model = model


def test_keys_can_be_moved_into_a_part_and_out_of_it():
    """By `key.removeprefix("model.")`, as a model is taken out of a checkpoint of Lightning, and the other way."""
    part = trained()
    around = Around(mlp())
    convert(around, r=8, exclude_modules=["other"])
    own = {f"other.{key}": value for key, value in around.other.state_dict().items()}
    around.load_state_dict(own | {f"model.{key}": value for key, value in part.state_dict().items()})
    assert same_output(around.model, part)
    state = {key.removeprefix("model."): value for key, value in around.state_dict().items()}
    taken = fresh()
    taken.load_state_dict(state)
    assert same_output(taken, part)
    other = mlp(0.5)
    convert(other, r=8)
    with pytest.raises(CheckpointMismatchError, match="trained on another base weight"):
        other.load_state_dict(state)


def test_a_checkpoint_holds_what_trains_and_fingerprints():
    module = trained()
    with torch.no_grad():
        module[0].weight.copy_(module[0].weight.clone())  # as DDP does when it broadcasts
    state = module.state_dict()
    assert state.keys() == {
        "1.lora_A", "1.lora_B", "3.lora_A", "3.lora_B", "4.weight", "4.bias", "2.running_mean", "2.running_var",
        "2.num_batches_tracked", "_qlora_conversion",
    }  # fmt: skip
    assert len(state["_qlora_conversion"]) == 4096  # padded, as sharded checkpoints load into tensors of equal sizes
    assert fingerprints(state).keys() == {"0.weight", "1", "1.bias", "2.weight", "2.bias", "3", "3.bias"}


def test_bitsandbytes_reads_the_4_bit_weights_of_a_full_checkpoint():
    bnb = pytest.importorskip("bitsandbytes")
    module = trained(checkpoint="full")
    state = module.state_dict()
    entries = {key.removeprefix("1.weight."): value for key, value in state.items() if key.startswith("1.weight.")}
    weight = bnb.nn.Params4bit.from_prequantized(state["1.weight"], entries, device="cpu")
    assert torch.equal(bnb.functional.dequantize_4bit(weight.data, weight.quant_state), module[1].decode())


def test_a_dense_checkpoint_of_the_module_is_quantized_on_load():
    other = mlp(scale=1.7)
    target = fresh()
    start = target[1].lora_A.clone()
    target.load_state_dict(other.state_dict())
    expected = copy.deepcopy(other)
    convert(expected, r=8)
    assert torch.equal(target[1].packed, expected[1].packed)
    assert torch.equal(target[1].lora_A, start)
    assert same_output(target, expected)
    # a module that is built anew does not have its weights, so its state dict has them
    again = fresh()
    again.load_state_dict(target.state_dict())
    assert same_output(again, target) and again.state_dict().keys() == target.state_dict().keys()


ONE_LAYER = {"target_modules": ["1"], "modules_to_save": ["4"]}
OTHER_WEIGHT = r"^1: .*its fingerprint is [0-9a-f]+"
REFUSED = [  # a change of the base, the arguments of the conversion, those of the module that was saved, and the error
    (lambda m: m[1].weight.neg_(), {}, {}, OTHER_WEIGHT),
    (lambda m: m[1].weight[0].neg_(), {}, {}, OTHER_WEIGHT),
    (lambda m: m[0].weight.add_(1), {}, {}, r"^0\.weight: .*another base"),
    (lambda m: m[2].bias.add_(1), {}, {}, r"^2\.bias: .*another base"),
    (lambda m: m[3].bias.add_(1), {}, {}, r"^3\.bias: .*another base"),
    (None, {"r": 4}, {}, r"^1: .*rank 8 .*rank 4 .*Set r .or rank_pattern. so that it has rank 8"),
    (None, ONE_LAYER, {}, r"^3: has adapter in the checkpoint, has none here \(1 of 2 layers differ\)"),
    (None, {}, ONE_LAYER, r"^3: has no adapter in the checkpoint, has one here \(1 of 2 layers differ\)"),
    (None, {"lora_alpha": 32}, {}, r"lora_alpha is 16 in the checkpoint and 32 here"),
    (None, {"quant_type": "fp4"}, {}, r"^1: .*fingerprint"),
]


@pytest.mark.parametrize(("change", "arguments", "of_saved", "message"), REFUSED)
def test_another_base_and_other_arguments_are_refused_with_a_name(change, arguments, of_saved, message):
    module = mlp()
    if change is not None:
        with torch.no_grad():
            change(module)
    convert(module, **{"r": 8, **arguments})
    with pytest.raises(CheckpointMismatchError, match=message):
        module.load_state_dict(trained(**of_saved).state_dict())


def test_a_missing_adapter_is_still_missing():
    state = trained().state_dict()
    del state["3.lora_B"]
    with pytest.raises(RuntimeError, match=r"3\.lora_B"):
        fresh().load_state_dict(state)


@pytest.mark.parametrize("write", [lambda p: p.mul_(2), lambda p: p.data.mul_(2)], ids=["parameter", "data"])
@pytest.mark.parametrize("name", ["0.weight", "3.bias"])
def test_a_base_that_changed_since_its_conversion_is_refused(name, write):
    model = fresh()
    state = model.state_dict()
    model.load_state_dict(state)
    with torch.no_grad():
        write(model.get_parameter(name))
    with pytest.raises(CheckpointMismatchError, match=rf"^{name}: .*another base"):
        model.load_state_dict(state)


def test_a_base_that_was_cast_since_its_conversion_is_the_same_base():
    state = trained().state_dict()
    fresh().bfloat16().load_state_dict(state)


@pytest.mark.parametrize("same_object", [True, False])
@pytest.mark.parametrize("rows", [10, 12])
def test_parameters_that_were_replaced_are_kept(same_object, rows):
    """transformers' resize_token_embeddings assigns to `.data`, so that the tensor keeps its version."""
    source, target = trained(), fresh()
    for module in (source, target):
        module.state_dict()
        values = torch.full((rows, 128), 2.0 if module is source else 3.0)
        if same_object:
            module[0].weight.data = values
        else:
            module[0].weight = nn.Parameter(values, requires_grad=False)
    assert "0.weight" in source.state_dict() and "2.weight" not in source.state_dict()
    target.load_state_dict(source.state_dict())
    assert same_output(source, target)


@pytest.mark.parametrize("between", [merge, lambda module: None], ids=["merged", "no layer is large enough"])
def test_a_module_that_is_converted_again_saves_what_one_conversion_saves(between):
    """As the Trainer does for fit, validate and test; found by test_restart_parity of Lightning's test_loops.py."""
    module, once = (nn.Sequential(nn.Linear(64, 64) if between is merge else nn.Linear(4, 2)) for _ in range(2))
    convert(module, r=1)
    between(module)
    once.load_state_dict({key: value for key, value in module.state_dict().items() if key in once.state_dict()})
    convert(module, r=1)
    convert(once, r=1)
    found, expected = module.state_dict(), once.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def test_a_shared_layer_is_saved_and_loaded():
    layer = nn.Linear(64, 64)
    first = nn.Sequential(layer, nn.ReLU(), layer)
    second = copy.deepcopy(first)
    for net in (first, second):
        convert(net, r=4)
    first[0].lora_B.data += 1
    second.load_state_dict(first.state_dict())
    assert torch.equal(second[2].lora_B, first[0].lora_B)
    other = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 64))
    convert(other, r=4)
    with pytest.raises(CheckpointMismatchError, match=r"3: has no adapter in the checkpoint, has one here"):
        other.load_state_dict(first.state_dict())


ARGUMENTS = [{}, {"checkpoint": "full"}]


@pytest.mark.parametrize("arguments", [*ARGUMENTS, "dense"], ids=str)
def test_a_lazily_loaded_checkpoint(arguments, tmp_path):
    """Lightning's `_lazy_load` returns objects that load their tensor at the first use."""
    if arguments == "dense":
        source, target = mlp(scale=1.7), fresh()
    else:
        source, target = trained(**arguments), fresh(**arguments)
    torch.save(source.state_dict(), tmp_path / "x.ckpt")
    target.load_state_dict(_lazy_load(tmp_path / "x.ckpt"))
    if arguments == "dense":
        convert(source, r=8)
    assert same_output(source, target)


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["root", "part"])
def test_the_distributed_checkpoint_api_on_one_device(nested, arguments):
    source, target = trained(**arguments), fresh(**arguments)
    if nested:
        source, target = nn.ModuleDict({"part": source}), nn.ModuleDict({"part": target})
    state = get_model_state_dict(source)
    assert state.keys() == source.state_dict().keys()
    set_model_state_dict(target, state)
    if nested:
        source, target = source["part"], target["part"]
    assert same_output(source, target)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_averages_of_state_dicts_that_leave_counters_alone(dtype):
    """As boltz, NeMo and Bio-Diffusion average `state_dict()` in each step; files of before have 32 bits."""
    source, target = fresh(), fresh()
    state = {key: value.clone() for key, value in source.state_dict().items()}
    for step in range(3):
        with torch.no_grad():
            source[1].lora_B.add_(step)
        for key, value in source.state_dict().items():
            if value.dtype != torch.long:
                state[key].mul_(0.5).add_(value, alpha=0.5)
    state["_qlora_conversion"] = state["_qlora_conversion"].to(dtype)
    target.load_state_dict(state)
    assert torch.equal(target[1].lora_B, torch.full_like(target[1].lora_B, 0 + 0.5 * 0.5 * 1 + 0.5 * 3))


def test_a_state_dict_of_a_part_is_whole_after_an_error_in_that_of_the_module():
    class Broken(nn.Module):
        def get_extra_state(self):
            raise KeyError("no state")

    module = trained()
    whole = module[1].state_dict()
    module.append(Broken())
    with pytest.raises(KeyError, match="no state"):
        module.state_dict()
    assert module[1].state_dict().keys() == whole.keys() and "weight" in whole
    del module[5]
    assert "1.weight" not in module.state_dict()


class Counting(nn.Linear):
    def __init__(self, width):
        super().__init__(width, width)
        self.register_buffer("seen", torch.zeros(()))
        self.gate = nn.Parameter(torch.linspace(0, 1, width))

    def forward(self, x):
        self.seen += 1
        return super().forward(x) * self.gate


@pytest.mark.parametrize("arguments", [{}, {"checkpoint": "full"}])
def test_buffers_and_parameters_of_a_subclass_are_saved_loaded_and_merged(arguments):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(Counting(64))

    model = build()
    convert(model, r=4, **arguments)
    assert not model[0].gate.requires_grad
    with torch.no_grad():
        model[0].lora_B.normal_()
    x = torch.randn(2, 64)
    expected = model.eval()(x)
    state = model.state_dict()
    assert state["0.seen"] == 1 and "0.gate" in (state if arguments else fingerprints(state))
    convert(other := build(), r=4, **arguments)
    other.load_state_dict(state)
    assert torch.equal(other.eval()(x), expected) and other[0].seen == 2
    changed = build()
    with torch.no_grad():
        changed[0].gate += 1
    convert(changed, r=4, **arguments)
    if arguments:
        changed.load_state_dict(state)
        assert torch.equal(changed.eval()(x), expected)
    else:
        with pytest.raises(CheckpointMismatchError, match=r"0\.gate"):
            changed.load_state_dict(state)
    merge(model)
    assert model.state_dict().keys() == build().state_dict().keys() and type(model[0]) is Counting
    torch.testing.assert_close(model(x), expected)
    build().load_state_dict(model.state_dict())


def test_an_extra_parameter_trains_if_its_layer_is_in_modules_to_save():
    model = nn.Sequential(Counting(64), nn.Linear(64, 64))
    convert(model, r=4, modules_to_save=["0"])
    assert type(model[0]) is Counting and model[0].gate.requires_grad


@pytest.mark.parametrize("save", ["save_adapter", "merge"])
def test_adapters_with_nan_are_not_written_and_the_layer_and_step_are_named(trainer, tmp_path, save):
    module = Classifier()
    fit = trainer(plugins=QLoRAPrecision(r=4), max_steps=2, enable_checkpointing=False)
    fit.fit(module, loader())
    steps = {
        "save_adapter": lambda: save_adapter(module, tmp_path / "folder"),
        "merge": lambda: merge(module),
    }
    if save != "merge":
        steps[save]()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    before = [path.read_bytes() for path in files]
    with torch.no_grad():
        module.net[0].lora_B[3, 1] = float("nan")
    with pytest.raises(ValueError, match=r"net\.0: its adapter holds NaN or Inf after step 2, as those of 1 of 2"):
        steps[save]()
    assert [path.read_bytes() for path in files] == before
    assert torch.isnan(module.net[0].lora_B).any()


def test_a_state_that_was_filtered_by_the_keys_of_the_module_is_named():
    """Many warm starts keep the keys that the module has with equal shapes: biases, and not the weights."""
    old, target = mlp(scale=2.0).state_dict(), fresh()
    own = dict(target.named_parameters())
    filtered = {key: value for key, value in old.items() if key in own and own[key].shape == value.shape}
    assert {"1.bias", "0.weight"} <= filtered.keys() and "1.weight" not in filtered
    message = r"^load_state_dict gets biases .* not their weights.*Pass the whole state dict\.$"
    with pytest.warns(UserWarning, match=message):
        target.load_state_dict(filtered, strict=False)
    again, source = fresh(), trained()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        target.load_state_dict(old)
        again.load_state_dict(source.state_dict())


def test_values_that_are_added_to_a_state_are_loaded():
    old, target = mlp(scale=2.0).state_dict(), fresh()
    state = target.state_dict()
    state.update({key: old[key] for key in ("0.weight", "2.bias", "3.weight")})
    target.load_state_dict(state)
    expected = mlp()
    with torch.no_grad():
        expected[3].weight.mul_(2)
    convert(expected, r=8)
    assert torch.equal(target[0].weight, old["0.weight"]) and torch.equal(target[3].packed, expected[3].packed)
    assert "0.weight" in target.state_dict()


def test_a_frozen_parameter_that_the_module_lacks_is_an_unexpected_key():
    source = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64))
    other = nn.Sequential(nn.Linear(64, 64), nn.Identity(), nn.Linear(64, 64))
    other.load_state_dict(source.state_dict(), strict=False)
    for module in (source, other):
        convert(module, r=4)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "1\.weight", "1\.bias"'):
        other.load_state_dict(source.state_dict())


@pytest.mark.parametrize("arguments", [{}, {"use_dora": True}], ids=str)
def test_a_module_on_the_meta_device_takes_a_full_state_by_assignment(arguments):
    """The bytes stayed on the meta device, and the next call ended the process."""
    module = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64))
    convert(module, r=4, lora_dropout=0.0, checkpoint="full", **arguments)
    for layer in (module[0], module[2]):
        nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(4, 64)
    expected = module(x)
    empty = copy.deepcopy(module).to("meta")
    with pytest.raises(ValueError, match="0: x is on cpu, the 4-bit weight is on meta"):
        empty(x)
    empty.load_state_dict(copy.deepcopy(module.state_dict()), assign=True)
    assert torch.equal(empty(x), expected)
    empty(x).sum().backward()
    module(x).sum().backward()
    assert torch.equal(empty[0].lora_A.grad, module[0].lora_A.grad)


def test_what_one_state_left_out_the_next_one_may_not_lack():
    module = Classifier()
    convert(module, r=4)
    module.load_state_dict(module.state_dict())  # without the frozen norm
    dense = Classifier(seed=1).state_dict()
    del dense["net.2.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "net\.2\.weight"'):
        module.load_state_dict(dense)


def test_a_dense_state_under_trained_adapters_is_no_new_begin_and_says_so():
    """As in a cross-validation that loads the weights from before the first fold."""
    module = Classifier()
    dense = copy.deepcopy(module.state_dict())
    convert(module, r=4)
    begin = copy.deepcopy(module.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.load_state_dict(dense)
    nn.init.normal_(module.net[0].lora_B)
    trained = module.net[0].lora_B.clone()
    with pytest.warns(UserWarning, match="build the module again, or load a state dict that was made after"):
        module.load_state_dict(dense)
    assert torch.equal(module.net[0].lora_B, trained)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.load_state_dict(begin)
    assert not module.net[0].lora_B.any()


def test_a_module_is_walked_over_a_few_times_however_many_parts_it_has(monkeypatch, tmp_path):
    """Each function had looked through the module for itself: 76 walks of a conversion, 18 of a state dict."""
    module = Classifier()
    walks = 0
    named_modules = nn.Module.named_modules

    def counted(self, memo=None, *arguments, **named):
        nonlocal walks
        walks += self is module and memo is None
        return named_modules(self, memo, *arguments, **named)

    monkeypatch.setattr(nn.Module, "named_modules", counted)

    def walks_of(action):
        nonlocal walks
        walks = 0
        action()
        return walks

    assert 0 < walks_of(lambda: convert(module, r=4)) <= 3
    state = module.state_dict()
    for action in (
        module.state_dict,
        lambda: module.load_state_dict(state),
        lambda: save_adapter(module, tmp_path),
        lambda: load_adapter(module, tmp_path),
        lambda: merge(module),
    ):
        assert 0 < walks_of(action) <= 2


@pytest.mark.parametrize(
    ("key", "error"),
    [
        ("1.lora_A", r"^1: the checkpoint's adapter has rank 2097152 for 2097152 inputs, this layer's has rank 8"),
        ("1.lora_B", r"size mismatch for 1\.lora_B"),
        ("1.initial_A", r"^1\.initial_A: has shape \[2097152, 2097152\], and must have \[8, \d+\]"),
    ],
)
def test_an_expanded_adapter_of_another_shape_is_refused_before_it_is_copied(key, error):
    """A file of some bytes would take 16 TB."""
    state = trained().state_dict() | {key: torch.zeros(1, 1).expand(1 << 21, 1 << 21)}
    with pytest.raises((RuntimeError, ValueError), match=error):
        fresh().load_state_dict(state)
