"""Held-out loss during fine-tuning: initializations, data types, optimizer settings, and the paper's ablations.

    python -m benchmarks.fine_tuning SET|VARIANT ... [--steps 60] [--seeds 0 1 2] [--output DIR]
    python -m benchmarks.fine_tuning VARIANT ... --task reviews                 # MiniLM, see `tasks`
    python -m benchmarks.fine_tuning default calibrated --merge --text FILE     # what merging costs, after training

The sets are in SETS: starts, dense, candidates, equal_bytes, best_rates, reviews, ablations.
A variant is a start with the settings that differ from DEFAULTS, such as "calibrated,lr=1e-3,ratio=4". Starts: "lora"
(16-bit LoRA, PEFT), those of init_lora_weights, and those of `candidate_starts`. Settings:
    lr       learning rate of lora_A; lora_B has ratio times lr (LoRA+)
    warmup   share of the steps in which the rates grow from 0
    decay    linear, cosine or none: how the rates fall to 0 afterwards
    r, alpha, rslora     the adapter: rank, lora_alpha, and use_rslora (1 or 0)
    layers   all, or attention: which layers have adapters; the others are in 4 bits too, and frozen
    quant, block, dq     data type, block size, and double quantization, 1 or 0
    exclude  layers to leave in 16 bits without an adapter (exclude_modules), joined by "+"
    codes, span, frozen, float, by, bare, fresh     for "calibrated" only: see `equal_bytes`
    init     for "lora" only: PEFT's init_lora_weights, default, pissa, olora or lora_ga
    roundings    for "lora" only: 2 of each output, PEFT's layer, or 1, as in this package (examples/one_rounding.py)

The data are those of `--task`; all variants of a seed see the same batches in the same order. "MB" counts the linear
layers, and 16 bytes for each number that trains (fp32 weight, gradient, two moments of AdamW).
--output gets fine_tuning.json, .md and .png; a run that was stopped continues there.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from peft import LoraConfig, LoraGAConfig, PeftModel, get_peft_model, preprocess_loraga
from torch import Tensor, nn

from benchmarks.candidate_starts import BATCHES, STARTS, CandidateStart
from benchmarks.data_types import window_losses
from benchmarks.equal_bytes import TRAINED, SpendBytes
from benchmarks.measure import table
from benchmarks.starts import windows
from benchmarks.tasks import TASKS, Task
from lightning_qlora import QLoRAPrecision, merge, save_adapter
from lightning_qlora.layers.qlora_linear import adapted_layers

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import compare_initializations
from one_rounding import one_rounding
from smollm2 import load_model, load_tokenizer

DENSE = "lora"
DENSE_INITS = ("pissa", "olora", "lora_ga")
DEFAULTS: dict[str, Any] = {
    "lr": 5e-4,
    "ratio": 1.0,
    "warmup": 0.0,
    "decay": "linear",
    "r": 16,
    "alpha": 16.0,
    "rslora": 0,
    "layers": "all",
    "quant": "nf4",
    "block": 64,
    "dq": 1,
    "init": "default",
    "roundings": 2,
    "codes": 0,
    "span": 0,
    "frozen": 0.0,
    "float": 0.0,
    "by": "per_byte",
    "bare": 0,
    "fresh": 0,
    "exclude": "",
}
SETS = {
    "starts": [
        *(
            f"{start}{more}"
            for more in ("", ",ratio=4", ",ratio=16,lr=1e-4", ",lr=1e-3", ",rslora=1", ",warmup=0.1")
            for start in (DENSE, "calibrated")
        ),
        "default",
    ],
    "dense": [f"{DENSE},ratio=4{more}" for more in ("", *(f",init={init}" for init in DENSE_INITS))],
    "candidates": ["default,ratio=4", "calibrated,ratio=4", *(f"{start},ratio=4" for start in STARTS)],
    "equal_bytes": [
        f"{DENSE},ratio=4",
        *(
            f"calibrated,ratio=4{more}"
            for more in (
                "",
                ",exclude=k_proj+v_proj",
                ",exclude=self_attn",
                ",r=24,alpha=24",
                ",frozen=8",
                ",float=8",
                ",float=8,by=error",
                ",float=8,by=random",
                ",float=8,bare=1",
            )
        ),
    ],
    "best_rates": [
        f"{DENSE},ratio=4,lr=1e-3",
        "default,ratio=4,lr=1e-3",
        *(
            f"calibrated,ratio=4,{more}"
            for more in (
                "lr=1e-3",
                "frozen=8,fresh=1,lr=1e-3",
                "frozen=2,fresh=1,lr=1e-3",
                "codes=100000",
                "codes=100000,lr=1e-3",
                "codes=10000,span=64,lr=1e-3",
                "codes=100000,frozen=8,fresh=1,lr=1e-3",
            )
        ),
    ],
    "reviews": [
        f"{DENSE},ratio=4",
        *(f"default,ratio=4{more}" for more in ("", ",block=32", ",quant=fp4", ",quant=int4")),
        *(f"calibrated,ratio=4{more}" for more in ("", ",r=24,alpha=24", ",frozen=8", ",codes=20000")),
    ],
    "ablations": [
        DENSE,
        "default",
        "default,dq=0",
        "default,layers=attention",
        *(f"default,r={r}" for r in (4, 8, 32, 64)),
    ],
}


class Variant(NamedTuple):
    """A start and its settings."""

    start: str
    settings: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> "Variant":
        start, *parts = text.split(",")
        settings = dict(DEFAULTS)
        for part in parts:
            key, _, value = part.partition("=")
            if key not in DEFAULTS or not value:
                raise ValueError(f"{text!r}: {part!r} is no setting. Settings: {', '.join(DEFAULTS)}.")
            settings[key] = type(DEFAULTS[key])(value)
        if start != DENSE and settings["init"] != DEFAULTS["init"]:
            raise ValueError(f"{text!r}: init is a setting of {DENSE!r} only; the other starts are initializations.")
        if start != DENSE and settings["roundings"] != DEFAULTS["roundings"]:
            raise ValueError(f"{text!r}: roundings is a setting of {DENSE!r} only; the other starts round once.")
        if start != "calibrated" and any(settings[key] for key in ("codes", "frozen", "float", "fresh")):
            raise ValueError(f"{text!r}: codes, frozen, float and fresh are settings of 'calibrated' only.")
        return cls(start, settings)

    def adapter(self) -> dict[str, Any]:
        """The arguments that PEFT's LoraConfig and the plugin share."""
        each = self.settings
        return {"r": each["r"], "lora_alpha": each["alpha"], "use_rslora": bool(each["rslora"]), "lora_dropout": 0.0}


