"""Adapters read from Lightning checkpoints, compared with those of the module that was saved."""

import pickle
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule

from lightning_qlora import QLoRAPrecision, convert, load_from_checkpoint, save_adapter
from lightning_qlora.adapters.peft_folder import write_adapter
from lightning_qlora.checkpoints.from_checkpoint import read_adapter_from_checkpoint
from lightning_qlora.experts.experts import QLoRAExperts
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.tools.cli import main
from tests.adapters.folders import adapter_of, assert_same_folders
from tests.conftest import elsewhere, raises_in_one_line
from tests.toys import ARGUMENTS, Lit, assert_equal, converted, perturb, toy

pytest.importorskip("transformers")


@pytest.fixture
def saved(tmp_path):
    """Converts a module with some arguments and perturbs what trains; a checkpoint of it."""

    def save(lit, **arguments):
        convert(lit, **ARGUMENTS, **arguments)
        torch.save({"state_dict": perturb(lit).state_dict()}, tmp_path / "x.ckpt")
        return tmp_path / "x.ckpt"

    return save


@pytest.fixture
def trained(tmp_path, trainer):
    def train(lit, **arguments):
        run = trainer(plugins=QLoRAPrecision(**ARGUMENTS, **arguments), max_steps=2)
        run.fit(lit)
        run.save_checkpoint(tmp_path / "x.ckpt")
        return tmp_path / "x.ckpt"

    return train


def same_folders(lit, checkpoint, folder):
    """The folder that the checkpoint gives is the one that the module gives; the adapter in the checkpoint."""
    with elsewhere():
        adapter = read_adapter_from_checkpoint(checkpoint)
    save_adapter(lit, folder / "a")
    write_adapter(replace(adapter, bases={}), folder / "b")  # a module's folder has no fingerprints of its base
    assert_same_folders(folder / "a", folder / "b")
    return adapter


@pytest.mark.parametrize("part", ["whole", "block"])
def test_compiled_parts_have_plain_names(part, saved, tmp_path):
    lit = Lit(toy("llama"))
    if part == "whole":
        lit.model = torch.compile(lit.model)
    else:
        lit.model.model.layers[1] = torch.compile(lit.model.model.layers[1])
    checkpoint = saved(lit, modules_to_save=["norm"], rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3})
    adapter = same_folders(lit, checkpoint, tmp_path)
    assert adapter.alpha("model.layers.1.self_attn.v_proj") == 3
    assert list(adapter.saved) == ["model.norm.weight"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"use_dora": True, "use_rslora": True, "target_modules": r".*layers\.1\..*proj"},
        {"init_lora_weights": "calibrated"},
        {"trainable_token_indices": [3, 7], "quant_type": "fp4", "checkpoint": "full"},
    ],
    ids=str,
)
def test_a_checkpoint_gives_the_adapter_of_the_module(arguments, trained, tmp_path):
    lit = Lit(toy("llama"))
    checkpoint = trained(lit, **arguments)
    same_folders(lit, checkpoint, tmp_path)
    of_checkpoint = read_adapter_from_checkpoint(checkpoint, base="float")
    of_module = adapter_of(lit, base="float")
    assert of_checkpoint.config == of_module.config
    assert_equal(of_checkpoint.layers, of_module.layers)


def test_matrices_that_no_module_has_are_refused(tmp_path):
    state = converted("llama").state_dict()
    key = next(key for key in state if key.endswith("lora_A"))
    for value, message in (
        (
            state[key][:3],
            r"the file has lora_A \[3, 64\] of .*, lora_B \[64, 4\] .*: a layer has lora_A \[r, in\]",
        ),
        (state[key].int(), r"the file has lora_A \[4, 64\] of torch.int32.* all are float16"),
        (state[key] * torch.nan, "lora_A holds NaN or Inf. The training diverged"),
    ):
        torch.save({"state_dict": state | {key: value.clone()}}, tmp_path / "x.ckpt")
        with raises_in_one_line(ValueError, rf"x.ckpt: {key.removesuffix('.lora_A')}: {message}"):
            read_adapter_from_checkpoint(tmp_path / "x.ckpt")


