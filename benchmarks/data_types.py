"""Zero-shot accuracy and perplexity of SmolLM2-135M in each 4-bit data type, before training (QLoRA paper, section 4).

    python -m benchmarks.data_types --data FOLDER [--text FILE] [--calibration FILE] [--limit N] [--output FOLDER]

Reads every TASK.jsonl of --data (`multiple_choice` describes a line) and takes the first N items of each. Differences
to bf16 are paired: the items are the same, so what both get right or wrong cancels. Perplexity is that of windows of
512 tokens from the beginning of --text (WikiText-2's test.txt; see `starts`); without a file, of the manual of the
Python language that is installed with Python (pydoc_data.topics). The adapters of "calibrated" use eight windows of
--calibration. --output gets data_types.json, .md and .png; a run that was stopped continues there.
"""

import argparse
import hashlib
import json
import math
import os
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from benchmarks.measure import table
from benchmarks.multiple_choice import correct, read_tasks
from benchmarks.starts import feed, load_model, load_tokenizer, windows
from lightning_qlora import calibrate, convert
from lightning_qlora.layers.qlora_linear import adapted_layers

REFERENCE = "bf16"
TYPES: dict[str, dict[str, Any]] = {  # without an initialization from data B = 0, so the rank has no effect
    REFERENCE: {},
    "NF4": {"double_quant": False, "r": 1},
    "NF4 + DQ": {"r": 1},
    "FP4 + DQ": {"quant_type": "fp4", "r": 1},
    "INT4 + DQ": {"quant_type": "int4", "r": 1},
    "NF4 + DQ, calibrated": {"init_lora_weights": "calibrated"},
}
PIECE = 50  # items between two saves; batches are sorted by length within a piece
NORMAL = statistics.NormalDist()
INTERVAL = NORMAL.inv_cdf(0.975)  # standard errors on each side of a 95% interval
DETECTABLE = INTERVAL + NORMAL.inv_cdf(0.8)  # a difference of so many standard errors is found in four of five samples


def build(name: str, base: str | None, r: int, seen: Tensor) -> tuple[PreTrainedModel, list[float]]:
    """The model in a data type, and its bits per weight without and with the adapters."""
    model = load_model(base, torch.bfloat16)
    if name == REFERENCE:
        return model.eval(), [16.0, 16.0]
    report = convert(model.train(), deferred_logits=False, **{"r": r, **TYPES[name]})
    if report.calibration is not None:
        feed(model, seen)
        calibrate(model)
    size = bits(model)
    return decode(model).eval(), size


def bits(model: nn.Module) -> list[float]:
    """Bits per weight of the converted layers, without and with the adapters, from the bytes that they hold."""
    layers = adapted_layers(model).values()
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    base = sum(layer.packed_weight.nbytes for layer in layers)
    trained = [layer for layer in layers if layer.lora_B.any()]
    adapters = sum(p.nbytes for layer in trained for p in layer.adapter_parameters())
    return [8 * base / weights, 8 * (base + adapters) / weights]


def decode(model: PreTrainedModel) -> PreTrainedModel:
    """Make every 4-bit layer dense, once, with its adapter beside it: the same function, faster for many batches."""
    modules = dict(model.named_modules())
    for name, layer in adapted_layers(model).items():
        a, b = (p.detach().to(layer.weight_dtype) for p in (layer.lora_A, layer.scaling * layer.lora_B))
        layer.become_dense(nn.Parameter(layer.decode(), requires_grad=False), name, modules)
        if b.any():
            layer.register_forward_hook(partial(add_adapter, a, b))
    return model


