"""Adapters that fit only certain 4-bit weights: loaded on these, refused on others, saved again with the same base."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lightning_qlora import (
    CheckpointMismatchError,
    QLoRAPrecision,
    convert,
    load_adapter,
    load_from_checkpoint,
    save_adapter,
)
from lightning_qlora.adapters.from_checkpoint import read_adapter_from_checkpoint
from lightning_qlora.adapters.peft_folder import read_adapter, write_adapter
from lightning_qlora.tools.merge_folder import merge_folder
from tests.toys import ARGUMENTS, Lit, logits, perturb, save_in_4_bits, toy

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:These adapters were initialized as")
CHANGED = [{"init_lora_weights": "pissa"}, {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 2}}]
KIND = type(toy("llama"))


@pytest.fixture
def trained(tmp_path, trainer):
    """Trains on the folder "base" with some arguments, and saves the folder "adapter"."""

    def train(**arguments):
        toy("llama").save_pretrained(tmp_path / "base")
        lit = Lit(KIND.from_pretrained(tmp_path / "base"))
        trainer(plugins=QLoRAPrecision(**ARGUMENTS, **arguments), max_steps=2).fit(lit)
        save_adapter(lit, tmp_path / "adapter")
        return lit

    return train


def load_base(folder):
    return Lit(KIND.from_pretrained(folder))


def stored_quantization(folder):
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return json.loads(file.metadata()["lightning_qlora"])


@pytest.mark.parametrize("arguments", CHANGED)
def test_an_adapter_whose_initialization_changed_the_base_needs_that_base(arguments, trained, tmp_path):
    trained(**arguments)
    message = r"adapter_model.safetensors: does not fit model.layers.0.*: the initialization of these adapters"
    with pytest.raises(CheckpointMismatchError, match=message) as error:
        convert(load_base(tmp_path / "base"), adapter=str(tmp_path / "adapter"))
    assert "\n" not in str(error.value)
    plain = load_base(tmp_path / "base")
    convert(plain, **ARGUMENTS)
    with pytest.raises(CheckpointMismatchError, match=message):
        load_adapter(plain, tmp_path / "adapter")
    # The same initialization of another model gives another base.
    other = Lit(toy("llama", seed=1))
    convert(other, **ARGUMENTS, **arguments)
    with pytest.raises(CheckpointMismatchError, match=message):
        load_adapter(other, tmp_path / "adapter")


def test_merging_it_into_other_4_bit_weights_is_refused(trained, tmp_path):
    trained(init_lora_weights="pissa")
    save_in_4_bits(KIND, tmp_path / "base", tmp_path / "plain")
    with pytest.raises(CheckpointMismatchError, match="or of those in the module, changed the 4-bit weights"):
        merge_folder(tmp_path / "plain", read_adapter(tmp_path / "adapter"), tmp_path / "out")


def test_merging_into_another_quantization_than_that_of_the_initialization_is_refused(trained, tmp_path):
    trained(init_lora_weights="calibrated")
    for quant_type in ("nf4", "fp4"):
        save_in_4_bits(KIND, tmp_path / "base", tmp_path / quant_type, bnb_4bit_quant_type=quant_type)
    adapter = read_adapter(tmp_path / "adapter")
    merge_folder(tmp_path / "nf4", adapter, tmp_path / "out")
    message = r"q_proj: .*initialized as 'calibrated'.*quant_type=nf4.*quant_type=fp4"
    with pytest.raises(CheckpointMismatchError, match=message):
        merge_folder(tmp_path / "fp4", adapter, tmp_path / "out2")


def test_a_module_whose_initialization_changed_its_base_refuses_other_adapters(trained, tmp_path):
    trained()
    lit = load_base(tmp_path / "base")
    convert(lit, **ARGUMENTS, init_lora_weights="pissa")
    with pytest.raises(CheckpointMismatchError, match="or of those in the module, changed the 4-bit weights"):
        load_adapter(lit, tmp_path / "adapter")


@pytest.mark.parametrize("method", ["calibrated", "loftq"])
@pytest.mark.parametrize("other", [{"quant_type": "fp4"}, {"block_size": 128}, {"double_quant": False}])
def test_another_quantization_than_that_of_the_initialization_is_refused(method, other, trained, tmp_path):
    trained(init_lora_weights=method)
    ((key, value),) = other.items()
    message = rf"the adapter was initialized as '{method}' from the error of .* and here it is .*{key}={value}"
    with pytest.raises(CheckpointMismatchError, match=message):
        convert(load_base(tmp_path / "base"), adapter=str(tmp_path / "adapter"), **other)


class OfFolder(Lit):
    def __init__(self, folder):
        super().__init__(KIND.from_pretrained(folder))
        self.save_hyperparameters()


@pytest.mark.parametrize("method", ["calibrated", "loftq"])
def test_the_initialization_is_stored_again_and_subtracted_where_it_can_be_computed(method, trained, tmp_path, trainer):
    """From folder to module to folder, and from there to a checkpoint, its module and a folder."""
    lit = trained(init_lora_weights=method)
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
        with pytest.warns(UserWarning, match=f"These adapters were initialized as '{method}'"):
            save_adapter(module, tmp_path / str(number))
    for number in range(4):
        assert stored_quantization(tmp_path / str(number)) == stored_quantization(tmp_path / "adapter")

    same = load_base(tmp_path / "base")
    convert(same, r=4, lora_alpha=5)
    load_adapter(same, tmp_path / "adapter")
    assert torch.equal(logits(same.model), logits(lit.model))
    if method == "calibrated":
        message = r"q_proj: its initial values can't be computed, because its adapter came from a folder"
        for module in (again, third, same):
            with pytest.raises(ValueError, match=message):
                save_adapter(module, tmp_path / "float", base="float")
        return
    save_adapter(lit, tmp_path / "float", base="float")
    save_adapter(same, tmp_path / "float2", base="float")
    a, b = (load_file(tmp_path / f"{folder}/adapter_model.safetensors") for folder in ("float", "float2"))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key])


def test_a_plain_adapter_loaded_after_a_calibrated_one_is_plain(trained, tmp_path):
    trained(init_lora_weights="calibrated")
    plain = load_base(tmp_path / "base")
    convert(plain, **ARGUMENTS)
    save_adapter(perturb(plain), tmp_path / "plain")
    lit = load_base(tmp_path / "base")
    convert(lit, **ARGUMENTS)
    load_adapter(lit, tmp_path / "adapter")
    load_adapter(lit, tmp_path / "plain")
    save_adapter(lit, tmp_path / "again", base="float")
    a, b = (load_file(tmp_path / f"{folder}/adapter_model.safetensors") for folder in ("plain", "again"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