class Module(LightningModule):
    """A model with LoRA+ and a schedule."""

    def __init__(self, base: str | None, variant: Variant, steps: int, task: Task = TASKS["docstrings"]) -> None:
        super().__init__()
        self.model = task.load(base).train()
        self.variant = variant
        self.steps = steps
        self.task = task

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> Any:
        each = self.variant.settings
        if each["layers"] == "attention":
            for name, parameter in self.named_parameters():
                if "lora_" in name and "self_attn" not in name:
                    parameter.requires_grad_(False)
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in trained if ("lora_B" in name) is fast], "lr": each["lr"] * factor}
            for fast, factor in ((False, 1), (True, each["ratio"]))
        ]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer := torch.optim.AdamW(groups), self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def rate(self, step: int) -> float:
        """The factor of the learning rates in a step."""
        each = self.variant.settings
        begin = each["warmup"] * self.steps
        if step < begin:
            return (step + 1) / (begin + 1)
        rest = (self.steps - step) / max(1.0, self.steps - begin)
        return {"none": 1.0, "linear": rest, "cosine": (1 - math.cos(math.pi * rest)) / 2}[each["decay"]]


class HeldOutLoss(compare_initializations.HeldOutLoss):
    """What the task measures before given steps, and after the last: self.values[what][step]."""

    def __init__(self, steps: list[int]) -> None:
        super().__init__(steps)
        self.values: dict[str, dict[str, float]] = {}

    def measure(self, trainer: Trainer, module: LightningModule) -> None:
        module.eval()
        found = module.task.measure(module.model, trainer.datamodule.val_dataloader())  # type: ignore
        module.train()
        for what, value in found.items():
            self.values.setdefault(what, {})[str(trainer.global_step)] = value


