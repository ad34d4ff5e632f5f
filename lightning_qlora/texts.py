"""Names as one text, and how reports and messages write names and numbers of bytes."""

import re
from collections.abc import Iterable

ROOT = "(the module itself)"


def join(*parts: str) -> str:
    """Parts of a name as one; empty ones, such as the name of the root, are left out."""
    return ".".join(part for part in parts if part)


def printable(text: str) -> str:
    """A text of a file for a terminal: on one line, with escapes for what would move the cursor or hide other text."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def group(name: str) -> str:
    """A name with * for every number between dots; layers of one group have the same."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name) or ROOT


def groups(names: Iterable[str]) -> str:
    """Names that differ by numbers alone as one."""
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(group(name), []).append(name or ROOT)
    return ", ".join(f"{key} (x{len(each)})" if len(each) > 1 else each[0] for key, each in members.items())


def size_text(count: float, base: int = 1000) -> str:
    """A number of bytes with a unit: 1.5 MB, or with base=1024 1.5 MiB."""
    units = ("bytes", "kB", "MB", "GB")
    if base == 1024:
        units = ("bytes", "KiB", "MiB", "GiB")
    power = sum(count >= base**number for number in (1, 2, 3))
    return f"{count / base**power:.4g} {units[power]}"
