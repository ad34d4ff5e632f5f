"""The results as Markdown: the goals with the measured values, and a table for each cell."""

import statistics
from collections.abc import Callable, Sequence

from benchmarks import peers
from benchmarks.gpu_cells import CELLS, Row
from benchmarks.gpu_cells.results import Record, newest
from benchmarks.measure import replace_block, table

NOT_YET = "not measured yet"
GB = 1e9
GIB = 2**30
Rows = dict[str, list[Row]]  # cell -> its rows


def write_page(records: Sequence[Record]) -> None:
    """Update the generated block of docs/benchmarks.md."""
    replace_block("gpu_day", page(records))


def page(records: Sequence[Record]) -> str:
    """The whole generated block."""
    latest = newest(records)
    rows: Rows = {name: record["rows"] for name, record in latest.items()}
    parts = ["`python -m benchmarks.gpu_day`" + _where(latest), goals_text(records)]
    for cell in CELLS:
        make = TABLES.get(cell.name)
        if make and rows.get(cell.name):
            parts.append(f"### {cell.about[0].upper()}{cell.about[1:]}\n\n{make(rows[cell.name])}")
    failed = [f"`{name}`: {record['reason']}" for name, record in latest.items() if record["status"] != "ok"]
    if failed:
        parts.append("Cells that failed: " + "; ".join(failed) + ".")
    return "\n\n".join(parts)


def _where(found: dict[str, Record]) -> str:
    if not found:
        return " has not run on a GPU yet."
    cards = ", ".join(sorted({record["card"] for record in found.values()}))
    commits = ", ".join(sorted({record["commit"] for record in found.values()}))
    versions = [row["versions"] for row in found.get("card", {}).get("rows", []) if "versions" in row]
    packages = ", ".join(f"{name} {number}" for name, number in (versions[-1] if versions else {}).items())
    return f" on {cards}; {packages or 'versions unknown'}; commit {commits}."


def goals_text(records: Sequence[Record]) -> str:
    """A table of the goals and of the measured values."""
    rows: Rows = {name: record["rows"] for name, record in newest(records).items()}
    lines = []
    for name, wanted, measure, met in GOALS:
        value = measure(rows)
        shown = NOT_YET if value is None else f"{value:.2f}{'' if met(value) else ' (missed)'}"
        lines.append([name, wanted, shown])
    return table(["goal", "wanted", "measured"], lines)


def _seconds(rows: Rows, cell: str, variant: str, tokens: int) -> float | None:
    seconds = [
        row["seconds"] for row in rows.get(cell, []) if row["variant"] == variant and row.get("tokens") == tokens
    ]
    return seconds[-1] if seconds else None


def _ratio(cell: str, above: str, below: str, tokens: int) -> Callable[[Rows], float | None]:
    def ratio(rows: Rows) -> float | None:
        over, under = (_seconds(rows, cell, name, tokens) for name in (above, below))
        return None if over is None or under is None else over / under

    return ratio


def _largest_gb(rows: Rows) -> float | None:
    peaks = [row["device_bytes"] for row in rows.get("largest", []) if "device_bytes" in row]
    return max(peaks) / GB if peaks else None


def _share_of_copy(rows: Rows) -> float | None:
    shares = [row["share_of_copy"] for row in rows.get("decode", []) if row.get("shape") == "8B gate, up"]
    return shares[-1] if shares else None


# Description, wanted value, how to compute the value, whether a value meets the goal.
GOALS: tuple[tuple[str, str, Callable[[Rows], float | None], Callable[[float], bool]], ...] = (
    (
        "training step of an 8B-shaped Llama, 4096 tokens: our time / time of PEFT on a bf16 base",
        "1.05 at most",
        _ratio("step", peers.OURS, peers.DENSE, 4096),
        lambda value: value <= 1.05,
    ),
    (
        "training step of an 8B-shaped Llama, 512 tokens: our time / time of PEFT on a bf16 base",
        "1.15 at most",
        _ratio("step", peers.OURS, peers.DENSE, 512),
        lambda value: value <= 1.15,
    ),
    (
        "training step of an 8B-shaped Llama, 4096 tokens: time of PEFT + bitsandbytes / our time",
        "1.3 at least",
        _ratio("step_4bit", peers.BNB, peers.OURS, 4096),
        lambda value: value >= 1.3,
    ),
    (
        "training step of a 65B-shaped Llama, 1 x 512 tokens: peak of the device memory in use, GB",
        "under 48",
        _largest_gb,
        lambda value: value < 48,
    ),
    (
        "decoding a 14336 x 4096 weight to bf16: share of the copy bandwidth",
        "0.85 at least",
        _share_of_copy,
        lambda value: value >= 0.85,
    ),
)


def _card(rows: list[Row]) -> str:
    figures = {key: value for row in rows for key, value in row.items()}
    return (
        f"Copy: {figures.get('copy_gb_per_second', 0):.0f} GB/s read and written; "
        f"8192 x 8192 x 8192 in bf16: {figures.get('bf16_tflop_per_second', 0):.0f} TFLOP/s."
    )


