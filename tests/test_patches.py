"""Objects of other libraries are changed in files named patches.py only, and each change there says why."""

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.wrappers import _FabricOptimizer
from lightning.pytorch.trainer import call

import lightning_qlora
from lightning_qlora.layers.changes import make_changes
from tests.foreign_changes import Package, changes_in, changes_of

PACKAGE = Path(lightning_qlora.__file__).parent
PATCHES = sorted(PACKAGE.rglob("patches.py"))

# What is no change of other people's code, though the text alone can't show it.
ALLOWED = {
    # The mechanism: it puts what the files named patches.py register in its place.
    "layers/changes.py": {"setattr(owner, name, wrapper)"},
    # Conversion: the user's linear layer becomes a QLoRALinear in place, or a bitsandbytes layer a dense one.
    "layers/qlora_linear.py": {
        "layer._parameters.pop('weight')", "layer._parameters.pop('weight', None)",
        "layer.in_features", "layer.out_features",
    },
    "layers/kinds.py": {
        "layer._parameters.pop('weight')", "vars(layer).pop(name, None)", "layer.__class__", "layer.weight",
        "setattr(layer, name, size)",
    },
    # A class of ours inherits from the same class in another package too.
    "lightning_copies.py": {"kind.__bases__"},
    # A class that is derived from that of the user's module, and back.
    "layers/derived.py": {"instance.__class__"},
    "training/load_from_checkpoint.py": {"module.__class__"},  # an object of a class that it derived
    "layers/readable_weight.py": {"weight._is_param"},  # a tensor that it made
    # Conversion of a module whose parameters train in full, or are held in fp32; the gradient of one is cast with it.
    "layers/full_precision.py": {"vars(part)['types_before']"},
    "layers/held_types.py": {"tensor.grad"},
    "layers/experts.py": {"owner._parameters[key]", "owner._modules[stack_name(key)]"},
    # The mark that transformers set on a parameter, on the one that a merge puts in its place.
    "layers/provenance.py": {"setattr(parameter, LOADED_TENSOR, True)"},
    "huggingface/operations.py": {"owner._parameters[inner]"},  # as it was, after an error
    "huggingface/quantizer.py": {"copied.operations", "copied.quantization_operation"},  # a copy that it made
    "huggingface/without_data.py": {  # what transformers' loading does
        "part._parameters[key]", "setattr(tensor, LOADED_TENSOR, True)",
    },
    # The decorator of our own command gives it the arguments of QLoRAConfig.
    "tools/cli.py": {"command.__signature__", "command.__annotations__", "command.__doc__"},
    # ctypes: types of functions in our own compiled library.
    "kernels/cpu/library.py": {"function.argtypes", "function.restype", "loaded.form.restype"},
    # A struct and a finalizer that the statement itself, or the one before, makes.
    "optim/host_memory.py": {"location.type", "location.id"},
    "optim/pool.py": {"weakref.finalize(self, pool._free, self.address).atexit"},
    # The public attribute of an optimizer, as torch's load_state_dict sets it; `close` puts plain dicts back.
    "optim/optimizer_pages.py": {"optimizer.state"},
    # Of our adapters: their gradients belong to the values before the calibration.
    "training/calibration.py": {"parameter.grad"},
}  # fmt: skip


def is_listed(text, entries):
    return any(text == entry or (entry.endswith("(") and text.startswith(entry)) for entry in entries)


def test_foreign_objects_are_changed_in_patches_only():
    for file, changes in changes_of(PACKAGE).items():
        if file.rpartition("/")[2] == "patches.py":
            continue
        for line, text in changes:
            listed = is_listed(text, ALLOWED.get(file, ()))
            assert listed, f"{file}:{line}: {text}: change it in a function of patches.py, or annotate a value of ours"


def test_every_allowed_change_is_made():
    every = changes_of(PACKAGE)
    for file, entries in ALLOWED.items():
        for entry in entries:
            assert any(is_listed(text, {entry}) for _, text in every[file]), f"{file}: {entry} is allowed in vain"


def patches_in(file):
    """Name -> function of each patch in a file."""
    functions = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
    return {f.name: f for f in functions if not f.name.startswith("_")}


