"""Draw the memory of fine-tuning by method and part, as in figures 1 and 6 of the QLoRA paper.

python examples/memory_figure.py MODEL [--output memory.png] [--batch-size 1] [--sequence-length 512]

MODEL is a folder or hub name of a transformers model in bf16; only its config.json is read. Needs matplotlib.
"""

import argparse
from pathlib import Path

from picture import plt

from lightning_qlora import estimate_memory

PARTS = ["weights", "adapters", "gradients", "optimizer state", "activations"]


def bars(model: str, batch_size: int, sequence_length: int) -> dict[str, dict[str, float]]:
    """Bytes at the peak by method and part, with gradient checkpointing and the other defaults of `QLoRAPrecision`.

    Full fine-tuning is counted as in the paper: 12 bytes for each bf16 weight (weight, gradient, two fp32 moments). At
    the peak all gradients exist, and the activations are freed. 16-bit LoRA has the adapters and activations of QLoRA.
    """
    estimate = estimate_memory(model, batch_size, sequence_length, gradient_checkpointing=True)
    parts = estimate.parts
    qlora = {
        "weights": parts["4-bit weights"] + parts["other frozen weights"],
        "adapters": parts["trained weights"],
        "gradients": estimate.gradients_at_peak,
        "optimizer state": parts["optimizer state"],
        "activations": parts["decode buffer"] + parts["activations"],
    }
    dense = estimate.dense_bytes
    return {
        "full\nfine-tuning": {"weights": dense, "gradients": dense, "optimizer state": 4 * dense},
        "16-bit\nLoRA": qlora | {"weights": dense, "activations": parts["activations"]},
        "QLoRA": qlora,
        "QLoRA,\npaged state": qlora | {"optimizer state": 0},
    }


def draw(bars: dict[str, dict[str, float]], title: str, path: Path) -> None:
    """Stacked bars, one for each method."""
    figure, axes = plt.subplots(figsize=(6.4, 4), dpi=120, layout="constrained")
    below = [0.0] * len(bars)
    for part in PARTS:
        heights = [bar.get(part, 0) / 1e9 for bar in bars.values()]
        axes.bar(list(bars), heights, bottom=below, label=part, width=0.6)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    largest = sorted(below)[-2]  # full fine-tuning is cut, or the parts of the others could not be seen
    axes.set_ylim(0, 1.25 * largest)
    for place, total in enumerate(below):
        words = f"{total:.3g}" if total <= 1.2 * largest else f"{total:.3g}, cut"
        axes.annotate(words, (place, min(total, 1.18 * largest)), ha="center", va="bottom")
    axes.set(title=title, ylabel="GB at the peak of a step")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--output", type=Path, default=Path("memory.png"))
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--sequence-length", type=int, default=512)
    options = parser.parse_args(arguments)
    made = bars(options.model, options.batch_size, options.sequence_length)
    title = f"{Path(options.model).name}, {options.batch_size} x {options.sequence_length} tokens"
    draw(made, title, options.output)
    print({name.replace("\n", " "): f"{sum(bar.values()) / 1e9:.3g} GB" for name, bar in made.items()})


if __name__ == "__main__":
    main()
