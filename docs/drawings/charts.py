"""Charts of figures. Each reads the table of the page that shows it, so a chart and its table can't differ."""

import json
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

from svg import (
    BLUE,
    CURVES,
    DARK,
    GREEN,
    INK,
    LINE,
    ORANGE,
    OURS,
    PLAIN,
    THEIRS,
    bar,
    curve,
    line,
    number,
    spread,
    svg,
    table,
    text,
    upright,
)

GIB = 1.073741824  # GB


def cards(sizes: tuple[int, ...], x: Callable[[float], float], top: float, bottom: float) -> list[str]:
    """A dashed line for each card, at its whole memory."""
    drawn = [line(x(size * GIB), top, x(size * GIB), bottom, INK, dash="4 3") for size in sizes]
    names = [f"{size}" for size in sizes[:-1]] + [f"{sizes[-1]} GB"]
    return drawn + [text(x(size * GIB), top - 4, name, 11) for size, name in zip(sizes, names, strict=True)]


def legend(x: float, y: float, *entries: tuple[str, str]) -> list[str]:
    """Squares of a color, each with its meaning to the right."""
    drawn = []
    for words, color in entries:
        drawn += [bar(x, y - 11, 12, color, 12), text(x + 18, y, words, 12, anchor="start")]
        x += 34 + 6.4 * len(words)
    return drawn


def memory_by_size() -> str:
    """Memory of a step by model, for two lengths, beside cards."""
    rows = table("memory.md", "| model | weights in 16 bits")

    def x(size: float) -> float:
        return 104 + size * 3.3

    parts = cards((16, 24, 48, 80), x, 22, 34 + 34 * len(rows))
    for i, row in enumerate(rows):
        top = 34 + 34 * i
        parts.append(text(96, top + 16, row[0], 12, anchor="end"))
        short, long = number(row[3]), number(row[4])
        parts += [bar(x(0), top, x(long) - x(0), GREEN, 22), bar(x(0), top, x(short) - x(0), BLUE, 22)]
        parts.append(text(472, top + 16, f"{short:g} / {long:g}", 12, anchor="end"))
    bottom = 34 + 34 * len(rows) + 20
    parts += legend(20, bottom, ("1 x 2,048 tokens", BLUE), ("1 x 8,192 tokens, GB on the GPU", GREEN))
    return svg(bottom + 12, *parts, label="Memory of a step by model and length, beside cards of 16, 24, 48 and 80 GB")


def memory_of_each() -> str:
    """Memory on each GPU, DDP beside FSDP2; bars end at 100 GB."""
    rows = table("many-gpus.md", "| model | DDP, any number")
    names = ("DDP", "FSDP2 on 2", "on 8", "on 16", "on 64")

    def x(size: float) -> float:
        return 132 + min(size, 100) * 2.6

    drawn = []
    top = 34.0
    for model, *cells in rows:
        drawn.append(text(8, top + 12, model, 13, anchor="start"))
        for name, cell in zip(names, cells, strict=True):
            if not cell:
                continue
            size = number(cell)
            drawn.append(text(124, top + 12, name, 12, anchor="end"))
            drawn.append(bar(x(0), top, x(size) - x(0), BLUE if name == "DDP" else GREEN, 16))
            drawn.append(text(472, top + 12, f"{size:g} GB", 12, anchor="end"))
            if size > 100:
                drawn.append(text(x(50), top + 12, "(this bar is cut)", 12, DARK))
            top += 20
        top += 12
    return svg(
        int(top),
        *cards((24, 48, 80), x, 22, top - 12),
        *drawn,
        label="Memory on each GPU by the number of GPUs, DDP beside FSDP2",
    )


def beside(panels: dict[str, dict[str, float]], unit: dict[str, str], label: str) -> str:
    """Panels of horizontal bars, each with a scale of its own; the first bar is ours."""
    parts = []
    top = 8.0
    for title, values in panels.items():
        parts.append(text(8, top + 14, title, 13, anchor="start"))
        top += 22
        for i, (name, value) in enumerate(values.items()):
            width = 170 * value / max(values.values())
            parts.append(text(218, top + 13, name, 12, anchor="end"))
            parts.append(bar(226, top, width, THEIRS if i else OURS, 16))
            parts.append(text(232 + width, top + 13, f"{value:,g} {unit[title]}", 12, anchor="start"))
            top += 21
        top += 6
    return svg(int(top) + 4, *parts, label=label)