@pytest.mark.parametrize("file", PATCHES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_every_patch_names_its_upstream_file_and_what_would_remove_it(file):
    for name, function in patches_in(file).items():
        text = ast.get_docstring(function)
        assert "Upstream:" in text, name
        assert ".py" in text, name
        assert "Removed by:" in text, name


def test_the_page_of_patches_lists_each_one_once():
    page = (PACKAGE.parent / "docs" / "patches.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \|", page, re.M)
    assert sorted(listed) == sorted(name for file in PATCHES for name in patches_in(file))


def test_a_function_is_wrapped_once_however_often_the_patch_is_applied():
    make_changes("lightning")
    before = call._call_configure_model
    make_changes("lightning")
    assert call._call_configure_model is before


def test_fabric_wraps_optimizers_of_strategies_without_precision():
    """As Lightning's own tests do (tests_fabric/test_wrappers.py); there is no plugin in this run."""
    make_changes("lightning")
    strategy = SimpleNamespace(optimizer_step=lambda optimizer: "stepped")
    assert _FabricOptimizer(torch.optim.SGD(torch.nn.Linear(2, 2).parameters()), strategy).step() == "stepped"


# ---------------------------------------------------------------- the checker itself

OURS = """
class Own:
    layer: "Own"
    other: Foreign
    def __init__(self, model):
        self.count = 0
        self.made = {name: own for name, own in owns(model).items()}
        self.model = model

def owns(model) -> dict[str, "Own"]: ...

MARKED = "_qlora_mark"
PLAIN = "mark"
"""


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.compile = f",
        "from lightning.pytorch import Trainer\nTrainer._run = f",
        "def f(block): block.forward = g",
        "def f(block): block.calls += 1",
        "def f(block): block.forward: object = g",
        "def f(block): del block.forward",
        "def f(a, b): (a.forward, (x, *b.rest)) = g",
        "def f(block):\n for block.forward in g: pass",
        "def f(block):\n with g as block.forward: pass",
        "def f(model): model.config.use_cache = False",
        "def f(trainer): trainer.strategy._lightning_module = None",
        "def f(trainer): trainer.loggers = []",
        "def f(part): setattr(part, 'log', g)",
        "def f(part): setattr(part, PLAIN, g)",
        "def f(part, name): delattr(part, name)",
        "def f(part): object.__setattr__(part, 'log', g)",
        "def f(part): part.__setattr__('log', g)",
        "def f(part): vars(part)['log'] = g",
        "def f(part): vars(part).pop('log', None)",
        "def f(part): part.__dict__.update(log=g)",
        "def f(part):\n held = vars(part)\n held['log'] = g",
        "def f(part):\n for held in [getattr(m, '__dict__', {}) for m in part]:\n  held['log'] = g",
        "def f(layer): layer._parameters['weight'] = g",
        "import sys\nsys.modules['torch'] = g",
        "import logging\ndef f():\n logger = logging.getLogger('torch')\n logger.disabled = True",
        "def f(own: Own): own.other.forward = g",
        "def f(own: Own): own.model.forward = g",
        "def f(own: Own, block):\n block: Any = block or own\n block.forward = g",
        "def f(own: Own, block):\n own = block\n own.forward = g",
        "def f(model):\n for name, block in zip(owns(model), model.blocks): block.forward = g",
        "def f(block):\n block.forward = g\n assert isinstance(block, Own)",
        "def f(block):\n if isinstance(block, Own): pass\n else: block.forward = g",
        "def f(block):\n if not isinstance(block, Own): block.forward = g",
        "class Other:\n def f(self): self.model.forward = g",
        "def run(self): self.forward = g",
        "def f(block):\n def inner(): block.forward = g\n return inner",
        "f(lambda block: setattr(block, 'forward', g))",
    ],
)
def test_the_checker_finds_a_change(code):
    ours, tree = ast.parse(OURS), ast.parse(code)
    assert len(changes_in(tree, Package([ours, tree]))) >= 1


@pytest.mark.parametrize(
    "code",
    [
        "class Other:\n def f(self): self.count += 1",
        "class Other(Foreign):\n @classmethod\n def f(cls): cls.count = 1",
        "class Other:\n def f(self):\n  def inner(): self.count = 1\n  return inner",
        "def f(own: Own): own.count = 1",
        "def f(own: 'Own | None'): own.count = 1",
        "def f(own: Own): own.layer.count = 1",
        "def f(own: Own): own.layer.__dict__['count'] = 1",
        "def f(model):\n for name, own in owns(model).items(): own.count = 1",
        "def f(model):\n for name, own in owns(model).items() if model else (): own.count = 1",
        "def f(model):\n own: Any = owns(model)[0]\n own.count = 1",
        "def f(ctx, x): ctx.shape = x.shape",
        "def f(model):\n for own, block in zip(owns(model).values(), model): own.count = 1",
        "class Other:\n def f(self):\n  for own in self.made.values(): own.count = 1",
        "def f(model):\n own = next(iter(owns(model).values()), None)\n own.count = 1",
        "def f(model):\n for own in [o for o in model if isinstance(o, Own)]: own.count = 1",
        "def f(block):\n assert isinstance(block, Own)\n block.count = 1",
        "def f(block):\n if isinstance(block, Own) and block.count: block.count = 1",
        "def f(block):\n if not isinstance(block, Own):\n  return\n block.count = 1",
        "def f():\n table = Table()\n table.title = 'x'",
        "def f():\n def g(): ...\n g.mark = True",
        "def f(block): block._qlora_mark = 1",
        "def f(block): setattr(block, MARKED, 1)",
        "def f(block): vars(block).pop('_qlora_mark', None)",
        "def f(tensor): tensor.data = g",
        "def f(part): part.training = False",
        "def f(options): options['a'] = 1",
        "def f(part): x = part.forward",
    ],
)
def test_the_checker_accepts_what_changes_nothing_foreign(code):
    ours, tree = ast.parse(OURS), ast.parse(code)
    assert changes_in(tree, Package([ours, tree])) == []
