"""What users do, in one script: `make test-versions` runs it in environments with other versions.

python tests/scripts/user_flows.py    prints whether each of them passes
"""

import json
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import torch
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lightning_qlora import QLoRAPrecision, convert, load_adapter, load_from_checkpoint, merge, save_adapter

BASE = "base"  # a folder of a small model, in the place of a name on the hub
SIZES = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2}
TEXTS = torch.randint(0, 320, (16, 12), generator=torch.Generator().manual_seed(0))
YAML = """
trainer:
  max_epochs: 1
  accelerator: cpu
  plugins: {class_path: lightning_qlora.QLoRAPrecision, init_args: {r: 16, target_modules: [q_proj, v_proj]}}
optimizer: {class_path: lightning_qlora.PagedAdamW, init_args: {lr: 2.0e-4}}
"""


class Tuner(LightningModule):
    """README's module, on token ids."""

    def __init__(self):
        super().__init__()
        self.model = None

    def configure_model(self):
        if self.model is None:
            self.model = AutoModelForCausalLM.from_pretrained(BASE).train()

    def training_step(self, ids, batch_idx):
        return self.model(input_ids=ids, labels=ids).loss

    def validation_step(self, ids, batch_idx):
        self.log("loss", self.model(input_ids=ids, labels=ids).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 2e-3)


class LoadedEarly(Tuner):
    """The model is loaded in `__init__`; LightningCLI's optimizer needs its parameters."""

    def __init__(self):
        super().__init__()
        self.configure_model()

    def train_dataloader(self):
        return data()


def data(**arguments):
    return DataLoader(TEXTS, batch_size=4, **arguments)


def trainer(folder, **arguments):
    arguments = {"max_epochs": 1, "plugins": QLoRAPrecision(r=4)} | arguments
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", devices=1, default_root_dir=folder, **quiet, **arguments)


def adapters(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if "lora_" in name}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TEXTS).logits


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def own_loop(folder):
    """Convert and train without Lightning; a model that is loaded afterwards is a plain one."""
    model = AutoModelForCausalLM.from_pretrained(BASE)
    before = logits(model)
    report = convert(model, r=4)
    assert len(report.converted) == 14 and report.bytes_after < report.bytes_before
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=TEXTS, labels=TEXTS).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    again = AutoModelForCausalLM.from_pretrained(BASE)
    assert not adapters(again) and torch.equal(logits(again), before)


def fit_save_and_load(folder):
    """Fit, save, and load the checkpoint again."""
    module = Tuner()
    run = trainer(folder)
    run.fit(module, data())
    run.save_checkpoint("tuned.ckpt")
    assert Path("tuned.ckpt").stat().st_size < Path(BASE, "model.safetensors").stat().st_size
    loaded = load_from_checkpoint(Tuner, "tuned.ckpt")
    assert torch.equal(logits(loaded.model), logits(module.model))
    before = run.validate(module, data())
    assert trainer(folder).validate(Tuner(), data(), ckpt_path="tuned.ckpt") == before


def resume(folder):
    """Stop after one of two epochs, resume in a second module: bit-equal to a run without the stop."""
    seed_everything(1, verbose=False)
    whole = Tuner()
    trainer(folder / "whole", max_epochs=2).fit(whole, data())
    stopped = trainer(folder / "stopped")
    seed_everything(1, verbose=False)
    stopped.fit(Tuner(), data())
    resumed = Tuner()
    path = stopped.checkpoint_callback.best_model_path
    trainer(folder / "stopped", max_epochs=2).fit(resumed, data(), ckpt_path=path)
    assert equal(adapters(resumed), adapters(whole))


def second_fit(folder):
    """The same plugin and the same module again, and then another module."""
    plugin = QLoRAPrecision(r=4)
    module = Tuner()
    trainer(folder, plugins=plugin).fit(module, data())
    first = adapters(module)
    trainer(folder, plugins=plugin).fit(module, data())
    assert not equal(adapters(module), first)
    other = Tuner()
    trainer(folder, plugins=plugin).fit(other, data())
    assert adapters(other).keys() == first.keys()


def workers(folder):
    """Two processes read the data, started as this Python starts them: by fork, or by forkserver from 3.14 on."""
    trainer(folder).fit(Tuner(), data(num_workers=2))


def other_arguments(folder):
    """Initializations, DoRA, recomputation, and modules and rows that train in full."""
    for arguments in (
        {"init_lora_weights": "gaussian", "quant_type": "fp4"},
        {"init_lora_weights": "calibrated", "use_dora": True},
        {"gradient_checkpointing": True, "modules_to_save": ["lm_head"]},
        {"compute_dtype": "bf16", "trainable_token_indices": [1, 2]},
    ):
        module = Tuner()
        run = trainer(folder, plugins=QLoRAPrecision(r=4, **arguments))
        run.fit(module, data())
        run.save_checkpoint(folder / "other.ckpt")
        loaded = load_from_checkpoint(Tuner, folder / "other.ckpt")
        assert equal(dict(loaded.state_dict()), dict(module.state_dict())), arguments


