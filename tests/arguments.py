"""The table of arguments in docs/api.md, from `QLoRAConfig`: `python -m tests.arguments` writes it."""

import dataclasses
import re
from pathlib import Path

from docstring_parser import parse

from lightning_qlora.config import QLoRAConfig

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
TABLE = re.compile(r"(?<=\| argument \| default \| what it does \|\n\| --- \| --- \| --- \|\n)(\|.*\n)+")


def described() -> dict[str, str]:
    """Argument -> its description in the docstring of QLoRAConfig, on one line."""
    return {param.arg_name: " ".join(param.description.split()) for param in parse(QLoRAConfig.__doc__).params}


def page() -> str:
    """The content of the page."""
    defaults = {field.name: repr(field.default) for field in dataclasses.fields(QLoRAConfig)}
    rows = [f"| `{name}` | `{defaults[name]}` | {text} |\n" for name, text in described().items()]
    return TABLE.sub(lambda _: "".join(rows), PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
