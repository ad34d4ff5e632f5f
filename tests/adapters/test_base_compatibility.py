"""Adapters that fit certain 4-bit weights alone: loaded on these, refused on others, converted for the float base."""

import copy
import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lightning_qlora import (
    CheckpointMismatchError,
    QLoRAPrecision,
    calibrate,
    convert,
    load_adapter,
    load_from_checkpoint,
    save_adapter,
)
from lightning_qlora.adapters.base_compatibility import Quantization, required_base, trained_on
from lightning_qlora.adapters.peft_folder import read_adapter, write_adapter
from lightning_qlora.checkpoints.from_checkpoint import read_adapter_from_checkpoint
from lightning_qlora.checkpoints.saved_conversion import entry_of, text_of
from lightning_qlora.config import QLoRAConfig, arguments_that
from lightning_qlora.survey.records import CONVERSION
from lightning_qlora.tools.cli import main
from lightning_qlora.tools.merge_folder import merge_folder
from tests.adapters.folders import adapter_of, assert_same_tensors, read_config
from tests.conftest import elsewhere, raises_in_one_line
from tests.toys import ARGUMENTS, Lit, assert_equal, delta, ids, logits, perturb, save_in_4_bits, toy

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:These adapters were initialized as")
KIND = type(toy("llama"))


