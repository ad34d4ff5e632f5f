"""Hooks of mkdocs, named in mkdocs.yml."""

from typing import Any

import lightning_qlora

MEMBERS = {  # class -> the members that are shown; of others, all public ones
    "QLoRAPrecision": ["init", "convert_module", "clip_gradients"],
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
    """Add the docstrings of all public names to api.md. In the file itself they would be raw `:::` on GitHub."""
    if page.file.src_uri != "api.md":
        return markdown
    return markdown + "\n\n## Docstrings\n\n" + "\n\n".join(map(directive, sorted(lightning_qlora.__all__)))


def directive(name: str) -> str:
    """The lines for mkdocstrings."""
    options = "\n    options:\n      heading_level: 3"
    if name in MEMBERS:
        options += f"\n      members: {MEMBERS[name]}\n      inherited_members: true"
    return f"::: lightning_qlora.{name}{options}"