def fabric(folder):
    """Set up twice, with the model quantized while it loads; save, and load into the second one."""
    plugin = QLoRAPrecision(r=4)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=plugin)

    def setup():
        with plugin.init():
            model = AutoModelForCausalLM.from_pretrained(BASE).train()
        return fabric.setup(model, torch.optim.AdamW(model.parameters(), 2e-3))

    model, optimizer = setup()
    for ids in fabric.setup_dataloaders(data()):
        fabric.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()
    fabric.save(folder / "fabric.ckpt", {"model": model, "optimizer": optimizer, "qlora": plugin})
    second, optimizer = setup()
    fabric.load(folder / "fabric.ckpt", {"model": second, "optimizer": optimizer, "qlora": plugin})
    assert equal(adapters(second), adapters(model)) and torch.equal(logits(second), logits(model))


def yaml(folder):
    """LightningCLI with the plugin in a file, and an option of it on the command line."""
    from lightning.pytorch.cli import LightningCLI

    Path("qlora.yaml").write_text(YAML)
    arguments = ["fit", "--config=qlora.yaml", f"--trainer.default_root_dir={folder}", "--trainer.plugins.r=8"]
    cli = LightningCLI(LoadedEarly, args=arguments)
    assert {len(value) for name, value in adapters(cli.model).items() if "lora_A" in name} == {8}


def to_and_from_peft(folder):
    """A folder of ours in PEFT, and one of PEFT here."""
    from peft import LoraConfig, PeftModel, get_peft_model

    module = Tuner()
    trainer(folder).fit(module, data())
    save_adapter(module, folder / "ours")
    ours = adapters(module.model)
    in_peft = adapters(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), folder / "ours"))
    short = {name.replace("base_model.model.", "").replace(".default.weight", ""): p for name, p in in_peft.items()}
    assert equal(short, ours)

    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft_model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), config)
    peft_model.save_pretrained(folder / "theirs")
    theirs = sorted(float(p.sum()) for p in adapters(peft_model).values())
    trained = Tuner()
    trainer(folder, limit_train_batches=0, plugins=QLoRAPrecision(adapter=str(folder / "theirs"))).fit(trained, data())
    model = AutoModelForCausalLM.from_pretrained(BASE)
    convert(model, r=2, target_modules=["q_proj"])
    load_adapter(model, folder / "theirs")
    assert equal(adapters(model), adapters(trained.model))
    assert theirs == sorted(float(p.sum()) for p in adapters(model).values())


def merge_and_publish(folder):
    """Merge, save as a plain folder, and load that without this package."""
    module = Tuner()
    trainer(folder).fit(module, data())
    trained = logits(module.model)
    merge(module)
    assert not adapters(module)
    torch.testing.assert_close(logits(module.model), trained, rtol=1e-4, atol=1e-4)
    module.model.save_pretrained(folder / "merged")
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-4)


def compile(folder):
    """torch.compile with the layers as one op; the back end that needs no compiler."""
    model = AutoModelForCausalLM.from_pretrained(BASE)
    convert(model, r=4)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(input_ids=TEXTS, labels=TEXTS).loss.backward()
    torch.testing.assert_close(logits(compiled), logits(model))


def commands(folder):
    """Every command of `lightning-qlora`, on what a run wrote."""

    def run(*arguments):
        result = subprocess.run(
            [Path(sys.executable).with_name("lightning-qlora"), *map(str, arguments)], capture_output=True, text=True
        )
        assert result.returncode == 0, f"{arguments}: {result.stderr[-600:]}"
        return result.stdout

    module = Tuner()
    fit = trainer(folder)
    fit.fit(module, data())
    fit.save_checkpoint(folder / "tuned.ckpt")
    assert json.loads(run("doctor", "--json"))
    assert json.loads(run("plan", BASE, "--gpu_memory", "1GiB", "--r", 4, "--json"))
    assert json.loads(run("inspect", folder / "tuned.ckpt", "--json"))
    run("export", folder / "tuned.ckpt", folder / "adapter")
    run("merge", folder / "tuned.ckpt", folder / "merged")
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    torch.testing.assert_close(logits(merged), logits(module.model), rtol=1e-4, atol=1e-4)


FLOWS = (own_loop, fit_save_and_load, resume, second_fit, workers, other_arguments, fabric, yaml)
FLOWS += (to_and_from_peft, merge_and_publish, compile, commands)


def passes(flow):
    folder = Path(flow.__name__).absolute()
    folder.mkdir()
    try:
        flow(folder)
    except Exception:
        traceback.print_exc()
        return False
    return True


def main():
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.chdir(tempfile.mkdtemp())
    LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **SIZES)).save_pretrained(BASE)
    results = {flow.__name__: passes(flow) for flow in FLOWS}
    print("\n" + json.dumps(results))
    sys.exit(not all(results.values()))


if __name__ == "__main__":
    main()