@pytest.fixture
def base(tmp_path):
    toy("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def trained(base, tmp_path, trainer):
    """Trains on the folder "base" with some arguments; saves the folder "adapter" and the file "last.ckpt"."""

    def train(**arguments):
        lit = load_base(base)
        run = trainer(plugins=QLoRAPrecision(**ARGUMENTS, **arguments), max_steps=2)
        run.fit(lit)
        run.save_checkpoint(tmp_path / "last.ckpt")
        save_adapter(lit, tmp_path / "adapter")
        return lit

    return train


def load_base(folder):
    return Lit(KIND.from_pretrained(folder))


def stored_quantization(folder):
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return json.loads(file.metadata()["lightning_qlora"])


def test_another_quantization_than_that_of_the_initialization_is_refused(trained, tmp_path):
    trained(init_lora_weights="calibrated")
    message = (
        r"q_proj: the adapter was initialized as 'calibrated' from the error of .*quant_type=nf4, .* here it is .*"
    )
    for key, value in (("quant_type", "fp4"), ("block_size", 128), ("double_quant", False)):
        with pytest.raises(CheckpointMismatchError, match=f"{message}{key}={value}"):
            convert(load_base(tmp_path / "base"), adapter=str(tmp_path / "adapter"), **{key: value})
    for quant_type in ("nf4", "fp4"):
        save_in_4_bits(KIND, tmp_path / "base", tmp_path / quant_type, bnb_4bit_quant_type=quant_type)
    adapter = read_adapter(tmp_path / "adapter")
    merge_folder(tmp_path / "nf4", adapter, tmp_path / "out")
    with pytest.raises(CheckpointMismatchError, match=f"{message}quant_type=fp4"):
        merge_folder(tmp_path / "fp4", adapter, tmp_path / "out2")


class OfFolder(Lit):
    def __init__(self, folder):
        super().__init__(KIND.from_pretrained(folder))
        self.save_hyperparameters()


def test_the_initialization_is_stored_again_and_a_folder_does_not_hold_its_values(trained, tmp_path, trainer):
    """From folder to module to folder, and from there to a checkpoint, its module and a folder."""
    lit = trained(init_lora_weights="calibrated")
    again = OfFolder(str(tmp_path / "base"))
    run = trainer(plugins=QLoRAPrecision(adapter=str(tmp_path / "adapter"), lora_dropout=0.0), max_steps=1)
    run.fit(again)
    run.save_checkpoint(tmp_path / "x.ckpt")
    write_adapter(read_adapter_from_checkpoint(tmp_path / "x.ckpt"), tmp_path / "0")
    third = load_from_checkpoint(OfFolder, tmp_path / "x.ckpt")
    resumed = OfFolder(str(tmp_path / "base"))
    trainer(plugins=QLoRAPrecision(**ARGUMENTS), max_steps=1).fit(resumed, ckpt_path=tmp_path / "x.ckpt")
    for number, module in enumerate((again, third, resumed), start=1):
        assert torch.equal(logits(module.model), logits(again.model))
        with pytest.warns(UserWarning, match="These adapters were initialized as 'calibrated'"):
            save_adapter(module, tmp_path / str(number))
    for number in range(4):
        assert stored_quantization(tmp_path / str(number)) == stored_quantization(tmp_path / "adapter")

    same = load_base(tmp_path / "base")
    convert(same, r=4, lora_alpha=5)
    load_adapter(same, tmp_path / "adapter")
    assert torch.equal(logits(same.model), logits(lit.model))
    for module in (again, third, resumed, same):
        with pytest.raises(ValueError, match=r"q_proj: its initial values are not known, because an adapter folder"):
            save_adapter(module, tmp_path / "float", base="float")


@pytest.mark.parametrize("method", ["default", "calibrated"])  # of the module that loads both
def test_a_plain_adapter_loaded_after_a_calibrated_one_is_plain(method, trained, tmp_path):
    trained(init_lora_weights="calibrated")
    plain = load_base(tmp_path / "base")
    convert(plain, **ARGUMENTS)
    save_adapter(perturb(plain), tmp_path / "plain")
    lit = load_base(tmp_path / "base")
    convert(lit, **ARGUMENTS, init_lora_weights=method)
    load_adapter(lit, tmp_path / "adapter")
    with pytest.raises(ValueError, match="its initial values are not known"):  # those of the conversion are others
        save_adapter(lit, tmp_path / "again", base="float")
    load_adapter(lit, tmp_path / "plain")
    save_adapter(lit, tmp_path / "again", base="float")
    assert_same_tensors(tmp_path / "plain", tmp_path / "again")


def difference(net):
    """A, and s B, with the scaling of the folder that would be written."""
    adapter = adapter_of(net, base="float")
    state = adapter.layers["0"]
    config = QLoRAConfig(r=adapter.rank("0"), lora_alpha=adapter.alpha("0"), use_rslora=adapter.config["use_rslora"])
    return state["lora_A"], config.scaling * state["lora_B"]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "calibrated"},
        {"init_lora_weights": "calibrated", "use_rslora": True},
    ],
)
def test_the_difference_is_what_training_added(arguments):
    """Also where another device is the default."""
    net = nn.Sequential(nn.Linear(64, 96))
    convert(net, r=8, lora_alpha=4, lora_dropout=0.0, **arguments)
    net(torch.randn(32, 64))
    if "calibrated" in arguments.values():
        calibrate(net)
    before = delta(net[0])
    a, b = difference(perturb(net))
    assert a.shape == ((16 if "calibrated" in arguments.values() else 8), 64)
    torch.testing.assert_close(b @ a, delta(net[0]) - before, rtol=1e-3, atol=1e-4)
    with elsewhere():
        again = difference(net)
    assert torch.equal(again[0], a) and torch.equal(again[1], b)


def test_on_the_float_weight_it_is_close_to_the_trained_layer():
    dense = nn.Linear(64, 96)
    net = nn.Sequential(copy.deepcopy(dense))
    convert(net, r=8, lora_alpha=4, lora_dropout=0.0, init_lora_weights="calibrated")
    net(torch.randn(32, 64))
    calibrate(net)
    a, b = difference(perturb(net))
    effective = net[0].decode() + delta(net[0])
    with_difference = (dense.weight + b @ a - effective).norm()
    as_it_is = (dense.weight + delta(net[0]) - effective).norm()  # counts the initial values twice
    assert with_difference < 0.95 * as_it_is


