"""The table of arguments in docs/api.md, from `QLoRAConfig`: `python -m tests.arguments` writes it."""

import dataclasses
import re
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from docstring_parser import parse

from lightning_qlora.config import QLoRAConfig

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
TABLE = re.compile(r"(?<=\| argument \| type \| default \| what it does \|\n\| --- \| --- \| --- \| --- \|\n)(\|.*\n)+")


def described() -> dict[str, str]:
    """Argument -> its description in the docstring of QLoRAConfig, on one line."""
    return {param.arg_name: " ".join(param.description.split()) for param in parse(QLoRAConfig.__doc__).params}


def shown(kind: Any) -> str:
    """A type, or the values of a Literal, as the cell of a table."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(dict.fromkeys(shown(part) for part in get_args(kind)))
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value!r}`" for value in get_args(kind))
    if get_args(kind):
        return f"`{kind}`"  # list[str]
    return f"`{'None' if kind is type(None) else kind.__name__}`"


def page() -> str:
    """The content of the page."""
    fields = {field.name: field for field in dataclasses.fields(QLoRAConfig)}
    types = {name: shown(kind) for name, kind in get_type_hints(QLoRAConfig).items()}
    rows = [
        f"| `{name}` | {types[name]} | `{fields[name].default!r}` | {text} |\n" for name, text in described().items()
    ]
    return TABLE.sub(lambda _: "".join(rows), PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