def three_billion() -> str:
    """Load and step of a 3B model on two cores."""
    rows = table("benchmarks.md", "|  | load | memory while loading")
    columns = {"memory of a training step": 5, "time of a training step, 512 tokens": 4, "load": 1}
    names = {"PEFT on bf16": "LoRA in 16 bits (PEFT)"}
    panels = {title: {names.get(row[0], row[0]): number(row[i]) for row in rows} for title, i in columns.items()}
    unit = dict(zip(columns, ("GB", "s", "s"), strict=True))
    label = "A model of OpenLLaMA 3B's shape on two CPU cores, beside PEFT + bitsandbytes and LoRA in 16 bits"
    return beside(panels, unit, label)


def training_step() -> str:
    """Time and memory of a step of a small Llama, beside the peers."""
    rows = table("benchmarks.md", "| variant | step, ms (quartiles)")
    columns = {"time of a step": 1, "peak memory of the process": 3}
    panels = {title: {row[0]: number(row[i]) for row in rows} for title, i in columns.items()}
    unit = {"time of a step": "ms", "peak memory of the process": "MB"}
    return beside(panels, unit, "Time and peak memory of a training step of a small Llama on a CPU")


def initializations() -> str:
    """Held-out loss from step 10 on, for each initialization."""
    rows = table("results.md", "| method | step 0 | step 10")
    steps = (10, 30, 60)

    def x(step: float) -> float:
        return 50 + (step - 10) * 4.4

    def y(loss: float) -> float:
        return 20 + (3.42 - loss) * 480

    parts = [line(50, y(at), x(60), y(at), LINE, 0.5) for at in (3.0, 3.1, 3.2, 3.3, 3.4)]
    parts += [text(44, y(at) + 4, f"{at:.1f}", 12, anchor="end") for at in (3.0, 3.1, 3.2, 3.3, 3.4)]
    parts += [text(x(step), 262, f"{step}", 12) for step in steps]
    parts += [text(x(35), 280, "step", 12), upright(12, y(3.2), "held-out loss", 12)]
    ends = []
    for color, row in zip(CURVES, rows, strict=True):
        losses = [number(cell) for cell in row[2:5]]
        parts.append(curve([(x(step), y(loss)) for step, loss in zip(steps, losses, strict=True)], color))
        for step, loss, cell in zip(steps, losses, row[2:5], strict=True):
            parts.append(line(x(step), y(loss - spread(cell)), x(step), y(loss + spread(cell)), color, 1))
        name = row[0].replace("`", "").replace(" (two roundings)", "").replace(", 5 iterations", " x5")
        ends.append((losses[-1], name, color))
    place = 0.0
    for loss, name, color in sorted(ends, reverse=True):
        place = max(place + 15, y(loss) + 4)
        parts += [line(x(60) + 3, y(loss), x(60) + 14, place - 4, color, 1)]
        parts.append(text(x(60) + 18, place, f"{name} {loss:.3f}", 12, anchor="start"))
    return svg(
        290, *parts, label="Held-out loss during training: LoRA in 16 bits and calibrated end lowest, pissa highest"
    )


def dots(rows: list[tuple[str, float, float]], ends: tuple[float, float], marks: tuple[float, ...], label: str) -> str:
    """A row for each name, with a dot and an interval."""

    def x(value: float) -> float:
        return 200 + 260 * (value - ends[0]) / (ends[1] - ends[0])

    bottom = 16 + 24 * len(rows)
    parts = [line(x(mark), 8, x(mark), bottom, LINE, 0.5) for mark in marks]
    parts += [text(x(mark), bottom + 16, f"{mark:g}", 12) for mark in marks]
    for i, (name, value, interval) in enumerate(rows):
        y = 22 + 24 * i
        parts += [
            text(190, y + 4, name, 12, anchor="end"),
            line(x(value - interval), y, x(value + interval), y, CURVES[1], 2),
        ]
        parts.append(f'<circle cx="{x(value):.1f}" cy="{y}" r="4" fill="{CURVES[2]}"/>')
    return svg(bottom + 26, *parts, label=label)


def ablations() -> str:
    """Held-out loss after 30 steps for each variant of the paper's ablations."""
    rows = table("results.md", "| variant | step 0 | step 5 | step 15 | step 30 | divided")
    cells = [(row[0], number(row[4]), spread(row[4])) for row in rows]
    label = "Held-out loss after 30 steps: adapters on attention layers alone are worse, LoRA in 16 bits is better"
    return dots(cells, (3.05, 3.4), (3.1, 3.2, 3.3, 3.4), label)


