"""Hooks of mkdocs, named in mkdocs.yml."""

import re
from typing import Any

import lightning_qlora

MEMBERS = {  # class -> the members that are shown; of others, all public ones
    "QLoRAPrecision": ["init", "convert_module", "clip_gradients"],
    "ConversionReport": [],
    "PackedWeight": ["nbytes", "dequantize", "bnb_state_dict", "from_bnb_state_dict", "to"],
    "QLoRAConfig": [],
    "QLoRALinear": ["weight", "packed_weight", "decode"],
    "PagedOptimizer": ["report"],
    "PagedAdamW": [],
    "PagedAdamW8bit": [],
}


def on_config(config: Any) -> None:
    """Show the version in the title of the site."""
    config.site_name += f" {lightning_qlora.__version__}"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Add the docstrings of all public names to api.md, in the order of its table. On GitHub they would be `:::`."""
    if page.file.src_uri != "api.md":
        return markdown
    first_cells = re.findall(r"^\| (`[A-Za-z].*?) \|", markdown.partition("## Public names")[2], re.M)
    names = re.findall(r"`(\w+)`", "".join(first_cells))
    if sorted(names) != sorted(lightning_qlora.__all__):
        raise ValueError(f"docs/api.md: the table of public names has {names}, the package {lightning_qlora.__all__}.")
    return markdown + "\n\n## Docstrings\n\n" + "\n\n".join(map(directive, names))


def on_post_page(output: str, **_: Any) -> str:
    """Let a name in a table break after an underscore, so that the table is as wide as a telephone."""

    def breakable(cell: re.Match[str]) -> str:
        return re.sub(r"<code>[^<]*</code>", lambda code: code[0].replace("_", "_<wbr>"), cell[0])

    return re.sub(r"<td.*?</td>", breakable, output, flags=re.DOTALL)


def directive(name: str) -> str:
    """The lines for mkdocstrings."""
    options = "\n    options:\n      heading_level: 3"
    if name in MEMBERS:
        options += f"\n      members: {MEMBERS[name]}\n      inherited_members: true"
    return f"::: lightning_qlora.{name}{options}"
