"""Pages name what exists."""

import ast
import importlib.util
import inspect
import re
from collections.abc import Iterator
from functools import partial
from inspect import isfunction
from pathlib import Path

import yaml

import lightning_qlora
from lightning_qlora.tools import cli

PACKAGE = Path(lightning_qlora.__file__).parent
DOCS = PACKAGE.parent / "docs"
DESIGN = "".join((PACKAGE.parent / "docs" / page).read_text(encoding="utf-8") for page in ("design.md", "one-file.md"))


def names_in(path):
    """Names of the functions and classes of a Python file, methods as Class.method."""
    names = set()
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
            names |= {f"{node.name}.{part.name}" for part in ast.walk(node) if isinstance(part, ast.FunctionDef)}
    return names


def test_every_function_that_is_named_exists():
    named = re.findall(r"`([\w/]+\.py):\s([\w.]+)`", DESIGN)
    assert len(named) > 30
    missing = [(path, name) for path, name in named if name not in names_in(PACKAGE / path)]
    assert not missing


def test_every_file_that_the_readme_links_to_exists():
    root = PACKAGE.parent
    pages = (root / "README.md").read_text(encoding="utf-8")  # full addresses: a package index shows the page too
    linked = re.findall(r"lightning-qlora/lightning-qlora/(?:(?:blob|tree)/)?main/([\w./-]+)", pages)
    linked += [f"docs/{page}.md" for page in re.findall(r"github\.io/lightning-qlora/([\w-]+)/", pages)]
    assert len(linked) > 12 and not [path for path in linked if not (root / path).exists()]
    assert not re.findall(r"\]\((?!https?://|#)", pages)


def test_the_address_of_the_site_is_the_same_everywhere():
    root = PACKAGE.parent
    (address,) = re.findall(r"^site_url: (.+)$", (root / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    assert f'Documentation = "{address}"' in (root / "pyproject.toml").read_text(encoding="utf-8")
    assert f"[The documentation]({address})" in (root / "README.md").read_text(encoding="utf-8")


SIGNATURES = """\
PagedAdamW(params, lr=0.0002, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0, **kwargs)
PagedOptimizer(min_numel=4096)
calibrate(module, replicas=None)
convert(module, **arguments)
disable_adapter(module)
estimate_memory(model, batch_size=1, sequence_length=512, optimizer='adamw', example=None, device='gpu', gpu=None, \
**arguments)
load_adapter(module, folder)
load_from_checkpoint(module_class, checkpoint_path, map_location=None, weights_only=None, **hyperparameters)
load_weights(module, folder)
loraplus_groups(module, lr, loraplus_lr_ratio=16.0)
merge(module, dtype='auto')
quantize(weight, quant_type='nf4', block_size=64, double_quant=True)
save_adapter(module, folder, base='quantized')
to_parameters(module)
doctor(check=False, json=False)
export(checkpoint, output, base='quantized', weights_only=True)
inspect(path, weights_only=True, json=False)
merge_adapter(adapter, output, base_model=None, dtype='auto', base='quantized', weights_only=True, \
trust_remote_code=False, json=False)
plan(model, batch_size=1, sequence_length=512, optimizer='adamw', gpu_memory=None, host_memory=None, devices=1, \
strategy='fsdp', device='gpu', gpu=None, json=False)
"""


def test_every_public_name_is_in_dir():
    assert set(dir(lightning_qlora)) >= {*lightning_qlora.__all__, "__version__"}


def test_docstrings_of_public_functions_describe_each_argument_and_the_result():
    functions = [each for each in map(partial(getattr, lightning_qlora), lightning_qlora.__all__) if isfunction(each)]
    assert len(functions) > 10
    for function in functions:
        text = inspect.getdoc(function)
        described = re.findall(r"^    (\**\w+): ", text.partition("\nArgs:\n")[2].partition("\n\n")[0], re.M)
        signature = inspect.signature(function)
        assert described == [str(each).partition(":")[0] for each in signature.parameters.values()], function.__name__
        returns = signature.return_annotation not in (None, Iterator[None])
        assert ("\nReturns:\n" in text) == returns, function.__name__


def test_a_default_changes_on_purpose():
    """docs/api.md says what is public, and that a changed default is announced; its table has those of QLoRAConfig."""
    for line in SIGNATURES.splitlines():
        name = line.partition("(")[0]
        function = getattr(lightning_qlora, name, None) or getattr(cli, name)
        parameters = inspect.signature(function).parameters.values()
        if name == "plan":
            parameters = [each for each in parameters if each.kind is not each.VAR_KEYWORD]
        texts = [str(each.replace(annotation=each.empty)) for each in parameters]
        assert f"{name}({', '.join(texts)})" == line


def test_llms_txt_has_a_sentence_for_each_page():
    hooks = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py"))
    spec.loader.exec_module(hooks)
    nav = yaml.safe_load((DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    text = hooks.llms_txt(nav, DOCS, "https://site/")
    pages = dict(re.findall(r"^- \[.+\]\(https://site/([\w-]+\.md)\): (.+)\.$", text, re.M))
    assert pages.keys() == {path.name for path in DOCS.glob("*.md")}
    assert all(len(sentence) > 25 and "](" not in sentence for sentence in pages.values()), pages
