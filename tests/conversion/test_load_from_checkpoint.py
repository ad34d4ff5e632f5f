from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_qlora import CheckpointMismatchError, QLoRALinear, QLoRAPrecision, convert, load_from_checkpoint
from lightning_qlora.checkpoints.from_checkpoint import read_adapter_from_checkpoint
from tests.conftest import Classifier, fingerprints, loader
from tests.plugin.test_gpu import Late
from tests.toys import assert_equal


def compute_the_same(one, other):
    x = torch.randn(3, 64)
    return torch.equal(one.eval()(x), other.eval()(x))


def trained(trainer, module, **arguments):
    """The checkpoint that Lightning writes at the end of an epoch."""
    run = trainer(plugins=QLoRAPrecision(**{"r": 4, **arguments}))
    run.fit(module, loader())
    return run.checkpoint_callback.best_model_path


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_trained_module_comes_back_from_its_checkpoint(weights_only, trainer, tmp_path):
    """The twin does so with checkpoint="full" too."""
    module = Classifier(dropout=0.1)
    run = trainer(plugins=QLoRAPrecision(r=4, lora_alpha=8), max_epochs=2)
    run.fit(module, loader())
    path = tmp_path / "c.ckpt"
    run.save_checkpoint(path, weights_only=weights_only)
    again = load_from_checkpoint(Classifier, path)
    assert type(again) is Classifier and again.hparams == module.hparams
    assert compute_the_same(again, module)
    again = load_from_checkpoint(Classifier, path, dropout=0.7)
    assert again.hparams.dropout == again.net[3].p == 0.7
    with pytest.raises(CheckpointMismatchError, match=r"net\.0"):
        load_from_checkpoint(Classifier, path, seed=8)


def test_a_plain_checkpoint_is_refused(trainer, tmp_path):
    run = trainer()
    run.fit(Classifier(), loader())
    torch.save([1], tmp_path / "list.ckpt")
    for path in (run.checkpoint_callback.best_model_path, tmp_path / "list.ckpt"):
        with pytest.raises(ValueError, match=r"not saved from a converted module\. Load it with Classifier\.load_from"):
            load_from_checkpoint(Classifier, path)


def test_a_model_made_in_configure_model_comes_back(trainer):
    module = Late()
    again = load_from_checkpoint(Late, trained(trainer, module))
    assert compute_the_same(again, module)


def test_hooks_and_methods_that_edit_the_state_are_used(trainer):
    class Edits(Classifier):
        """Leaves out a frozen part, and another prefix for the rest, as a method that reads the weights expects."""

        def __init__(self):
            super().__init__()
            self.frozen = nn.LayerNorm(64).requires_grad_(False)

        def on_save_checkpoint(self, checkpoint):
            kept = {key: value for key, value in checkpoint["state_dict"].items() if not key.startswith("frozen")}
            checkpoint["state_dict"] = {f"x.{key}": value for key, value in kept.items()}

        def on_load_checkpoint(self, checkpoint):
            state = {key[2:]: value for key, value in checkpoint["state_dict"].items()}
            own = {key: value for key, value in self.state_dict().items() if key.startswith("frozen")}
            checkpoint["state_dict"] = {**state, **own}

        @classmethod
        def load_from_checkpoint(cls, path, map_location=None):
            assert "x.net.0.lora_A" in torch.load(path, weights_only=True)["state_dict"]
            return super().load_from_checkpoint(path, map_location)

    module = Edits()
    again = load_from_checkpoint(Edits, trained(trainer, module))
    assert compute_the_same(again, module)
    assert torch.equal(again.frozen.weight, module.frozen.weight)


def test_a_path_that_is_no_file_is_named():
    for path in ("", "no.ckpt"):
        with pytest.raises(FileNotFoundError, match=f"{path}: no such file"):
            load_from_checkpoint(Classifier, path)


