"""The parts of which drawings are made: text, boxes, arrows, bars, and the tables of the pages that have the figures.

Drawings are 480 units wide, so that text of 13 units is readable on a telephone. They have no ground, and colors that
are readable on light and on dark pages.
"""

import re
from pathlib import Path

WIDTH = 480
INK, DARK, LINE = "#767b82", "#1f2937", "#9ca3af"  # on the page; on a box
BLUE, ORANGE, GREEN, PLAIN = "#dbeafe", "#ffedd5", "#dcfce7", "#f3f4f6"  # frozen, trained, memory that moves, the rest
OURS, THEIRS = "#8b5cf6", "#9ca3af"  # bars of this package and of others
CURVES = ("#9ca3af", "#3b82f6", "#f97316", "#22c55e", "#ec4899")


def text(x: float, y: float, words: str, size: int = 13, color: str = INK, anchor: str = "middle") -> str:
    """One line of text."""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}" text-anchor="{anchor}">{words}</text>'


def upright(x: float, y: float, words: str, size: int = 13) -> str:
    """The name of a vertical axis, read from below."""
    return f'<g transform="rotate(-90 {x:g} {y:g})">{text(x, y, words, size)}</g>'


def box(x: float, y: float, width: float, color: str, *lines: str, height: float = 0, dashed: bool = False) -> str:
    """A box with centred lines of text."""
    height = height or 16 * len(lines) + 14
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    middle = y + height / 2 - 8 * len(lines) + 12
    shape = (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{color}" stroke="{LINE}"{dash}/>'
    )
    return shape + "".join(text(x + width / 2, middle + 16 * i, line, color=DARK) for i, line in enumerate(lines))


def arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    """A straight arrow."""
    ends = f'x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}"'
    return f'<line {ends} stroke="{INK}" stroke-width="1.5" marker-end="url(#a)"/>'


def svg(height: int, *parts: str, label: str) -> str:
    """The document around the parts."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">'
    marker = (
        '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker></defs>'
    )
    body = "\n".join((head, "<g font-family='system-ui, sans-serif'>", marker, *parts, "</g>", "</svg>"))
    return body + "\n"


def bar(x: float, y: float, width: float, color: str, height: float = 14) -> str:
    """A bar without text."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:.1f}" height="{height:g}" fill="{color}" stroke="{LINE}"/>'


def line(x: float, y: float, to_x: float, to_y: float, color: str = LINE, width: float = 1, dash: str = "") -> str:
    """A straight line."""
    ends = f'x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}"'
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<line {ends} stroke="{color}" stroke-width="{width:g}"{dashes}/>'


def curve(points: list[tuple[float, float]], color: str, width: float = 2) -> str:
    """A line through points."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width:g}"/>'


def table(page: str, header: str) -> list[list[str]]:
    """The cells of the rows of the table in a page whose header begins so, without marks of Markdown."""
    text = (Path(__file__).parent.parent / page).read_text(encoding="utf-8")
    found = re.search(rf"^{re.escape(header)}.*\n\|[-| ]+\|\n((?:\|.*\n)+)", text, re.M)
    assert found, f"{page} has no table that begins with {header}"
    rows = found[1].strip().splitlines()
    return [[cell.strip(" *`") for cell in row.strip("|").split("|")] for row in rows]


def number(cell: str) -> float:
    """The first number of a cell: 3.1 of "3.1 ± 0.2", 3120 of "3,120 MB"."""
    return float(re.search(r"-?[\d,.]*\d", cell)[0].replace(",", ""))  # type: ignore[index]


def spread(cell: str) -> float:
    """What stands behind ±; 0 without it."""
    return number(cell.partition("±")[2] or "0")
