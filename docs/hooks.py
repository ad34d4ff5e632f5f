"""Hooks of mkdocs, named in mkdocs.yml."""

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
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
}


def on_config(config: Any) -> None:
    """Show the version in the title of the site."""
    config.site_name += f" {lightning_qlora.__version__}"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Add the docstrings of all public names to api.md, in the order of its table. On GitHub they would be `:::`.

    And those of the changes to other packages to patches.md.
    """
    if page.file.src_uri == "patches.md":
        return markdown + "".join(changes())
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


def on_post_build(config: Any, **_: Any) -> None:
    """Add llms.txt (https://llmstxt.org), and the Markdown of the pages that it links to."""
    pages = [page for _, page in pages_of(config.nav)]
    for page in pages:
        shutil.copy(Path(config.docs_dir, page), Path(config.site_dir, page))
    text = llms_txt(config.nav, Path(config.docs_dir), config.site_url)
    Path(config.site_dir, "llms.txt").write_text(text, encoding="utf-8")


def llms_txt(nav: Any, docs: Path, site: str) -> str:
    """A link and the first sentence of each page."""
    lines = ["# lightning-qlora\n", "> QLoRA for a pretrained model in a LightningModule, in one argument.\n"]
    for title, page in pages_of(nav):
        paragraph = re.search(r"^\w.*(?:\n.+)*", (docs / page).read_text(encoding="utf-8"), re.M)
        text = re.sub(r"\]\([^)]*\)|\[", "", paragraph[0] if paragraph else title)
        sentence = " ".join(text.split()).split(". ")[0].rstrip(".:")
        lines.append(f"- [{title}]({site}{page}): {sentence}.")
    return "\n".join(lines) + "\n"


def pages_of(nav: Any) -> Iterator[tuple[str, str]]:
    """Title and file of each page of the navigation, in its order."""
    for entry in nav:
        for title, target in entry.items():
            if isinstance(target, str):
                yield title, target
            else:
                yield from pages_of(target)


def changes() -> Iterator[str]:
    """A section for each function of the files named patches.py."""
    package = Path(lightning_qlora.__file__).parent
    for file in sorted(package.rglob("patches.py")):
        for node in ast.parse(file.read_bytes()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                text = re.sub(
                    r"^(Upstream|Supported ways tried|Removed by):",
                    r"\n**\1:**",
                    ast.get_docstring(node) or "",
                    flags=re.M,
                )
                yield f"\n## {node.name}\n\n`{file.relative_to(package).as_posix()}`\n\n{text}\n"


def directive(name: str) -> str:
    """The lines for mkdocstrings."""
    options = "\n    options:\n      heading_level: 3"
    if name in MEMBERS:
        options += f"\n      members: {MEMBERS[name]}\n      inherited_members: true"
    return f"::: lightning_qlora.{name}{options}"
