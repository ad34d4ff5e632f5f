"""What every benchmark here does alike: take turns, keep medians, write JSON, refresh docs/benchmarks.md."""

import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "outputs" / "benchmarks"


def clock() -> Callable[[], float]:
    """Seconds passed; with one thread that thread's CPU time, which other programs do not lengthen."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def take_turns(variants: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each call. The variants alternate, so what else the machine does falls on all of them."""
    read = clock()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(warmup + rounds):
        for name, call in variants.items():
            start = read()
            call()
            if turn >= warmup:
                seconds[name].append(read() - start)
    return seconds


def median_ms(seconds: Sequence[float]) -> float:
    """The median, in milliseconds."""
    return 1e3 * statistics.median(seconds)


def spread(seconds: Sequence[float]) -> str:
    """The median with its quartiles, in milliseconds."""
    several = [*seconds] * 2 if len(seconds) == 1 else seconds  # one round is enough to see that a benchmark runs
    low, middle, high = (
        f"{1e3 * each:.0f}" if each > 0.1 else f"{1e3 * each:.3g}" for each in statistics.quantiles(several)
    )
    return f"{middle} ({low} to {high})"


def geometric_mean(values: Sequence[float]) -> float:
    """The mean that suits ratios."""
    return statistics.geometric_mean(values)


def machine() -> str:
    """Processor, threads and versions, for the line above each table."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    packages = []
    for name in ("torch", "bitsandbytes", "peft", "torchao"):
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            packages.append(f"no {name}")
    processor = names[0] if names else platform.processor() or platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {capability}; {', '.join(packages)}"
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows))


def publish(name: str, result: dict[str, Any], markdown: str, write: bool) -> None:
    """Print; with `write`, also keep the JSON and put the text between the page's marks for this benchmark."""
    threads = f" --threads {torch.get_num_threads()}"
    text = f"`python -m benchmarks.{name}{threads}` on {machine()}\n\n{markdown}"
    print(text, flush=True)
    if not write:
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine(), **result}, indent=1))
    replace_block(name, text)


def replace_block(name: str, text: str) -> None:
    """Replace the text between the marks of that name in docs/benchmarks.md."""
    begin = f"<!-- {name} -->"
    end = f"<!-- /{name} -->"
    page = PAGE.read_text(encoding="utf-8")
    if begin not in page:
        raise ValueError(f"{PAGE} has no mark {begin}, so there is no place for this table.")
    before, after = page[: page.index(begin)], page[page.index(end) + len(end) :]
    PAGE.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
