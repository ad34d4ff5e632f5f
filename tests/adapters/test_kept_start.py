"""Adapter folders of starts that belong to a 4-bit base: put on that base, refused on others, said again."""

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
    save_quantized,
)
from lightning_qlora.adapters.folder import read_adapter, write_adapter
from lightning_qlora.checkpoint_adapter import adapter_of_checkpoint
from lightning_qlora.merging.folder import merge_folder
from tests.toys import Lit, logits, perturb, toy

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:These adapters started as")
ARGUMENTS = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
MOVED = [{"init_lora_weights": "pissa"}, {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 2}}]
KIND = type(toy("llama"))


@pytest.fixture
def trained(tmp_path, trainer):
    """Trains from a start on the folder "base", and saves the folder "adapter"."""

    def train(**arguments):
        toy("llama").save_pretrained(tmp_path / "base")
        lit = Lit(KIND.from_pretrained(tmp_path / "base"))
        trainer(plugins=QLoRAPrecision(**ARGUMENTS, **arguments), max_steps=2).fit(lit)
        save_adapter(lit, tmp_path / "adapter")
        return lit

    return train


def of(folder):
    return Lit(KIND.from_pretrained(folder))


def said(folder):
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return json.loads(file.metadata()["lightning_qlora"])


@pytest.mark.parametrize("arguments", MOVED)
def test_a_moved_base_is_needed(arguments, trained, tmp_path):
    lit = trained(**arguments)
    message = r"adapter_model.safetensors: does not fit model.layers.0.*: the start of these adapters moved"
    with pytest.raises(CheckpointMismatchError, match=message) as error:
        convert(of(tmp_path / "base"), adapter=str(tmp_path / "adapter"))
    assert "\n" not in str(error.value)
    plain = of(tmp_path / "base")
    convert(plain, **ARGUMENTS)
    with pytest.raises(CheckpointMismatchError, match=message):
        load_adapter(plain, tmp_path / "adapter")
    # The same start of another model moves another base.
    other = Lit(toy("llama", seed=1))
    convert(other, **ARGUMENTS, **arguments)
    with pytest.raises(CheckpointMismatchError, match=message):
        load_adapter(other, tmp_path / "adapter")

    save_quantized(lit, tmp_path / "4-bit")
    with QLoRAPrecision(adapter=str(tmp_path / "adapter")).init():
        again = of(tmp_path / "4-bit")
    convert(again, adapter=str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(again.model), logits(lit.model), atol=0, rtol=0)
    with pytest.warns(UserWarning, match="of this run alone"):
        save_adapter(again, tmp_path / "again")
    assert said(tmp_path / "again") == said(tmp_path / "adapter")
    assert read_adapter(tmp_path / "again").base_fingerprints == read_adapter(tmp_path / "adapter").base_fingerprints


def test_a_merge_into_other_4_bits_than_the_moved_ones_is_refused(trained, tmp_path):
    trained(init_lora_weights="pissa")
    plain = KIND.from_pretrained(tmp_path / "base")
    convert(plain, **ARGUMENTS)
    save_quantized(plain, tmp_path / "plain")
    with pytest.raises(ValueError, match="the start of these adapters moved the weights they belong to"):
        merge_folder(tmp_path / "plain", read_adapter(tmp_path / "adapter"), tmp_path / "out")


def test_a_merge_into_another_quantization_than_that_of_the_start_is_refused(trained, tmp_path):
    trained(init_lora_weights="calibrated")
    for quant_type in ("nf4", "fp4"):
        plain = KIND.from_pretrained(tmp_path / "base")
        convert(plain, **ARGUMENTS, quant_type=quant_type)
        save_quantized(plain, tmp_path / quant_type)
    adapter = read_adapter(tmp_path / "adapter")
    merge_folder(tmp_path / "nf4", adapter, tmp_path / "out")
    with pytest.raises(ValueError, match=r"down_proj in quant_type=fp4.*started as 'calibrated'.*quant_type=nf4"):
        merge_folder(tmp_path / "fp4", adapter, tmp_path / "out2")


