"""An adapter minus its initial values: what training added, for the float base."""

import copy
import json
import re

import pytest
import torch
from safetensors import safe_open
from torch import nn

from lightning_qlora import QLoRAPrecision, convert, save_adapter
from lightning_qlora.adapters.base_compatibility import quantization_of, required_base
from lightning_qlora.adapters.save_load import get_adapter
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.layers.initialization.difference import recompute_initial, subtract_initial
from lightning_qlora.training.calibration import calibration_of
from tests.conftest import elsewhere
from tests.toys import ARGUMENTS, Lit, ids, logits, perturb, toy

METHODS = [
    {"init_lora_weights": "loftq"},
    {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 3}},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa", "loftq_config": {"loftq_iter": 2}},
    {"init_lora_weights": "pissa_niter_4"},
    {"init_lora_weights": "calibrated"},
]


def trained(dense, **arguments):
    """A converted layer whose adapter has changed since its initialization, and a copy of it from before."""
    net = nn.Sequential(copy.deepcopy(dense))
    convert(net, r=8, lora_alpha=4, lora_dropout=0.0, **arguments)
    net(torch.randn(32, 64))
    if "calibrated" in arguments.values():
        calibration_of(net).initialize()
    layer = net[0]
    before = copy.deepcopy(net[0])
    with torch.no_grad():
        for parameter in layer.adapter_parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return net, layer, before


def difference(net, layer, dense):
    origin = get_adapter(net).origin
    base = layer.packed_weight if quantization_of(layer.config)["base_changed"] else None
    return subtract_initial(
        layer.lora_A.detach(), layer.lora_B.detach(), *recompute_initial(origin, "0", dense.weight, base)
    )


@pytest.mark.parametrize("arguments", [{}, {"init_lora_weights": "gaussian"}, *METHODS])
def test_the_difference_is_what_training_added(arguments):
    dense = nn.Linear(64, 96)
    net, layer, before = trained(dense, **arguments)
    a, b = difference(net, layer, dense)
    assert a.shape == ((16 if arguments in METHODS else 8), 64)
    torch.testing.assert_close(layer.scaling * b @ a, layer.delta() - before.delta(), rtol=1e-3, atol=1e-4)


def test_on_the_float_weight_it_is_close_to_the_trained_layer():
    dense = nn.Linear(64, 96)
    net, layer, _ = trained(dense, init_lora_weights="calibrated")
    a, b = difference(net, layer, dense)
    effective = layer.decode() + layer.delta()
    with_difference = (dense.weight + layer.scaling * b @ a - effective).norm()
    as_it_is = (dense.weight + layer.delta() - effective).norm()  # counts the initial values twice
    assert with_difference < 0.95 * as_it_is


@pytest.mark.parametrize("arguments", METHODS)
def test_the_default_device_has_no_effect(arguments):
    dense = nn.Linear(64, 96)
    net, layer, _ = trained(dense, **arguments)
    expected = difference(net, layer, dense)
    with elsewhere():
        made = difference(net, layer, dense)
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


@pytest.mark.parametrize("arguments", METHODS)
def test_another_weight_is_refused(arguments):
    dense = nn.Linear(64, 96)
    net, layer, _ = trained(dense, **arguments)
    with pytest.raises(ValueError, match="0: the initial adapter can't be computed from this weight"):
        difference(net, layer, nn.Linear(64, 96))


def test_a_weight_converted_in_another_type_than_it_is_stored_in_is_found():
    dense = nn.Linear(64, 96)
    net, layer, before = trained(copy.deepcopy(dense).bfloat16().float(), init_lora_weights="calibrated")
    a, b = difference(net, layer, dense)
    torch.testing.assert_close(layer.scaling * b @ a, layer.delta() - before.delta(), rtol=1e-3, atol=1e-4)