def add_adapter(a: Tensor, b: Tensor, layer: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
    return y + F.linear(F.linear(args[0], a), b)


@torch.inference_mode()
def window_losses(model: PreTrainedModel, rows: Tensor) -> list[float]:
    """The mean loss of each window, in nats per token."""
    return [model(row[None], labels=row[None]).loss.item() for row in rows]


def paired(values: list[list[int]], reference: list[list[int]]) -> tuple[float, float]:
    """Difference of the mean accuracies over tasks, and its standard error over the items."""
    means = []
    variances = []
    for task, other in zip(values, reference, strict=True):
        differences = [a - b for a, b in zip(task, other, strict=True)]
        means.append(statistics.mean(differences))
        variances.append(statistics.variance(differences) / len(differences))
    return statistics.mean(means), math.sqrt(sum(variances)) / len(variances)


def tables(results: dict[str, Any]) -> str:
    """Accuracies, means and paired differences to bf16 in percent; below, the differences of each task."""
    per_item = results["per_item"]
    names = list(results["per_item"])
    tasks = list(per_item[REFERENCE])
    rows = []
    details = []
    for name in names:
        base, adapted = results["bits"][name]
        accuracies = [100 * statistics.mean(per_item[name][task]) for task in tasks]
        losses = results["window_losses"][name]
        row = [name, f"{base:.3f}" + (f" + {adapted - base:.3f}" if adapted > base else "")]
        row += [f"{value:.1f}" for value in [*accuracies, statistics.mean(accuracies)]]
        row += [*difference(per_item, name, tasks), f"{math.exp(statistics.mean(losses)):.2f}"]
        rows.append([*row, "" if name == REFERENCE else gap(losses, results["window_losses"][REFERENCE])])
        details.append([name, *(difference(per_item, name, [task])[0] for task in tasks)])
    heads = [
        "data type",
        "bits per weight",
        *tasks,
        "mean",
        "difference to bf16",
        "detectable",
        "perplexity",
        "loss - bf16",
    ]
    counts = ", ".join(f"{task} {len(per_item[REFERENCE][task])}" for task in tasks)
    return f"Items: {counts}\n\n{table(heads, rows)}\n\n{table(['difference to bf16', *tasks], details[1:])}\n"


def difference(per_item: dict[str, dict[str, list[int]]], name: str, tasks: list[str]) -> list[str]:
    """The paired difference with its 95% interval, and the difference that such items detect with a power of 80%."""
    if name == REFERENCE:
        return ["", ""]
    mean, error = paired(*([per_item[each][task] for task in tasks] for each in (name, REFERENCE)))
    return [f"{100 * mean:+.1f} ± {100 * INTERVAL * error:.1f}", f"{100 * DETECTABLE * error:.1f}"]


def gap(losses: list[float], reference: list[float]) -> str:
    """The paired difference of the losses of the windows, with its 95% interval."""
    each = [a - b for a, b in zip(losses, reference, strict=True)]
    error = INTERVAL * statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else math.inf
    return f"{statistics.mean(each):+.4f} ± {error:.4f}"


def draw(results: dict[str, Any], path: Path) -> None:
    """Plot the paired differences with their intervals, and the perplexities."""
    from picture import GREY, INK, plt

    per_item = results["per_item"]
    names = [name for name in per_item if name != REFERENCE]
    tasks = list(per_item[REFERENCE])
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    for offset, chosen in enumerate([tasks, *([task] for task in tasks)]):
        pairs = [paired(*([per_item[n][t] for t in chosen] for n in (name, REFERENCE))) for name in names]
        left.errorbar(
            [100 * mean for mean, _ in pairs],
            [at + 0.13 * (offset - len(tasks) / 2) for at in range(len(names))],
            xerr=[100 * INTERVAL * error for _, error in pairs],
            fmt="o" if offset else "D",
            capsize=2,
            color=None if offset else INK,
            alpha=0.5 if offset else 1,
            label=chosen[0] if offset else "mean",
        )
    left.axvline(0, color=GREY, linewidth=1)
    left.set(xlabel="accuracy minus that of bf16, points (95%)", yticks=range(len(names)), yticklabels=names)
    left.invert_yaxis()
    left.legend(frameon=False, fontsize=8)
    values = [math.exp(statistics.mean(results["window_losses"][name])) for name in [REFERENCE, *names]]
    right.bar_label(right.barh(range(len(names)), values[1:], color=GREY), fmt="%.2f", padding=3)
    right.axvline(values[0], color=INK, linewidth=1, label=f"bf16: {values[0]:.2f}")
    right.set(xlabel=f"perplexity, {results['settings']['text']}")
    right.legend(frameon=False, fontsize=8, loc="lower right")
    right.margins(x=0.15)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def digest(path: str | Path | None) -> str:
    """Name and content of a file, for the settings of a run."""
    if path is None:
        return "pydoc_data.topics"
    return f"{Path(path).name} {hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]}"


class Results:
    """What was measured, in data_types.json; a later run continues, also with more items, types or tasks.

    Raises:
        ValueError: If the file is of a run with other settings.
    """

    def __init__(self, folder: str | None, settings: dict[str, Any]) -> None:
        self.path = None if folder is None else Path(folder) / "data_types.json"
        self.values: dict[str, Any] = {"settings": settings, "bits": {}, "per_item": {}, "window_losses": {}}
        if self.path is not None and self.path.exists():
            self.values = json.loads(self.path.read_text())
            was = self.values["settings"]
            was["tasks"] = settings["tasks"] | was["tasks"]  # other tasks may be added
            settings = settings | {"tasks": was["tasks"] | settings["tasks"]}
            if was != settings:
                changed = ", ".join(f"{key}={was.get(key)!r}" for key in settings if was.get(key) != settings[key])
                raise ValueError(f"{self.path} is of a run with {changed}. Use another --output, or delete the file.")

    def extend(self, values: list[Any], inputs: Sequence[Any], name: str, compute: Callable[[Any], list[Any]]) -> None:
        """Append the values of the inputs that have none yet, and save after each piece."""
        with tqdm(total=len(inputs), initial=min(len(values), len(inputs)), desc=name) as bar:
            while len(values) < len(inputs):
                new = compute(inputs[len(values) : len(values) + PIECE])
                values += new
                self.save()
                bar.update(len(new))

    def save(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.values))
            os.replace(part, self.path)  # a run that is killed leaves the old file


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what --output does not have yet; return the values of the tasks, types and items that were asked for."""
    tasks = read_tasks(options.data, options.limit)
    tokenizer = load_tokenizer(options.base)
    tested = windows(options.text, options.windows, tokenizer)
    seen = windows(options.calibration, 8, tokenizer, odd=True)
    settings = {name: getattr(options, name) for name in ("base", "r")}
    settings |= {"text": digest(options.text), "calibration": digest(options.calibration)}
    settings |= {"tasks": {task: digest(Path(options.data) / f"{task}.jsonl") for task in tasks}}
    results = Results(options.output, settings)
    bits, losses, per_item = (results.values[key] for key in ("bits", "window_losses", "per_item"))
    for name in options.types:
        loss = losses.setdefault(name, [])
        done = {task: per_item.setdefault(name, {}).setdefault(task, []) for task in tasks}
        if len(loss) < len(tested) or any(len(done[task]) < len(items) for task, items in tasks.items()):
            model, bits[name] = build(name, options.base, options.r, seen)
            results.extend(loss, tested, f"{name}, text", partial(window_losses, model))
            for task, items in tasks.items():
                results.extend(done[task], items, f"{name}, {task}", partial(correct, model, tokenizer))
    return {
        "settings": results.values["settings"],
        "bits": {name: bits[name] for name in options.types},
        "window_losses": {name: losses[name][: len(tested)] for name in options.types},
        "per_item": {
            name: {task: per_item[name][task][: len(items)] for task, items in tasks.items()} for name in options.types
        },
    }


def main(args: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with TASK.jsonl files")
    parser.add_argument("--text", help="file for the perplexity")
    parser.add_argument("--calibration", help='file for "calibrated"; not the one of --text')
    parser.add_argument("--limit", type=int, help="items of a task; default: all")
    parser.add_argument("--windows", type=int, default=32, help="windows of --text")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES), help="data types beside bf16")
    parser.add_argument("--r", type=int, default=64, help="rank of the adapters that are initialized")
    parser.add_argument("--base", help="hub name or folder of another model")
    parser.add_argument("--output", help="folder for the results")
    options = parser.parse_args(args)
    if options.limit is not None and options.limit < 2:
        parser.error(f"--limit {options.limit}: must be at least 2, for a standard error")
    options.types = [REFERENCE, *(name for name in options.types if name != REFERENCE)]
    values = run(options)
    text = tables(values)
    print(text)
    if options.output is not None:
        (Path(options.output) / "data_types.md").write_text(text, encoding="utf-8")
        draw(values, Path(options.output) / "data_types.png")
    return values


if __name__ == "__main__":
    main()
