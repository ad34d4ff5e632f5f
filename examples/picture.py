"""The picture of the quickstart: the loss curve and the memory of each part."""

from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # works without a display

import matplotlib.pyplot as plt

BLUE, ORANGE, GREY = "#2563eb", "#ea580c", "#9ca3af"
INK = "#767b82"  # readable on white and on the ground of a dark page
plt.rcParams.update(
    dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    | {"savefig.transparent": True}
)


def draw(summary: dict[str, Any], path: Path) -> None:
    """Draw the measurements of a run into a PNG file."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")

    losses = summary["losses"]
    steps = range(1, len(losses) + 1)
    smooth = list(accumulate(losses, lambda mean, loss: 0.8 * mean + 0.2 * loss))
    left.plot(steps, losses, color=BLUE, alpha=0.3, label="each step")
    left.plot(steps, smooth, color=BLUE, linewidth=2, label="smoothed")
    left.set(xlabel="step", ylabel="training loss (answer tokens)")
    before, after = (f"{summary[f'perplexity_{when}']:.1f}" for when in ("before", "after"))
    left.set_title(f"Training loss (held-out perplexity: {before} before, {after} after)")
    left.legend(frameon=False)

    bars = {
        "linear layers\nin 16 bits": ("linear_bytes_before", GREY),
        "linear layers\nin 4 bits": ("linear_bytes_after", BLUE),
        "adapters": ("adapter_bytes", ORANGE),
        "optimizer\nstate": ("optimizer_bytes", ORANGE),
    }
    megabytes = [summary[key] / 1e6 for key, _ in bars.values()]
    drawn = right.bar(list(bars), megabytes, color=[color for _, color in bars.values()], width=0.6)
    right.bar_label(drawn, [f"{size:.0f} MB" if size >= 10 else f"{size:.2g} MB" for size in megabytes], padding=2)
    right.set(ylabel="MB", ylim=(0, 1.12 * max(megabytes)))
    right.set_title(f"{summary['trainable_parameters'] / summary['total_parameters']:.1%} of the parameters train")

    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