class WithHyperparameters(Lit):
    def __init__(self, value):
        super().__init__(toy("llama"))
        self.save_hyperparameters()


@pytest.mark.parametrize("value", [Path("data"), np.float64(0.1), torch.optim.AdamW], ids=["path", "numpy", "class"])
def test_hyperparameters_that_are_not_plain_values(value, trained, capsys, tmp_path):
    """One line that says what to do, and weights_only=False, everywhere a checkpoint is read."""
    checkpoint = str(trained(WithHyperparameters(value)))
    message = r"x.ckpt: holds a \S+, .* If you trust them, pass weights_only=False"
    for read in (read_adapter_from_checkpoint, lambda path: load_from_checkpoint(WithHyperparameters, path)):
        with raises_in_one_line(ValueError, message):
            read(checkpoint)
    again = load_from_checkpoint(WithHyperparameters, checkpoint, weights_only=False)
    assert again.hparams.value == value
    assert read_adapter_from_checkpoint(checkpoint, weights_only=False).config["r"] == 4
    if isinstance(value, Path):
        for command in (["inspect", checkpoint], ["export", checkpoint, str(tmp_path / "out")]):
            with pytest.raises(SystemExit):
                main(command)
            assert re.search(message, capsys.readouterr().err)
            main([*command, "--weights_only", "false"])


def test_weights_only_of_the_trainer_is_used(trained, trainer):
    checkpoint = trained(WithHyperparameters(Path("data")))
    module = WithHyperparameters(Path("data"))
    run = trainer(plugins=QLoRAPrecision(**ARGUMENTS), max_steps=4)
    for arguments in ({}, {"weights_only": False}, {}):  # and does so once
        expected = nullcontext() if arguments else pytest.raises(pickle.UnpicklingError, match="PosixPath")
        with expected:
            run.fit(module, ckpt_path=checkpoint, **arguments)
    assert run.global_step == 2  # restored


@pytest.mark.parametrize("content", [torch.ones(2), [torch.ones(2)], {"a": torch.ones(2)}, 3])
def test_files_that_are_no_checkpoints(content, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x.pt: holds no '_qlora_conversion'"):
        read_adapter_from_checkpoint(tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x.pt' holds no '_qlora_conversion'"):
        load_from_checkpoint(Lit, tmp_path / "x.pt")


def test_a_checkpoint_with_the_bytes_of_experts(saved, tmp_path):
    pytest.importorskip("transformers")
    from tests.experts.test_experts import made, qwen3_moe

    lit = Lit(made(qwen3_moe))
    path = saved(lit, checkpoint="full")
    adapter = same_folders(lit, path, tmp_path)
    for name, layer in adapted_layers(lit.model).items():
        if isinstance(layer, QLoRAExperts):
            weights = [weight.dequantize() for weight in adapter.bases[name]]
            assert torch.equal(torch.stack(weights), layer.decode())
    content = torch.load(path)
    del content["state_dict"]["model.model.layers.0.mlp.experts.down_proj_experts.absmax"]
    torch.save(content, path)
    with raises_in_one_line(ValueError, r"down_proj_experts\.packed: its description or another of its tensors is"):
        read_adapter_from_checkpoint(path)


class Heads(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.ModuleDict({"head": torch.nn.Linear(64, 64)})
        self.decoder = torch.nn.ModuleDict({"head": torch.nn.Linear(64, 64)})


@pytest.mark.parametrize("pattern", ["model.head", r"^model\.head", "^head", "head"])
def test_a_checkpoint_gives_each_layer_the_scaling_that_it_had(pattern, saved):
    lit = Heads()
    adapter = read_adapter_from_checkpoint(saved(lit, alpha_pattern={pattern: 32}))
    assert (lit.model["head"].scaling, lit.decoder["head"].scaling) == (8, 2 if "model" in pattern else 8)
    for name, layer in lit.named_children():
        assert adapter.alpha(f"{name}.head") / adapter.rank(f"{name}.head") == layer["head"].scaling