def _check(rows: list[Row]) -> str:
    took = ", ".join(f"{row['check']} {row['seconds']:.1f} s" for row in rows if "check" in row)
    return "\n".join([f"{took}.", *(f"- plain torch: `{row['failure']}`" for row in rows if "failure" in row)])


def _tests(rows: list[Row]) -> str:
    counts = [row["tests"] for row in rows if "tests" in row]
    passed = ", ".join(f"{number} {name}" for name, number in counts[-1].items()) if counts else "not run to the end"
    return "\n".join(
        [f"{passed}.", *(f"- failed: `{row['failure'].split(': ')[0]}`" for row in rows if "failure" in row)]
    )


def _decode(rows: list[Row]) -> str:
    names = ["copy", "ours", "bitsandbytes"]
    lines = [
        [row["shape"], *(_figure(row["gb_per_second"].get(name)) for name in names), f"{row['share_of_copy']:.2f}"]
        for row in rows
        if "shape" in row
    ]
    text = table(["shape", *(f"{name}, GB/s" for name in names), "ours / copy"], lines)
    for row in rows:
        for name, value in row.get("quantize_8b_seconds", {}).items():
            text += f"\n\nQuantizing the linear layers of an 8B model, {name}: {value:.2f} s."
    return text


def _layer(rows: list[Row]) -> str:
    names = [peers.OURS, peers.DENSE, peers.BNB]
    lines = [
        [row["shape"], str(row["rows"]), row["pass"]]
        + [f"{_figure(row['device_us'].get(name))} ({_figure(row['call_us'].get(name))})" for name in names]
        for row in rows
        if "shape" in row
    ]
    return "Microseconds on the device (of a call):\n\n" + table(["shape", "rows", "pass", *names], lines)


def _step(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        if "skipped" in row:
            lines.append([row["variant"], row["skipped"].splitlines()[0], "", "", "", ""])
            continue
        ours = statistics.median(
            each["seconds"] for each in rows if each["variant"] == peers.OURS and each.get("tokens") == row["tokens"]
        )
        lines.append(
            [
                row["variant"],
                str(row["tokens"]),
                f"{1e3 * row['seconds']:.0f} ({1e3 * row['fastest']:.0f} to {1e3 * row['slowest']:.0f})",
                f"{ours / row['seconds']:.2f}",
                f"{row['peak_allocated_bytes'] / GB:.1f}",
                f"{row['loss']:.3f}",
            ]
        )
    return table(["variant", "tokens", "step, ms (range)", "ours / this", "peak, GB allocated", "loss"], lines)


def _largest(rows: list[Row]) -> str:
    lines = [
        [row["steps"], f"{row['seconds']:.2f}"]
        + [_both_units(row[key]) for key in ("allocated_bytes", "reserved_bytes", "device_bytes")]
        + [f"{row['paged_bytes'] / GB:.2f} ({row['paged']})"]
        for row in rows
        if "steps" in row
    ]
    heads = ["", "seconds", "allocated, GB (GiB)", "reserved", "in use on the device", "optimizer state paged, GB"]
    return table(heads, lines)


def _growing(rows: list[Row]) -> str:
    lines = [
        [
            str(row["gradient_checkpointing"]),
            str(row["tokens"]),
            row.get("failure") or f"{row['seconds']:.2f}",
            _both_units(row["allocated_bytes"]),
            "-" if row["kept_blocks"] is None else str(row["kept_blocks"]),
        ]
        for row in rows
    ]
    heads = ["gradient_checkpointing", "tokens", "seconds", "allocated, GB (GiB)", "blocks that keep activations"]
    return table(heads, lines)


def _paging(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        if "state" in row:
            lines.append(
                [f"step, state {row['state']}", f"{row['step_ms']:.1f} ms, the first {row['first_step_ms']:.1f} ms"]
            )
        elif "prefetch" in row:
            lines.append([f"prefetch, {row['prefetch']}", f"{row['milliseconds']:.2f} ms"])
        elif "pinned_copy" in row:
            lines.append([f"pinned copy {row['pinned_copy']}", f"{row['gb_per_second']:.1f} GB/s"])
    return table(["", "measured"], lines)


def _launches(rows: list[Row]) -> str:
    names = ["forward_kernels", "backward_kernels", "forward_host_us", "both_host_us", "both_device_us", "call_us"]
    lines = [
        [row["part"], row["variant"], str(row["dropout"]), *(_figure(row.get(name)) for name in names)]
        for row in rows
        if "skipped" not in row
    ]
    return table(["part", "variant", "dropout", *(name.replace("_", " ") for name in names)], lines)


def _sanitizer(rows: list[Row]) -> str:
    return "; ".join(str(row.get("skipped") or row.get("summary")) for row in rows) + "."


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "check": _check,
    "card": _card,
    "tests_training": _tests,
    "tests_kernels": _tests,
    "tests_optim": _tests,
    "decode": _decode,
    "layer": _layer,
    "step": _step,
    "step_4bit": _step,
    "largest": _largest,
    "growing": _growing,
    "paging": _paging,
    "launches": _launches,
    "sanitizer": _sanitizer,
}


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _both_units(nbytes: int) -> str:
    return f"{nbytes / GB:.1f} ({nbytes / GIB:.1f})"