@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_on_the_float_base_does_what_training_added(use_rslora, base, tmp_path, trained):
    """Float base plus difference = float base plus the change of the layers since the initialization."""
    peft = pytest.importorskip("peft")
    arguments = {"init_lora_weights": "calibrated", "use_rslora": use_rslora}
    lit = trained(**arguments)
    initial = load_base(base)
    convert(initial, **ARGUMENTS, **arguments)
    initial.train().model(ids())  # the batch that Lit trains on
    calibrate(initial)
    expected = KIND.from_pretrained(base)
    for name, layer in initial.model.named_modules():
        if hasattr(layer, "lora_A"):
            change = delta(lit.model.get_submodule(name)) - delta(layer)
            assert change.norm() > 0
            expected.get_submodule(name).weight.data += change
    save_adapter(lit, tmp_path / "adapter", base="float")
    config = exported(tmp_path / "last.ckpt", tmp_path / "exported")
    assert config["r"] == 8 and config["lora_alpha"] == pytest.approx(8 * 2**0.5 if config["use_rslora"] else 16)
    for folder in ("adapter", "exported"):
        loaded = peft.PeftModel.from_pretrained(KIND.from_pretrained(base), tmp_path / folder)
        torch.testing.assert_close(logits(loaded), logits(expected.eval()), atol=1e-4, rtol=0)


def exported(checkpoint, folder):
    main(["export", str(checkpoint), str(folder), "--base", "float"])
    return read_config(folder)


def test_merging_into_the_float_weights_subtracts_the_initial_values(base, tmp_path, trained, capsys):
    lit = trained(init_lora_weights="calibrated")
    main(["merge", str(tmp_path / "last.ckpt"), str(tmp_path / "merged"), "--base", "float"])
    exported(tmp_path / "last.ckpt", tmp_path / "exported")
    peft = pytest.importorskip("peft")
    merged, dense = (KIND.from_pretrained(path) for path in (tmp_path / "merged", base))
    loaded = peft.PeftModel.from_pretrained(dense, tmp_path / "exported")
    torch.testing.assert_close(logits(merged), logits(loaded), atol=1e-5, rtol=0)
    with pytest.warns(UserWarning, match="fit the model in 4 bits"):
        save_adapter(lit, tmp_path / "plain")
    with pytest.raises(SystemExit):
        main(["merge", str(tmp_path / "plain"), str(tmp_path / "again"), "--base", "float"])
    assert "its initial values are not known, because an adapter folder does not hold them" in capsys.readouterr().err


def test_a_plain_export_names_its_base_in_its_metadata_and_on_screen(tmp_path, trained, capsys):
    trained(init_lora_weights="calibrated")
    main(["export", str(tmp_path / "last.ckpt"), str(tmp_path / "exported")])
    assert "initialized as 'calibrated', from the quantization error" in capsys.readouterr().err
    assert stored_quantization(tmp_path / "exported")["quantization"]["init_lora_weights"] == "calibrated"
    for path in ("exported", "last.ckpt"):
        main(["inspect", str(tmp_path / path)])
        assert re.search(r"trained on +These adapters were initialized as 'calibrated'", capsys.readouterr().out)


def test_adapters_without_such_a_difference_are_refused(base, tmp_path):
    lit = load_base(base)
    convert(lit, **ARGUMENTS, init_lora_weights="calibrated", use_dora=True)
    with pytest.raises(ValueError, match="DoRA"):
        save_adapter(lit, tmp_path / "adapter", base="float")
    with pytest.raises(ValueError, match="base='16bit': must be one of 'quantized', 'float'"):
        save_adapter(lit, tmp_path / "adapter", base="16bit")


