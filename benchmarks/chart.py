"""The bar chart of docs/benchmarks.md: a training step's time and peak memory, from the JSON that cpu_step wrote.

python -m benchmarks.chart
"""

import json
import statistics
import sys

from benchmarks import measure, peers
from benchmarks.cpu_step import WARMUP

sys.path.insert(0, str(measure.ROOT / "examples"))

PICTURE = measure.ROOT / "docs" / "benchmarks.svg"


def main() -> None:
    """Draw it."""
    from picture import GREY, plt

    variants = json.loads((measure.RESULTS / "cpu_step.json").read_text())["variants"]
    names = list(variants)
    seconds = [[step["seconds"] for step in variants[name]["steps"][WARMUP:]] for name in names]
    bars = {
        "step, seconds": [statistics.median(each) for each in seconds],
        "peak memory, MB": [variants[name]["steps"][-1]["peak_mb"] for name in names],
    }
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.6), sharey=True, layout="constrained")
    for axis, (title, values) in zip(axes, bars.items(), strict=True):
        colours = ["tab:purple" if name == peers.OURS else GREY for name in names]
        drawn = axis.barh(names, values, color=colours)
        axis.bar_label(drawn, fmt="%.2f" if "seconds" in title else "%.0f", padding=3)
        axis.set_title(title)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.15)
    axes[0].invert_yaxis()  # they share the axis, and turning it twice would undo it
    plt.rcParams["svg.hashsalt"] = "benchmarks"  # the same figures give the same file
    figure.savefig(PICTURE, metadata={"Date": None})
    print(PICTURE)


if __name__ == "__main__":
    main()
