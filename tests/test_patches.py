"""Objects of other libraries are changed in files named patches.py only, and each change there says why."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.wrappers import _FabricOptimizer
from lightning.pytorch.trainer import call

import lightning_qlora
from lightning_qlora.upstream_changes import make_changes, wrap_once
from tests.foreign_changes import Package, changes_in, changes_of

PACKAGE = Path(lightning_qlora.__file__).parent
PATCHES = sorted(PACKAGE.rglob("patches.py"))

# What is no change of other people's code, though the text alone can't show it.
ALLOWED = {
    # Our own names, when they are first used; decorators of our own functions.
    "__init__.py": {"globals()[name]"},
    "arguments.py": {"shown.__signature__", "shown.__doc__"},
    # The mechanism: it puts what the files named patches.py register in its place.
    "upstream_changes.py": {
        "setattr(wrapper, mark, True)",
        "setattr(owner, name, wrapper if is_function else type(descriptor)(wrapper))",
    },
    # Conversion: the user's linear layer becomes a QLoRALinear in place, or a bitsandbytes layer a dense one, and back.
    "layers/packed_layer.py": {"layer._parameters[name]", "layer.__dict__[name]"},
    "layers/qlora_linear.py": {"layer.__class__"},  # as it was, after an error
    "layers/kinds.py": {"vars(layer).pop(name, None)", "layer.__class__", "setattr(layer, name, size)"},
    "experts/experts.py": {"owner._parameters[key]", "owner._modules[stack_name(key)]"},
    # A class of ours inherits from the same class in another package too.
    "lightning_copies.py": {"kind.__bases__"},
    # A class that is derived from that of the user's module, and back; an object of such a class.
    "layers/derived.py": {"instance.__class__"},
    "conversion/load_from_checkpoint.py": {"module.__class__"},
    # Modules, tensors and functions that the code itself made.
    "layers/trainable_tokens.py": {"view.__dict__.update(self.__dict__, **changed)"},
    "layers/readable_weight.py": {"weight._is_detached", "weight._is_param"},
    "huggingface/quantizer.py": {"copied.quantization_operation"},
    # The gradient of a parameter that is held in fp32 is cast with it; that of our adapters belongs to other values.
    "tensors/held_types.py": {"tensor.grad"},
    "config.py": {"object.__setattr__(config, name, value)"},  # of a copy
    "calibration/calibration.py": {"parameter.grad"},
    "layers/lora_layer.py": {"parameter.grad"},
    # Marks that transformers sets while it loads.
    "survey/provenance.py": {"setattr(parameter, LOADED_TENSOR, True)"},
    "huggingface/operations.py": {"layer._is_hf_initialized", "owner._parameters[inner]"},  # as it was, after an error
    "huggingface/sharded/without_data.py": {
        "part._is_hf_initialized", "part._parameters[key]", "setattr(tensor, LOADED_TENSOR, True)",
    },
    # ctypes: types of functions in our own compiled library.
    "kernels/cpu/library.py": {"function.argtypes", "function.restype", "loaded.form.restype"},
    # A struct and a finalizer that the statement itself, or the one before, makes.
    "optim/host_memory.py": {"location.type", "location.id"},
    "optim/pool.py": {"weakref.finalize(self, pool._free, self.address).atexit"},
    # The public attribute of an optimizer, as torch's load_state_dict sets it; `close` puts plain dicts back.
    "optim/optimizer_pages.py": {"optimizer.state"},
}  # fmt: skip


def test_foreign_objects_are_changed_in_patches_only():
    """Another one belongs in a function of patches.py, or, if the object is ours, here with its reason."""
    changes = {file: {text for _, text in found} for file, found in changes_of(PACKAGE).items()}
    assert {file: texts for file, texts in changes.items() if texts and not file.endswith("patches.py")} == ALLOWED


def patches_in(file):
    """Name -> function of each patch in a file."""
    functions = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)]
    return {f.name: f for f in functions if not f.name.startswith("_")}


@pytest.mark.parametrize("file", PATCHES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_every_patch_names_its_upstream_file_and_what_would_remove_it(file):
    for name, function in patches_in(file).items():
        text = ast.get_docstring(function)
        assert "Upstream:" in text, name
        assert ".py" in text, name
        assert "Removed by:" in text, name


def test_a_function_is_wrapped_once_however_often_the_patch_is_applied():
    make_changes("lightning")
    before = call._call_configure_model
    make_changes("lightning")
    assert call._call_configure_model is before


class Methods:
    @staticmethod
    def total(first, second):
        return first + second

    @classmethod
    def named(cls, word):
        return f"{cls.__name__} {word}"


class Derived(Methods):
    pass


def test_static_methods_and_class_methods_stay_what_they_are():
    """transformers 4 has `_load_pretrained_model` as a class method; 5 has a static one and calls it on a model."""

    def twice(original, *args, **kwargs):
        return original(*args, **kwargs) * 2

    for name in ("total", "named"):
        wrap_once(Methods, name, twice)
        wrap_once(Methods, name, twice)
    assert Methods.total(1, second=2) == Derived().total(first=1, second=2) == 6
    assert Derived.named("a") == Derived().named(word="a") == "Derived aDerived a"


def test_fabric_wraps_optimizers_of_strategies_without_precision():
    """As Lightning's own tests do (tests_fabric/test_wrappers.py); there is no plugin in this run."""
    make_changes("lightning")
    strategy = SimpleNamespace(optimizer_step=lambda optimizer: "stepped")
    assert _FabricOptimizer(torch.optim.SGD(torch.nn.Linear(2, 2).parameters()), strategy).step() == "stepped"


