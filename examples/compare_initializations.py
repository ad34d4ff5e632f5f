"""Compare LoRA on the 16-bit model with QLoRA under each initialization: held-out loss during training.

python examples/compare_initializations.py [--fast] [--methods default calibrated ...] [--seeds 0 1 2]

All runs use the same data, order and seeds, r = 64, alpha = 16 and no dropout. In 16 bits PEFT's LoRA layer rounds each
output twice, and the layers of this package once; "16-bit LoRA, one rounding" is PEFT with `one_rounding.py`. Writes
compare_initializations.json, .md and .png.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from causal_lm import CausalLM
from docstring_qa import DocstringQA
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from one_rounding import one_rounding
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from lightning_qlora import QLoRAPrecision

DENSE = "16-bit LoRA"
DENSE_ONE_ROUNDING = "16-bit LoRA, one rounding"
METHODS = [DENSE, DENSE_ONE_ROUNDING, "default", "calibrated"]
ADAPTER: dict[str, Any] = {"r": 64, "lora_alpha": 16, "lora_dropout": 0.0}


class HeldOutLoss(Callback):
    """Measure the held-out loss before given optimizer steps.

    Step 0 measures the initialization, and step 1 that of "calibrated", which the first optimizer step initializes.
    """

    def __init__(self, steps: list[int]) -> None:
        self.steps, self.losses = steps, {}

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        if trainer.global_step in self.steps:
            self.measure(trainer, module)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.measure(trainer, module)

    def measure(self, trainer: Trainer, module: LightningModule) -> None:
        module.eval()
        self.losses[trainer.global_step] = held_out_loss(module.model, trainer.datamodule.val_dataloader())
        module.train()


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> float:
    """Return the mean loss of the labelled tokens."""
    total, count = 0.0, 0
    for batch in batches:
        labels = int((batch["labels"][:, 1:] != -100).sum())
        total += model(**{name: value.to(model.device) for name, value in batch.items()}).loss.item() * labels
        count += labels
    return total / count


def run(method: str, seed: int, steps: int, held_out: int) -> dict[str, Any]:
    """Fine-tune once; return the loss at each measured step and the cost of the initialization."""
    seed_everything(seed)
    module, data = CausalLM(), DocstringQA(batch_size=4, held_out=held_out, seed=seed)
    plugin = None
    if method in (DENSE, DENSE_ONE_ROUNDING):
        # All linear layers except the output embedding, as in the plugin.
        config = LoraConfig(target_modules="all-linear", **ADAPTER)
        module.model = get_peft_model(module.model, one_rounding(config) if method == DENSE_ONE_ROUNDING else config)
    else:
        plugin = QLoRAPrecision(init_lora_weights=method, **ADAPTER)
    callback = HeldOutLoss([0, 1, steps // 6, steps // 2])
    trainer = Trainer(
        plugins=plugin, callbacks=callback, max_steps=steps, devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, limit_val_batches=0,
    )  # fmt: skip
    began = time.perf_counter()
    trainer.fit(module, data)
    result = {"method": method, "seed": seed, "losses": callback.losses, "seconds": time.perf_counter() - began}
    if plugin is not None and plugin.report is not None:
        calibration = plugin.report.calibration
        result["initialization_seconds"] = plugin.report.seconds + (calibration.seconds if calibration else 0)
        result["host_bytes"] = calibration.host_bytes if calibration else 0
    print(json.dumps(result), flush=True)
    return result


def table(results: list[dict[str, Any]]) -> str:
    """Make a Markdown table: mean and standard deviation over the seeds, for each method and step."""
    steps = list(results[0]["losses"])
    lines = ["| method | " + " | ".join(f"step {step}" for step in steps) + " | seconds to initialize |"]
    lines.append("|" + " --- |" * (len(steps) + 2))
    for method, runs in grouped(results).items():
        cells = []
        for step in steps:
            losses = [one["losses"][step] for one in runs]
            spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
            cells.append(f"{statistics.mean(losses):.4f}{spread}")
        seconds = [one["initialization_seconds"] for one in runs if "initialization_seconds" in one]
        lines.append(f"| {method} | {' | '.join(cells)} | {f'{statistics.mean(seconds):.1f}' if seconds else ''} |")
    return "\n".join(lines) + "\n"


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Plot the mean held-out loss against steps, with error bars over the seeds."""
    from picture import INK, plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for method, runs in grouped(results).items():
        steps = list(runs[0]["losses"])
        losses = [[one["losses"][step] for one in runs] for step in steps]
        spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in losses]
        style = {"fmt": "--", "color": INK} if method == DENSE else {"fmt": "-"}
        axes.errorbar(steps, [statistics.mean(values) for values in losses], spread, **style, capsize=3, label=method)
    axes.set(xlabel="step", ylabel="held-out loss (answer tokens)", title="SmolLM2-135M, r = 64")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def grouped(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Method -> its runs."""
    methods = dict.fromkeys(one["method"] for one in results)
    return {method: [one for one in results if one["method"] == method] for method in methods}


def main(args: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="6 steps instead of 60, with one seed")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, help="methods to compare")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 1 2")
    parser.add_argument("--output", default="outputs/compare_initializations", help="folder for the results")
    options = parser.parse_args(args)

    folder, results = Path(options.output), []
    folder.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds or ([0] if options.fast else [0, 1, 2]):
        for method in options.methods:
            results.append(run(method, seed, steps=6 if options.fast else 60, held_out=16 if options.fast else 64))
            (folder / "compare_initializations.json").write_text(json.dumps(results, indent=1))
    (folder / "compare_initializations.md").write_text(table(results), encoding="utf-8")
    draw(results, folder / "compare_initializations.png")
    print(table(results))
    return results


if __name__ == "__main__":
    main()
