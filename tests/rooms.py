"""Print every file of the package in the order of the import rule with its first sentence, the marks and the changes.

python -m tests.rooms            files: their sizes in characters, and what they say of themselves
python -m tests.rooms marks      attributes that the package sets on objects of other people, and where
python -m tests.rooms changes    functions and objects of other packages that it changes, and why
"""

import ast
import re
import sys
from collections import defaultdict
from pathlib import Path

import lightning_qlora
from tests.test_imports import ORDER, folder_of

PACKAGE = Path(lightning_qlora.__file__).parent


def sources() -> list[Path]:
    every = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".c", ".h", ".json")]
    return sorted(every, key=lambda path: (ORDER.index(folder_of(path)), path))


def sentence(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    else:
        text = text.removeprefix("/*").removeprefix("//").strip() if path.suffix != ".json" else ""
    return " ".join(text.split("\n\n")[0].split())


def files() -> None:
    for path in sources():
        size = len(path.read_text(encoding="utf-8"))
        if size:
            print(f"{path.relative_to(PACKAGE).as_posix():44} {size:7,}  {sentence(path)}")


def marks() -> None:
    found = defaultdict(list)
    for path in sources():
        for name in sorted(set(re.findall(r"(?<!\w)_qlora_[a-z]+", path.read_text(encoding="utf-8")))):
            found[name].append(path.relative_to(PACKAGE).as_posix())
    for name, paths in sorted(found.items()):
        print(f"{name:24} {', '.join(paths)}")


def changes() -> None:
    for path in sources():
        if path.name == "patches.py":
            for node in ast.parse(path.read_bytes()).body:
                if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                    print(f"{path.relative_to(PACKAGE).as_posix()}: {node.name}\n    {ast.get_docstring(node)}\n")


if __name__ == "__main__":
    {"files": files, "marks": marks, "changes": changes}[(sys.argv[1:] or ["files"])[0]]()