# ---------------------------------------------------------------- the checker itself

OURS = """
class Own:
    layer: "Own"
    def __init__(self):
        self.count = 0

MARKED = "_qlora_mark"
PLAIN = "mark"
"""


def found(code):
    ours, tree = ast.parse(OURS), ast.parse(code)
    return changes_in(tree, Package([ours, tree]))


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.compile = f",
        "from lightning.pytorch import Trainer\nTrainer._run = f",
        "def f(block): block.calls += 1",
        "def f(block): block.forward: object = g",
        "def f(block): del block.forward",
        "def f(a, b): (a.count, (x, *b.rest)) = g",
        "def f(block):\n for block.forward in g: pass",
        "def f(block):\n with g as block.forward: pass",
        "def f(model): model.config.use_cache = False",
        "def f(part): setattr(part, 'log', g)",
        "def f(part): setattr(part, PLAIN, g)",
        "def f(part, name): delattr(part, name)",
        "def f(part): object.__setattr__(part, 'log', g)",
        "def f(part): part.__setattr__('log', g)",
        "def f(part): vars(part)['log'] = g",
        "def f(part): vars(part).pop('log', None)",
        "def f(part): part.__dict__.update(log=g)",
        "def f(layer): layer._parameters['weight'] = g",
        "import sys\nsys.modules['torch'] = g",
        "class Other:\n def f(self): self.model.forward = g",
        "def f(block):\n def inner(): block.forward = g\n return inner",
        "f(lambda block: setattr(block, 'forward', g))",
    ],
)
def test_the_checker_finds_a_change(code):
    assert len(found(code)) == 1


def test_the_checker_accepts_what_changes_nothing_foreign():
    assert not found(
        "class Other:\n"
        " def f(self): self.own = 1; self.__dict__['x'] = 1; super().__setattr__('a', 1)\n"
        " @classmethod\n def g(cls): cls.own = 1\n"
        "def f(ctx, x): ctx.shape = x.shape\n"
        "def f(own): own.count = 1; own.layer = 2; vars(own)['count'] = 3\n"
        "def f(block): block._qlora_mark = 1; setattr(block, MARKED, 1); vars(block).pop('_qlora_mark', None)\n"
        "def f(part): part.data = 1; part.training = False; x = part.forward\n"
        "def f(options): options['a'] = 1"
    )