def dense_lora(model: Any, variant: Variant, data: Any, more: dict[str, Any] | None = None) -> Any:
    """16-bit LoRA of PEFT with one of its initializations; "lora_ga" gets the gradients of BATCHES batches."""
    init = variant.settings["init"]
    config = LoraConfig(
        target_modules="all-linear",
        init_lora_weights=True if init == "default" else init,
        lora_ga_config=LoraGAConfig() if init == "lora_ga" else None,
        **variant.adapter(),
        **(more or {}),
    )
    if init == "lora_ga":
        data.setup("fit")
        batches = islice(data.train_dataloader(), BATCHES)
        # It wants the names that PEFT finds for "all-linear" later.
        linear = [name for name, part in model.model.named_modules() if isinstance(part, nn.Linear)]
        config.target_modules = {name.rpartition(".")[2] for name in linear}
        preprocess_loraga(model, config, lambda: [model(**batch).loss.backward() for batch in batches])
    return get_peft_model(model, one_rounding(config) if variant.settings["roundings"] == 1 else config)


def train(variant: Variant, seed: int, base: str, options: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune once; return the held-out losses, and with --merge those of the merged model."""
    seed_everything(seed, verbose=False)
    task = TASKS[options.task]
    each = variant.settings
    module = Module(base, variant, options.steps, task)
    data = task.data(options.base, batch_size=task.batch_size, held_out=options.held_out, seed=seed)
    itemsize = module.model.dtype.itemsize
    dense = sum(part.weight.numel() for part in module.model.base_model.modules() if isinstance(part, nn.Linear))
    plugin = None
    spend = SpendBytes(each, module.model, seed, Path(options.output))
    if variant.start == DENSE:
        module.model = dense_lora(module.model, variant, data, task.peft)
    else:
        plugin = QLoRAPrecision(
            init_lora_weights="default" if variant.start in STARTS else variant.start,
            exclude_modules=each["exclude"].split("+") if each["exclude"] else None,
            quant_type=each["quant"],
            block_size=each["block"],
            double_quant=bool(each["dq"]),
            **variant.adapter(),
        )
    changes: list[Any] = (
        [CandidateStart(variant.start, task.load(base), task.labels)] if variant.start in STARTS else []
    )
    if each["codes"] or each["frozen"] or each["float"]:
        spend.dense = task.load(base).eval()
        changes.append(spend)
    losses = HeldOutLoss([round(part * options.steps) for part in options.points])
    trainer = Trainer(
        plugins=plugin,
        callbacks=[losses, *changes],
        max_steps=options.steps,
        max_epochs=-1,
        gradient_clip_val=0.3,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=0,
        enable_progress_bar=False,
    )
    trainer.fit(module, data)
    layers = adapted_layers(module.model).values()
    dense -= sum(layer.in_features * layer.out_features for layer in layers)
    base_bytes = sum(layer.packed_weight.nbytes for layer in layers) + itemsize * dense
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    result: dict[str, Any] = {**losses.values, "MB": (base_bytes + spend.extra + TRAINED * trained) / 1e6}
    if options.merge or options.text:
        result["merged"] = after_training(module, data, base, options)
    return result


def after_training(module: Module, data: Any, base: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Held-out loss and perplexity of the adapter on its base; with --merge merged, and on the 16-bit model."""
    text = windows(options.text, options.windows, load_tokenizer(options.base))

    def measure(model: Any) -> list[float]:
        loss = module.task.measure(model.eval(), data.val_dataloader())["losses"]
        return [loss, math.exp(statistics.mean(window_losses(model, text)))]

    found = {"adapter on its base": measure(module.model)}
    if not options.merge:
        return found
    with tempfile.TemporaryDirectory() as folder:
        if module.variant.start == DENSE:
            module.model = module.model.merge_and_unload()
        else:
            save_adapter(module, folder, base="float")
            found["adapter on the 16-bit model"] = measure(PeftModel.from_pretrained(load_model(base), folder))
            merge(module)
    return found | {"merged, 16 bits": measure(module.model)}


def tables(results: list[dict[str, Any]]) -> str:
    """Held-out loss by step, mean and standard deviation over the seeds; the last column divides by the best LoRA."""
    groups = grouped(results)
    steps = list(results[0]["losses"])
    last = {name: statistics.mean(run["losses"][steps[-1]] for run in runs) for name, runs in groups.items()}
    best = min((name for name in groups if name.split(",")[0] == DENSE), key=last.__getitem__, default=None)
    rows = []
    for name, runs in groups.items():
        cells = [spread([run["losses"][step] for run in runs]) for step in steps]
        cells.append(f"{last[name] / last[best]:.4f}" if best else "")
        if "accuracies" in runs[0]:
            cells.append(spread([100 * run["accuracies"][steps[-1]] for run in runs], 1))
        rows.append([f"`{name}`", f"{runs[0]['MB']:.1f}", str(len(runs)), *cells])
    heads = ["variant", "MB", "seeds", *(f"step {step}" for step in steps), f"divided by `{best}`" if best else ""]
    heads += ["accuracy"] if "accuracies" in results[0] else []
    text = table(heads, rows) + "\n"
    rows = []
    for name, runs in groups.items():
        for where in runs[0].get("merged", ()):
            loss, perplexity = map(statistics.mean, zip(*(run["merged"][where] for run in runs), strict=True))
            rows.append([f"`{name}`", where, f"{loss:.4f}", f"{perplexity:.2f}"])
    return text + ("\n" + table(["variant", "measured", "held-out loss", "perplexity"], rows) + "\n" if rows else "")


def spread(values: list[float], digits: int = 4) -> str:
    more = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{more}"


def grouped(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Variant -> its runs."""
    names = dict.fromkeys(run["variant"] for run in results)
    return {name: [run for run in results if run["variant"] == name] for name in names}


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Plot the loss against steps, and that after the last step: means with standard deviations over the seeds."""
    from picture import plt

    figure, (curves, last) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    groups = grouped(results)
    for number, (name, runs) in enumerate(groups.items()):
        steps = [int(step) for step in runs[0]["losses"] if int(step)]  # the losses before training are much higher
        losses = [[run["losses"][str(step)] for run in runs] for step in steps]
        spreads = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in losses]
        means = [statistics.mean(values) for values in losses]
        style: dict[str, Any] = {"color": f"C{number}", "capsize": 3}
        curves.errorbar(steps, means, spreads, linestyle="--" if name.split(",")[0] == DENSE else "-", **style)
        last.errorbar(means[-1], number, xerr=spreads[-1], marker="o", **style)
    curves.set(xlabel="step", ylabel="held-out loss (answer tokens)")
    last.set(xlabel=f"held-out loss after step {steps[-1]}")
    last.set_yticks(range(len(groups)), groups)
    last.invert_yaxis()
    for axis in (curves, last):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(args: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+", help="sets, or variants")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--task", choices=TASKS, default="docstrings")
    parser.add_argument("--held_out", type=int, help="examples for the held-out loss; default: 64 pairs, 1,376 reviews")
    parser.add_argument("--points", nargs="*", type=float, default=[0, 1 / 6, 1 / 2, 4 / 5], help="shares of the steps")
    parser.add_argument("--merge", action="store_true", help="measure the merged model after training")
    parser.add_argument("--text", help="file for a perplexity after training; see benchmarks.data_types")
    parser.add_argument("--windows", type=int, default=8, help="windows of 512 tokens of --text")
    parser.add_argument("--base", help="hub name or folder of another model")
    parser.add_argument("--output", default="outputs/fine_tuning", help="folder for the results")
    options = parser.parse_args(args)
    options.held_out = options.held_out or TASKS[options.task].held_out
    variants = [each for name in options.variants for each in SETS.get(name, [name])]
    parsed = {name: Variant.parse(name) for name in variants}

    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "fine_tuning.json"
    results = json.loads(file.read_text()) if file.exists() else []
    settings = {
        name: getattr(options, name) for name in ("task", "steps", "held_out", "merge", "text", "windows", "base")
    }
    with tempfile.TemporaryDirectory() as temporary:
        base = options.base
        if (
            base is None and options.task == "docstrings"
        ):  # an adapter for the 16-bit model is computed from a folder of weights
            base = temporary
            load_model().save_pretrained(base)
        for seed in options.seeds:
            for name, variant in parsed.items():
                key = {"variant": name, "seed": seed, **settings}
                if not any(key.items() <= run.items() for run in results):
                    results.append(key | train(variant, seed, base, options))
                    part = file.with_suffix(".part")
                    part.write_text(json.dumps(results, indent=1))
                    os.replace(part, file)  # a run that is killed leaves the old file
                    print(json.dumps(results[-1]), flush=True)
    chosen = [run for run in results if run["variant"] in parsed and run["seed"] in options.seeds]
    chosen = [run for run in chosen if settings.items() <= run.items()]
    text = tables(chosen)
    (folder / "fine_tuning.md").write_text(text, encoding="utf-8")
    draw(chosen, folder / "fine_tuning.png")
    print(text)
    return chosen


if __name__ == "__main__":
    main()
