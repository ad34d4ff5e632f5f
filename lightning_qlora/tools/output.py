"""What the commands print."""

import json
import shutil
import sys
import textwrap
from typing import Any, TextIO

from lightning_qlora.texts import printable

WRAPPED: Any = {"subsequent_indent": 31 * " ", "break_long_words": False, "break_on_hyphens": False}


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line that may have texts of a file in it."""
    print(printable(text), file=stream, flush=True)


def show(lines: list[tuple[str, str]]) -> None:
    width = shutil.get_terminal_size().columns
    for name, value in lines:
        text = printable(f"{name:30} {value}")
        if sys.stdout.isatty() and len(text) > width > 60:  # a file or a pipe gets whole lines
            text = textwrap.fill(text, width, **WRAPPED)
        print(text)


def print_json(values: Any) -> None:
    print(json.dumps(values, indent=2, default=str))