def test_the_base_that_an_adapter_needs():
    bits = "quant_type=nf4, block_size=64, double_quant=True"
    for method, needed in (
        ("default", None),
        ("gaussian", None),
        ("calibrated", f"from the quantization error: they fit the model in 4 bits ({bits})."),
    ):
        quantization = Quantization(init_lora_weights=method)
        text = required_base(quantization)
        if needed is None:
            assert text is None
            assert trained_on(quantization).startswith(f"the model in 4 bits ({bits}). On the model in 16 bits")
        else:
            assert text.startswith(f"These adapters were initialized as {method!r}, {needed}")
            assert trained_on(quantization) == text
    assert required_base(None) is None and trained_on(None) == "not recorded"


def test_files_name_all_arguments_of_the_base():
    assert Quantization().entry().keys() == {*arguments_that("of_base"), "init_lora_weights", "base_changed"}
    assert all(value == getattr(QLoRAConfig(), name) for name, value in Quantization()._asdict().items())


def test_a_calibrated_adapter_is_exported_as_it_is_before_its_first_step(base, tmp_path):
    lit = load_base(base)
    convert(lit, **ARGUMENTS, init_lora_weights="calibrated")
    save_adapter(lit, tmp_path, base="float")
    found = read_adapter(tmp_path)
    for name, state in adapter_of(lit).layers.items():
        assert torch.equal(found.layers[name]["lora_A"], state["lora_A"]) and not found.layers[name]["lora_B"].any()


def written_before(state, folder, **quantization):
    """A state dict, and a folder, with the entries of commit ecb12fea for these arguments."""
    saved = json.loads(text_of(state[CONVERSION]))
    saved["config"] |= {"loftq_config": {}, **{k: v for k, v in quantization.items() if k != "base_changed"}}
    saved["base"]["quantization"] |= quantization
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = json.loads(file.metadata()["lightning_qlora"])
    metadata["quantization"] |= quantization
    save_file(tensors, folder / "adapter_model.safetensors", {"lightning_qlora": json.dumps(metadata)})
    return {**state, CONVERSION: entry_of(json.dumps(saved))}


@pytest.mark.parametrize(
    "start",
    [
        {"init_lora_weights": "pissa", "base_changed": True},
        {"init_lora_weights": "pissa_niter_4", "base_changed": True},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 5}, "base_changed": True},
    ],
)
def test_what_was_made_with_a_start_that_was_taken_out_is_refused_by_its_name(start, base, tmp_path, trained):
    lit = trained()
    state = written_before(lit.state_dict(), tmp_path / "adapter", **start)
    reason = f"init_lora_weights='{start['init_lora_weights']}': was taken out, because .* merge a file that has it "
    fresh = load_base(base)
    convert(fresh, **ARGUMENTS)
    before = copy.deepcopy(fresh.state_dict())
    with raises_in_one_line(ValueError, f"^_qlora_conversion: {reason}"):
        fresh.load_state_dict(state)
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    with raises_in_one_line(ValueError, f"x.ckpt: _qlora_conversion: {reason}"):
        read_adapter_from_checkpoint(tmp_path / "x.ckpt")
    message = f"adapter_model.safetensors: its metadata 'lightning_qlora': {reason}"
    with raises_in_one_line(ValueError, message):
        load_adapter(fresh, tmp_path / "adapter")
    assert_equal(fresh.state_dict(), before)
    with raises_in_one_line(ValueError, message):
        convert(load_base(base), adapter=str(tmp_path / "adapter"))


@pytest.mark.parametrize("start", ["default", "gaussian", "calibrated"])
def test_what_an_earlier_version_wrote_with_the_other_starts_loads(start, base, tmp_path, trained):
    lit = trained(init_lora_weights=start)
    state = written_before(lit.state_dict(), tmp_path / "adapter")
    module, by_folder = load_base(base), load_base(base)
    convert(module, **ARGUMENTS, init_lora_weights=start)
    module.load_state_dict(state)
    convert(by_folder, adapter=str(tmp_path / "adapter"))
    for each in (module, by_folder):
        assert torch.equal(logits(each.model), logits(lit.model))
