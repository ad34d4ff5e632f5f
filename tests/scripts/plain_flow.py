"""Run by test_removable.py: what users do with a package of which a feature was removed.

It imports no other file of the tests, which may use the feature. The arguments are those of `main`, as JSON.
"""

import json
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 64,
}


class Layers(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)

    def forward(self, x):
        return self.second(self.first(x).relu())


class Run(LightningModule):
    def __init__(self, kind):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = kind()

    def training_step(self, batch, _):
        if isinstance(self.model, Layers):
            return self.model(batch).square().mean()
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def data(kind):
    generator = torch.Generator().manual_seed(1)
    rows = (
        torch.randn(8, 64, generator=generator) if kind is Layers else torch.randint(256, (8, 16), generator=generator)
    )
    return DataLoader(rows, batch_size=2)


def fit(kind, folder, epochs, **arguments):
    """A module that a Trainer trained, and its Trainer."""
    import lightning_qlora

    torch.manual_seed(2)
    plugin = lightning_qlora.QLoRAPrecision(r=4)
    trainer = Trainer(max_epochs=epochs, plugins=plugin, default_root_dir=folder, enable_checkpointing=False, **QUIET)
    module = Run(kind)
    trainer.fit(module, data(kind), **arguments)
    return module, trainer


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def check(kind, folder):
    """Steps, a checkpoint from which another run goes on bit for bit, PEFT's folder both ways, and a merge."""
    import lightning_qlora

    straight, trainer = fit(kind, folder, 2)
    assert trainer.precision_plugin.report.converted
    _, half = fit(kind, folder, 1)
    half.save_checkpoint(folder / "half.ckpt")
    resumed, _ = fit(kind, folder, 2, ckpt_path=folder / "half.ckpt")
    assert_equal(straight.state_dict(), resumed.state_dict())

    lightning_qlora.save_adapter(straight, folder / "adapter")
    again = Run(kind)
    lightning_qlora.convert(again, adapter=str(folder / "adapter"))
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, straight.get_parameter(name)), name
    fresh = Run(kind)
    lightning_qlora.convert(fresh, r=4)
    lightning_qlora.load_adapter(fresh, folder / "adapter")

    x = next(iter(data(kind)))
    outputs = [module.eval().model(x) for module in (straight, fresh)]
    y, same = [each if kind is Layers else each.logits for each in outputs]
    assert torch.equal(y, same)
    lightning_qlora.merge(straight)
    assert not [name for name, _ in straight.named_parameters() if "lora" in name]
    merged = straight.model(x)
    assert torch.allclose(merged if kind is Layers else merged.logits, y, atol=1e-4)


def check_refused(arguments):
    """The package refuses an argument of the feature that was removed."""
    from lightning_qlora import QLoRAConfig

    text = ""
    try:
        QLoRAConfig(**arguments)
    except (TypeError, ValueError) as error:
        text = str(error)
    assert [name for name in arguments if name not in text] == [], f"{arguments}: {text or 'is accepted'}"


def check_file_refused(path):
    """The package refuses a state dict of a module that was converted with such an argument."""
    from lightning_qlora import convert

    module = llama()
    convert(module, r=4)
    text = ""
    try:
        module.load_state_dict(torch.load(path))
    except (RuntimeError, ValueError) as error:
        text = str(error)
    assert "_qlora_conversion" in text, f"{path}: {text or 'is accepted'}"


def main(package, missing, refused, files):
    """Check what is left of the package.

    `package`: its folder. `missing`: public names that it does not have. `refused`: arguments that it refuses, and
    `files`: state dicts.
    """
    import lightning_qlora

    assert Path(lightning_qlora.__file__).is_relative_to(package), lightning_qlora.__file__
    assert not set(missing) & set(lightning_qlora.__all__)
    for arguments in refused:
        check_refused(arguments)
    for path in files:
        check_file_refused(path)
    for kind in (Layers, llama):
        with tempfile.TemporaryDirectory() as folder:
            check(kind, Path(folder))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    main(*map(json.loads, sys.argv[1:]))
