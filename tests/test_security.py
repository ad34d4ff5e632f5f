"""SECURITY.md lists each place of the package where code could run."""

import ast
import re
from pathlib import Path

import pytest

import lightning_qlora

PACKAGE = Path(lightning_qlora.__file__).parent
PAGE = (PACKAGE.parent / "SECURITY.md").read_text(encoding="utf-8")
# Modules that read objects, run programs or load libraries.
MODULES = {
    *("pickle", "_pickle", "marshal", "shelve", "copyreg", "dill", "cloudpickle", "joblib", "yaml", "runpy", "code"),
    *("subprocess", "pty", "multiprocessing", "ctypes", "cffi", "zipfile", "tarfile", "socket", "urllib", "requests"),
    *("http", "imp", "cpp_extension"),
}
FUNCTIONS = {
    *("torch.load", "torch.jit.load", "torch.ops.load_library", "torch.classes.load_library", "torch.hub"),
    *("os.system", "os.popen", "os.startfile", "os.posix_spawn", "os.exec", "os.spawn"),
    *("shutil.unpack_archive", "numpy.load", "cloud_io._load", "pl_load"),
    *("eval", "exec", "compile", "__import__", "trust_remote_code"),
}
NAMES_OF_MODULES = {"KERNELS"}  # constants


def places(tree):
    """The modules and functions of both lists that a file uses."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split(".") if part in MODULES)
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")
            yield from MODULES & {module[0]}
            yield from (alias.name for alias in node.names if alias.name in MODULES)
            yield from (
                f"{module[-1]}.{alias.name}" for alias in node.names if f"{module[-1]}.{alias.name}" in FUNCTIONS
            )
        elif isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            yield from (
                each for each in FUNCTIONS if text == each or (each.startswith("os.") and text.startswith(each))
            )
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS:
            yield node.func.id
        elif isinstance(node, (ast.arg, ast.keyword)) and node.arg in FUNCTIONS:
            yield node.arg
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and ":pl_load" in node.value:
            yield "pl_load"
        elif isinstance(node, ast.Constant) and node.value in ("trust_remote_code", *MODULES - {"code"}):
            yield node.value


def found():
    files = {path: ast.parse(path.read_bytes()) for path in sorted(PACKAGE.rglob("*.py"))}
    return {(str(path.relative_to(PACKAGE)), place) for path, tree in files.items() for place in places(tree)}


def test_the_table_has_each_place_where_code_could_run():
    rows = re.findall(r"^\| `([\w/]+\.py)` \| `([\w.]+)` \| \S", PAGE, re.M)
    assert len(rows) == len(set(rows))
    assert set(rows) == found()


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from pickle import loads", "import torch.utils.cpp_extension", "x = torch.load(f)",
        "os.system(x)", "os.execv(a, b)", "eval(x)", "f(trust_remote_code=None)", "a = {'trust_remote_code': True}",
        "def f(trust_remote_code): 1", "from torch.utils import cpp_extension", "import multiprocessing.pool",
        "import_module('pickle')", "__import__(x)", "torch.hub.load(x)", "from ctypes import CDLL",
        "from lightning.fabric.utilities.cloud_io import _load",
    ],
)  # fmt: skip
def test_a_new_place_is_found(code):
    assert list(places(ast.parse(code)))


def test_modules_are_imported_by_names_that_the_package_has():
    """No file decides which module is imported."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                (name,) = node.args
                inside = path.name == "__init__.py" or (path.name == "verdict.py" and ast.unparse(name) == "name")
                assert isinstance(name, ast.Constant) or ast.unparse(name) in NAMES_OF_MODULES or inside, path


def test_workflows_name_actions_by_the_hash_of_a_commit():
    """A tag can be moved to another commit."""
    files = [*(PACKAGE.parent / ".github/workflows").glob("*.yml")]
    yaml = pytest.importorskip("yaml")
    if not files:
        pytest.skip("a source distribution has none")
    jobs = [job for path in files for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values()]
    names = [step["uses"] for job in jobs for step in job["steps"] if "uses" in step]
    assert len(names) >= 6
    assert [name for name in names if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", name)] == []