@pytest.fixture
def base(tmp_path):
    toy("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def fitted(base, trainer, **arguments):
    lit = Lit(type(toy("llama")).from_pretrained(base))
    run = trainer(plugins=QLoRAPrecision(**ARGUMENTS, **arguments), max_steps=2)
    run.fit(lit)
    return lit, run


@pytest.mark.parametrize("arguments", METHODS)
def test_peft_on_the_float_base_does_what_training_added(arguments, base, tmp_path, trainer):
    """Float base plus difference = float base plus the change of the layers since the initialization."""
    peft = pytest.importorskip("peft")
    lit, run = fitted(base, trainer, **arguments)
    run.save_checkpoint(tmp_path / "last.ckpt")
    initial = Lit(type(toy("llama")).from_pretrained(base))
    convert(initial, **ARGUMENTS, **arguments)
    if "calibrated" in arguments.values():
        initial.train().model(ids())  # the batch that Lit trains on
        calibration_of(initial).initialize()
    expected = type(toy("llama")).from_pretrained(base)
    for name, layer in initial.model.named_modules():
        if hasattr(layer, "lora_A"):
            change = lit.model.get_submodule(name).delta() - layer.delta()
            assert change.norm() > 0
            expected.get_submodule(name).weight.data += change
    save_adapter(lit, tmp_path / "adapter", base="float")
    config = exported(tmp_path / "last.ckpt", tmp_path / "exported")
    assert config["r"] == 8 and config["lora_alpha"] == 16
    for folder in ("adapter", "exported"):
        loaded = peft.PeftModel.from_pretrained(type(expected).from_pretrained(base), tmp_path / folder)
        torch.testing.assert_close(logits(loaded), logits(expected.eval()), atol=1e-4, rtol=0)


def exported(checkpoint, folder):
    from lightning_qlora.tools.cli import main

    main(["export", str(checkpoint), str(folder), "--base", "float"])
    return json.loads((folder / "adapter_config.json").read_text())


def test_merging_into_the_float_weights_subtracts_the_initial_values(base, tmp_path, trainer, capsys):
    from lightning_qlora.tools.cli import main

    lit, run = fitted(base, trainer, init_lora_weights="calibrated")
    run.save_checkpoint(tmp_path / "last.ckpt")
    main(["merge", str(tmp_path / "last.ckpt"), str(tmp_path / "merged"), "--base", "float"])
    exported(tmp_path / "last.ckpt", tmp_path / "exported")
    peft = pytest.importorskip("peft")
    merged, dense = (type(lit.model).from_pretrained(path) for path in (tmp_path / "merged", base))
    loaded = peft.PeftModel.from_pretrained(dense, tmp_path / "exported")
    torch.testing.assert_close(logits(merged), logits(loaded), atol=1e-5, rtol=0)
    with pytest.warns(UserWarning, match="fit the model in 4 bits"):
        save_adapter(lit, tmp_path / "plain")
    with pytest.raises(SystemExit):
        main(["merge", str(tmp_path / "plain"), str(tmp_path / "again"), "--base", "float"])
    assert "an adapter folder does not hold what the initial values were computed from" in capsys.readouterr().err


def test_a_plain_export_names_its_base_in_its_metadata_and_on_screen(base, tmp_path, trainer, capsys):
    from lightning_qlora.tools.cli import main

    _, run = fitted(base, trainer, init_lora_weights="loftq")
    run.save_checkpoint(tmp_path / "last.ckpt")
    main(["export", str(tmp_path / "last.ckpt"), str(tmp_path / "exported")])
    assert "initialized as 'loftq', from the quantization error" in capsys.readouterr().err
    with safe_open(tmp_path / "exported" / "adapter_model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["lightning_qlora"])["init_lora_weights"] == "loftq"
    for path in ("exported", "last.ckpt"):
        main(["inspect", str(tmp_path / path)])
        assert re.search(r"trained on +These adapters were initialized as 'loftq'", capsys.readouterr().out)


def test_adapters_without_such_a_difference_are_refused(base, tmp_path):
    lit = Lit(type(toy("llama")).from_pretrained(base))
    convert(lit, **ARGUMENTS, init_lora_weights="pissa", use_dora=True)
    with pytest.raises(ValueError, match="DoRA"):
        save_adapter(lit, tmp_path / "adapter", base="float")
    with pytest.raises(ValueError, match="base='16bit': must be one of 'quantized', 'float'"):
        save_adapter(lit, tmp_path / "adapter", base="16bit")
    lit = perturb(Lit(toy("llama")))
    convert(lit, **ARGUMENTS, init_lora_weights="loftq")
    with pytest.raises(ValueError, match="names no base model"):
        save_adapter(lit, tmp_path / "adapter", base="float")


def test_the_base_that_an_adapter_needs():
    def needed(**arguments):
        return required_base(quantization_of(QLoRAConfig(**arguments)))

    assert needed() is None
    assert needed(init_lora_weights="gaussian") is None
    assert "model in 4 bits (quant_type=nf4, block_size=64" in needed(init_lora_weights="calibrated")
    assert "4-bit weights (quant_type=nf4, block_size=64, double_quant=True) of this run" in needed(
        init_lora_weights="pissa_niter_4"
    )
    assert "which changed the base" in needed(init_lora_weights="loftq", loftq_config={"loftq_iter": 5})
