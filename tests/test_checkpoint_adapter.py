"""Adapters taken from Lightning checkpoints, compared with those of the module that was saved."""

import inspect
import json
import pickle
import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file

from lightning_qlora import QLoRAPrecision, load_from_checkpoint, save_adapter
from lightning_qlora.adapters.folder import write_adapter
from lightning_qlora.checkpoint_adapter import adapter_of_checkpoint
from lightning_qlora.cli import main
from lightning_qlora.state import CONFIG
from tests.toys import Lit, toy

pytest.importorskip("transformers")
ARGUMENTS = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


@pytest.fixture
def saved(tmp_path, trainer):
    """Trains a module with some arguments; its checkpoint."""

    def train(lit, **arguments):
        run = trainer(plugins=QLoRAPrecision(**ARGUMENTS, **arguments), max_steps=2)
        run.fit(lit)
        run.save_checkpoint(tmp_path / "x.ckpt")
        return tmp_path / "x.ckpt"

    return train


def same_folders(lit, checkpoint, folder):
    """The folder that the checkpoint gives is the one that the module gives; its config."""
    save_adapter(lit, folder / "a")
    write_adapter(adapter_of_checkpoint(checkpoint), folder / "b")
    a, b = (load_file(folder / f"{x}/adapter_model.safetensors") for x in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    a, b = (json.loads((folder / f"{x}/adapter_config.json").read_text()) for x in "ab")
    assert a == b
    return b


@pytest.mark.parametrize("part", ["whole", "block"])
def test_compiled_parts_have_plain_names(part, saved, tmp_path):
    lit = Lit(toy("llama"))
    if part == "whole":
        lit.model = torch.compile(lit.model, backend="eager")
    else:
        lit.model.model.layers[1] = torch.compile(lit.model.model.layers[1], backend="eager")
    checkpoint = saved(lit, modules_to_save=["norm"], rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3})
    same_folders(lit, checkpoint, tmp_path)
    adapter = adapter_of_checkpoint(checkpoint)
    assert adapter.layers["model.layers.1.self_attn.v_proj"].alpha == 3
    assert list(adapter.saved) == ["model.norm.weight"]


@pytest.mark.parametrize("targets", ["q_proj", r".*layers\.1.*q_proj", r".*layers\.1\..*proj"])
def test_targets_name_the_adapted_layers_alone(targets, saved, tmp_path):
    """Layers of the same name that have no adapter are known to the module, and so to its checkpoint."""
    peft = pytest.importorskip("peft")
    lit = Lit(toy("llama"))
    checkpoint = saved(lit, target_modules=[targets] if targets == "q_proj" else targets)
    same_folders(lit, checkpoint, tmp_path)
    theirs = peft.PeftModel.from_pretrained(toy("llama"), tmp_path / "b")
    found = {name.removeprefix("base_model.model.") for name, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert found == adapter_of_checkpoint(checkpoint).layers.keys()


class WithHyperparameters(Lit):
    def __init__(self, value):
        super().__init__(toy("llama"))
        self.save_hyperparameters()


@pytest.mark.parametrize("value", [Path("data"), np.float64(0.1), torch.optim.AdamW], ids=["path", "numpy", "class"])
def test_hyperparameters_that_are_no_plain_values(value, saved, capsys, tmp_path):
    """One line that says what to do, and a way through, wherever a checkpoint is read."""
    checkpoint = str(saved(WithHyperparameters(value)))
    message = r"x.ckpt: holds a \S+, .* If you trust them, pass weights_only=False"
    for read in (adapter_of_checkpoint, lambda path: load_from_checkpoint(WithHyperparameters, path)):
        with pytest.raises(ValueError, match=message) as error:
            read(checkpoint)
        assert "\n" not in str(error.value)
    commands = (["inspect", checkpoint], ["export", checkpoint, str(tmp_path / "out")])
    for command in commands:
        with pytest.raises(SystemExit):
            main(command)
        assert re.search(message, capsys.readouterr().err)
        main([*command, "--weights_only", "false"])
    again = load_from_checkpoint(WithHyperparameters, checkpoint, weights_only=False)
    assert again.hparams.value == value
    assert adapter_of_checkpoint(checkpoint, weights_only=False).r == 4


@pytest.mark.skipif("weights_only" not in inspect.signature(Trainer.fit).parameters, reason="Lightning before 2.6")
def test_lightnings_own_weights_only_reaches_the_file(saved, trainer):
    checkpoint = saved(WithHyperparameters(Path("data")))
    module, run = WithHyperparameters(Path("data")), trainer(plugins=QLoRAPrecision(**ARGUMENTS), max_steps=4)
    for arguments in ({}, {"weights_only": False}, {}):  # and does so once
        expected = nullcontext() if arguments else pytest.raises(pickle.UnpicklingError, match="PosixPath")
        with expected:
            run.fit(module, ckpt_path=checkpoint, **arguments)
    assert run.global_step == 2  # restored


@pytest.mark.parametrize("content", [torch.ones(2), [torch.ones(2)], {"a": torch.ones(2)}, 3])
def test_files_that_hold_no_checkpoint(content, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x.pt: holds no 'qlora_config'"):
        adapter_of_checkpoint(tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x.pt' holds no 'qlora_config'"):
        load_from_checkpoint(Lit, tmp_path / "x.pt")
    (tmp_path / "y.pt").write_bytes(b"nothing")
    for read in (adapter_of_checkpoint, lambda path: load_from_checkpoint(Lit, path)):
        with pytest.raises(ValueError, match=r"y.pt: not a checkpoint, or truncated"):
            read(tmp_path / "y.pt")


def test_older_checkpoints_name_every_layer_in_full(saved):
    checkpoint = saved(Lit(toy("llama")), target_modules=r".*layers\.1.*q_proj")
    content = torch.load(checkpoint, weights_only=True)
    arguments = json.loads(bytes(content["state_dict"][CONFIG].tolist()))
    del arguments["base_model"]["target_modules"]
    content["state_dict"][CONFIG] = torch.tensor(list(json.dumps(arguments).encode()), dtype=torch.uint8)
    torch.save(content, checkpoint)
    assert adapter_of_checkpoint(checkpoint).targets == ["model.layers.1.self_attn.q_proj"]
