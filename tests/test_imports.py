"""What importing the package costs, and that its files depend on each other in one direction."""

import ast
import inspect
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import lightning_qlora

PACKAGE = Path(lightning_qlora.__file__).parent

# From the bottom up; a file imports only from entries before its own (and, in a folder, from its own folder).
ORDER = [
    "checks",
    "texts",
    "lightning_copies",
    "upstream_names",
    "upstream_changes",
    "config",
    "arguments",
    "files",
    "quantization",
    "kernels",
    "tensors",
    "starts",
    "layers",
    "dtypes",
    "activations",
    "experts",
    "survey",
    "selection",
    "logits",
    "optim",
    "adapters",
    "checkpoints",
    "huggingface",
    "calibration",
    "runs",
    "conversion",
    "plugin",
    "tools",
    "__init__",
]


def folder_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_files_import_only_from_folders_before_theirs():
    for path in sorted(PACKAGE.rglob("*.py")):
        here = folder_of(path)
        assert here in ORDER, f"{here}: give it a place in ORDER"
        for node in ast.walk(ast.parse(path.read_bytes())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lightning_qlora"):
                parts = node.module.split(".")
                names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [a.name.split(".")[1] for a in node.names if a.name.startswith("lightning_qlora.")]
            for name in names:
                assert name == here or ORDER.index(name) < ORDER.index(here), f"{path}: imports {name}"


def test_no_two_files_import_each_other():
    """Over the whole package, so that it can be read from the bottom up, file by file."""
    names = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    imports: dict[str, set[str]] = {}
    for name, path in names.items():
        froms = [n for n in ast.walk(ast.parse(path.read_bytes())) if isinstance(n, ast.ImportFrom) and n.module]
        needed = {node.module for node in froms if not any(f"{node.module}.{a.name}" in names for a in node.names)}
        needed |= {f"{node.module}.{alias.name}" for node in froms for alias in node.names}
        imports[name] = (needed & names.keys()) - {name}
    TopologicalSorter(imports).prepare()  # raises CycleError


def test_importing_the_package_is_cheap_and_loads_no_heavy_library():
    """Lightning itself (through torchmetrics) imports transformers where it is there: what we add counts.

    The package is two of its files. The pager, which is imported for every optimizer, finds the drivers when it needs
    them.
    """
    script = """
import json, sys
import lightning, lightning.pytorch
before = set(sys.modules)
import lightning_qlora
first = sorted(set(sys.modules) - before)
import lightning_qlora.optim.pager
added = {name.split(".")[0] for name in set(sys.modules) - before}
heavy = sorted(added & {"triton", "transformers", "peft", "bitsandbytes", "cuda", "rich", "numba", "matplotlib",
    "pytorch_lightning", "lightning_fabric"})
print(json.dumps([first, heavy]))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == [["lightning_qlora", "lightning_qlora.lightning_copies"], []]


def test_every_public_name_is_documented_and_importable():
    for name in lightning_qlora.__all__:
        value = getattr(lightning_qlora, name)
        assert value.__doc__, name
        for member in vars(value) if isinstance(value, type) else ():
            if not member.startswith("_") and (
                callable(getattr(value, member)) or isinstance(vars(value)[member], property)
            ):
                assert inspect.getdoc(getattr(value, member)), (name, member)
