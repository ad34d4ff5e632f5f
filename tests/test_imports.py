"""What importing the package costs, and that its files depend on each other in one direction."""

import ast
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import lightning_qlora

PACKAGE = Path(lightning_qlora.__file__).parent

# From the bottom up; a file imports only from entries before its own (and, in a folder, from its own folder).
ORDER = [
    "config", "quantize", "bnb_layers", "kernels", "sharded", "fingerprint", "decoded", "starts", "dora",
    "packed_linear", "adapted_linear", "linear_state", "linear", "random_state", "loraplus", "checkpointing",
    "choose", "seams", "calibration", "files", "writing", "bnb_folder", "adapters", "merging", "loaded",
    "hf_quantizer", "loading", "report", "state", "checkpoint_file", "checkpoint_adapter", "convert", "guards",
    "sharding", "early_optimizer", "checkpoint", "paging", "memory", "precision", "inspection", "doctor", "cli",
    "__init__",
]  # fmt: skip


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_files_import_only_from_the_rooms_below_them():
    for path in sorted(PACKAGE.rglob("*.py")):
        here = room(path)
        assert here in ORDER, f"{here}: give it a place in ORDER"
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lightning_qlora"):
                parts = node.module.split(".")
                names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [a.name.split(".")[1] for a in node.names if a.name.startswith("lightning_qlora.")]
            for name in names:
                assert name == here or ORDER.index(name) < ORDER.index(here), f"{path}: imports {name} from above"


def test_no_folder_has_a_circle_inside():
    for folder in {path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE}:
        name = f"lightning_qlora.{folder.relative_to(PACKAGE)}".replace("/", ".")
        imports = {}
        for path in folder.glob("*.py"):
            froms = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.module]
            imports[path.stem] = {
                needed
                for node in froms
                if node.module == name or node.module.startswith(name + ".")
                for needed in (
                    [alias.name for alias in node.names]
                    if node.module == name
                    else [node.module.removeprefix(name + ".").split(".")[0]]
                )
            } - {path.stem}
        TopologicalSorter(imports).prepare()  # raises CycleError


def test_importing_the_package_is_cheap_and_loads_no_heavy_library():
    """Lightning itself (through torchmetrics) imports transformers where it is there: what we add counts."""
    script = """
import json, sys, time
import lightning, lightning.pytorch
before = set(sys.modules)
start = time.perf_counter()
import lightning_qlora
seconds = time.perf_counter() - start
added = {name.split(".")[0] for name in set(sys.modules) - before}
heavy = sorted(added & {"triton", "transformers", "peft", "bitsandbytes", "cuda", "rich", "numba", "matplotlib"})
print(json.dumps({"seconds": seconds, "heavy": heavy}))
"""
    results = [
        json.loads(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    assert all(result["heavy"] == [] for result in results)
    assert min(result["seconds"] for result in results) < 0.3


def test_every_public_name_is_documented_and_importable():
    for name in lightning_qlora.__all__:
        assert getattr(lightning_qlora, name).__doc__, name