def test_a_module_whose_own_start_moved_its_base_takes_no_other_adapter(trained, tmp_path):
    trained()
    lit = of(tmp_path / "base")
    convert(lit, **ARGUMENTS, init_lora_weights="pissa")
    with pytest.raises(
        CheckpointMismatchError, match="the start of this module's own adapters moved the 4-bit weights"
    ):
        load_adapter(lit, tmp_path / "adapter")


@pytest.mark.parametrize("start", ["calibrated", "loftq"])
@pytest.mark.parametrize("other", [{"quant_type": "fp4"}, {"block_size": 128}, {"double_quant": False}])
def test_another_quantization_than_that_whose_error_was_the_start_is_refused(start, other, trained, tmp_path):
    trained(init_lora_weights=start)
    ((key, value),) = other.items()
    message = rf"the adapter started as '{start}', from the error of .* and here it is .*{key}={value}"
    with pytest.raises(CheckpointMismatchError, match=message):
        convert(of(tmp_path / "base"), adapter=str(tmp_path / "adapter"), **other)


class OfFolder(Lit):
    def __init__(self, folder):
        super().__init__(KIND.from_pretrained(folder))
        self.save_hyperparameters()


@pytest.mark.parametrize("start", ["calibrated", "loftq"])
def test_a_start_is_said_again_and_taken_off_where_it_can_be_made_again(start, trained, tmp_path, trainer):
    """Folder to module to folder; and to a checkpoint, to the module of that, to a folder."""
    lit = trained(init_lora_weights=start)
    again = OfFolder(str(tmp_path / "base"))
    run = trainer(plugins=QLoRAPrecision(adapter=str(tmp_path / "adapter"), lora_dropout=0.0), max_steps=1)
    run.fit(again)
    run.save_checkpoint(tmp_path / "x.ckpt")
    write_adapter(adapter_of_checkpoint(tmp_path / "x.ckpt"), tmp_path / "0")
    third = load_from_checkpoint(OfFolder, tmp_path / "x.ckpt")
    resumed = OfFolder(str(tmp_path / "base"))
    trainer(plugins=QLoRAPrecision(**ARGUMENTS), max_steps=1).fit(resumed, ckpt_path=tmp_path / "x.ckpt")
    for number, module in enumerate((again, third, resumed), start=1):
        assert torch.equal(logits(module.model), logits(again.model))
        with pytest.warns(UserWarning, match=f"These adapters started as '{start}'"):
            save_adapter(module, tmp_path / str(number))
    for number in range(4):
        assert said(tmp_path / str(number)) == said(tmp_path / "adapter")

    same = of(tmp_path / "base")
    convert(same, r=4, lora_alpha=5)
    load_adapter(same, tmp_path / "adapter")
    assert torch.equal(logits(same.model), logits(lit.model))
    if start == "calibrated":
        message = r"q_proj: its adapter started from input sizes that are not known here"
        for module in (again, third, same):
            with pytest.raises(ValueError, match=message):
                save_adapter(module, tmp_path / "float", onto="float")
        return
    save_adapter(lit, tmp_path / "float", onto="float")
    save_adapter(same, tmp_path / "float2", onto="float")
    a, b = (load_file(tmp_path / f"{folder}/adapter_model.safetensors") for folder in ("float", "float2"))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key])


def test_a_plain_adapter_put_on_a_calibrated_module_is_plain(trained, tmp_path):
    trained(init_lora_weights="calibrated")
    plain = of(tmp_path / "base")
    convert(plain, **ARGUMENTS)
    save_adapter(perturb(plain), tmp_path / "plain")
    lit = of(tmp_path / "base")
    convert(lit, **ARGUMENTS)
    load_adapter(lit, tmp_path / "adapter")
    load_adapter(lit, tmp_path / "plain")
    save_adapter(lit, tmp_path / "again", onto="float")
    a, b = (load_file(tmp_path / f"{folder}/adapter_model.safetensors") for folder in ("plain", "again"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