def data_types() -> str:
    """Loss before training above that of bf16, for each data type."""
    rows = table("results.md", "| data type | bits per weight | arc_easy")[1:]
    cells = [(row[0], number(row[-1]), spread(row[-1])) for row in rows]
    return dots(cells, (0, 0.36), (0, 0.1, 0.2, 0.3), "Loss of each data type above that of bf16, before training")


def memory_by_method() -> str:
    """LLaMA 65B by method and part; full fine-tuning is cut."""
    rows = table("results.md", "| LLaMA 65B | weights | adapters")
    colors = (BLUE, ORANGE, CURVES[2], GREEN, PLAIN)
    names = ("weights", "adapters", "gradients", "optimizer state", "activations")
    parts = []
    for i, (method, *cells) in enumerate(rows):
        top = 14 + 44 * i
        sizes = [number(cell) for cell in cells[:5]]
        total = number(cells[5])
        parts.append(text(126, top + 18, method, 12, anchor="end"))
        at = 134.0
        scale = 290 / 160 if total <= 160 else 290 / total
        for size, color in zip(sizes, colors, strict=True):
            if size:
                parts.append(bar(at, top, size * scale, color, 26))
            at += size * scale
        words = f"{total:.3g} GB"
        parts.append(text(at + 5, top + 18, words, 12, anchor="start"))
        if total > 160:
            parts.append(text(134, top + 39, "(not to the scale of the others)", 11, anchor="start"))
    bottom = 14 + 44 * len(rows) + 18
    parts += legend(20, bottom, *zip(names[:3], colors[:3], strict=True))
    parts += legend(20, bottom + 20, *zip(names[3:], colors[3:], strict=True))
    return svg(bottom + 32, *parts, label="Memory of LLaMA 65B by method and part")


def quickstart() -> str:
    """Training loss of the quickstart, and its memory; from the summary.json of a run."""
    summary = json.loads(Path(__file__).with_name("quickstart.json").read_text(encoding="utf-8"))
    losses = summary["losses"]
    smooth = list(accumulate(losses, lambda mean, loss: 0.8 * mean + 0.2 * loss))
    highest = max(losses)
    lowest = min(losses)

    def place(step: int, loss: float) -> tuple[float, float]:
        return 50 + 400 * step / (len(losses) - 1), 34 + 140 * (highest - loss) / (highest - lowest)

    before, after = (f"{summary[f'perplexity_{when}']:.1f}" for when in ("before", "after"))
    parts = [
        text(8, 18, f"Training loss (held-out perplexity: {before} before, {after} after)", 13, anchor="start"),
        curve([place(step, loss) for step, loss in enumerate(losses)], LINE, 1),
        curve([place(step, loss) for step, loss in enumerate(smooth)], CURVES[1]),
        *(text(44, place(0, at)[1] + 4, f"{at:.1f}", 12, anchor="end") for at in (highest, lowest)),
        upright(14, 104, "loss", 12),
        text(50, 192, "1", 12),
        text(250, 192, "step", 12),
        text(450, 192, f"{len(losses)}", 12),
        *legend(60, 212, ("each step", LINE), ("running mean", CURVES[1])),
    ]
    sizes = {
        "linear layers in 16 bits": ("linear_bytes_before", THEIRS),
        "linear layers in 4 bits": ("linear_bytes_after", BLUE),
        "adapters": ("adapter_bytes", ORANGE),
        "optimizer state": ("optimizer_bytes", ORANGE),
    }
    share = summary["trainable_parameters"] / summary["total_parameters"]
    parts.append(text(8, 244, f"Memory ({share:.1%} of the parameters train)", 13, anchor="start"))
    largest = max(summary[key] for key, _ in sizes.values())
    for i, (name, (key, color)) in enumerate(sizes.items()):
        top, width = 254 + 22 * i, 200 * summary[key] / largest
        parts += [text(172, top + 13, name, 12, anchor="end"), bar(180, top, width, color, 16)]
        parts.append(text(186 + width, top + 13, f"{summary[key] / 1e6:.1f} MB", 12, anchor="start"))
    return svg(350, *parts, label="Training loss, held-out perplexity and memory of the quickstart")


CHARTS = (
    memory_by_size,
    memory_of_each,
    memory_by_method,
    three_billion,
    training_step,
    initializations,
    ablations,
    data_types,
    quickstart,
)
