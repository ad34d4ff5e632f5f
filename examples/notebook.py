"""Write quickstart.ipynb, the notebook for Colab and Kaggle, from the cells in notebook_cells.py.

python examples/notebook.py
"""

import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CELL = re.compile(r"^# %%(.*)$", re.M)  # the percent format of Jupytext, VS Code and PyCharm
MAGIC = re.compile(r"^# ([%!])", re.M)


def cells(text: str) -> list[dict[str, Any]]:
    """The cells of a script in the percent format, in that of nbformat 4.5; `# %pip` and `# !command` are commands."""
    _, *parts = CELL.split(text)
    result: list[dict[str, Any]] = []
    for number, (title, body) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        title = title.strip()
        cell: dict[str, Any] = {"cell_type": "code", "id": f"cell-{number}", "metadata": {}}
        if title == "[markdown]":
            cell["cell_type"] = "markdown"
            source = re.sub(r"^# ?", "", body.strip(), flags=re.M)
        else:
            cell |= {"execution_count": None, "outputs": []}
            heading = f"# {title}\n" if title else ""
            source = heading + MAGIC.sub(r"\1", body.strip())
        result.append({**cell, "source": source.splitlines(keepends=True)})
    return result


def notebook() -> str:
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {
        "cells": cells((HERE / "notebook_cells.py").read_text(encoding="utf-8")),
        "metadata": {"accelerator": "GPU", "kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    (HERE / "quickstart.ipynb").write_text(notebook(), encoding="utf-8")