@pytest.mark.parametrize("saves", [False, True])
def test_blocks_in_a_checkpoint_wrapper_have_the_names_of_the_plain_module(saves, trainer):
    class Wrapped(Classifier):
        def __init__(self, wrapped=True):
            super().__init__()
            if wrapped:
                self.net[0], self.net[2] = checkpoint_wrapper(self.net[0]), checkpoint_wrapper(self.net[2])

    module = Wrapped(saves)
    path = trained(trainer, module)
    assert "net.2.weight" in fingerprints(torch.load(path, weights_only=True)["state_dict"])
    for wrapped in (False, True):
        again = load_from_checkpoint(Wrapped, path, wrapped=wrapped)
        assert compute_the_same(again, module)
        trainer(plugins=QLoRAPrecision(r=4), max_epochs=2).fit(Wrapped(wrapped), loader(), ckpt_path=path)


class Filters(Classifier):
    """Saves the parameters that train alone, as many modules with a frozen backbone do."""

    strict_loading = False

    def on_save_checkpoint(self, checkpoint):
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {key: v for key, v in checkpoint["state_dict"].items() if key in trained}


def test_a_checkpoint_that_the_module_filtered_is_loaded_by_what_the_plugin_saved(trainer, tmp_path):
    module = Filters()
    run = trainer(plugins=QLoRAPrecision(r=4, lora_alpha=32, lora_dropout=0.0), max_epochs=2)
    run.fit(module, loader())
    path = run.checkpoint_callback.best_model_path
    weights_only = tmp_path / "weights.ckpt"
    assert "_qlora_conversion" not in torch.load(path, weights_only=True)["state_dict"]
    assert compute_the_same(load_from_checkpoint(Filters, path), module)
    run.save_checkpoint(weights_only, weights_only=True)
    with pytest.raises(ValueError, match=r"of 2 layers and no '_qlora_conversion'.*on_save_checkpoint.*convert\("):
        load_from_checkpoint(Filters, weights_only)
    again = Filters()  # as the error says
    convert(again, r=4, lora_alpha=32, lora_dropout=0.0)
    again.load_state_dict(torch.load(weights_only, weights_only=True)["state_dict"], strict=False)
    assert compute_the_same(again, module)


class Factors(nn.Module):
    """Low-rank factors of a new part, with the names that an adapter has."""

    def __init__(self):
        super().__init__()
        self.lora_A = nn.Parameter(torch.randn(4, 64) / 8)
        self.lora_B = nn.Parameter(torch.zeros(64, 4))

    def forward(self, x):
        return x + x @ self.lora_A.T @ self.lora_B.T


class WithFactors(Classifier):
    def __init__(self):
        super().__init__()
        self.net.extend([nn.Linear(8, 64), Factors(), nn.Linear(64, 8)])


def test_parameters_of_the_module_may_have_the_names_of_an_adapter(trainer):
    arguments = {"r": 4, "lora_dropout": 0.0, "target_modules": ["net.0", "net.4"], "modules_to_save": ["net.6"]}
    torch.manual_seed(0)
    module = WithFactors()
    path = trained(trainer, module, **arguments)
    torch.manual_seed(0)
    again = load_from_checkpoint(WithFactors, path)
    assert [name for name, part in again.named_modules() if isinstance(part, QLoRALinear)] == ["net.0", "net.4"]
    torch.manual_seed(0)
    resumed = WithFactors()
    for each in (resumed, module):
        trainer(plugins=QLoRAPrecision(**arguments), max_epochs=2).fit(each, loader(), ckpt_path=path)
    assert_equal(resumed.state_dict(), module.state_dict())
    adapter = read_adapter_from_checkpoint(path)
    assert adapter.layers.keys() == {"0", "4"}  # the base is `net`
    assert torch.equal(adapter.saved["6.lora_A"], again.net[6].lora_A)


def test_weights_only_reaches_a_method_of_the_class_that_passes_keywords_on(trainer, tmp_path):
    class Own(Classifier):
        @classmethod
        def load_from_checkpoint(cls, path, **kwargs):
            return super().load_from_checkpoint(path, **kwargs)

    class Extra(pl.Callback):
        def on_save_checkpoint(self, run, module, checkpoint):
            checkpoint["an_object"] = Path("a")

    module = Own()
    run = trainer(plugins=QLoRAPrecision(r=4), callbacks=[Extra()])
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    loaded = load_from_checkpoint(Own, tmp_path / "last.ckpt", weights_only=False)
    assert torch.equal(loaded.net[0].lora_B, module.net[0].lora_B)
