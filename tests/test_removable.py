"""Each of some features can be taken out: its files and a few lines, after which the package does the rest.

A change that ties a feature to other files fails here: the feature then has one more line outside of its files.
"""

import ast
import functools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_qlora
from lightning_qlora import convert
from tests.scripts.plain_flow import llama

ROOT = Path(__file__).parent.parent
PACKAGE = Path(lightning_qlora.__file__).parent
MOST_LINES = 8  # outside of the files of a feature


@dataclass
class Feature:
    files: list[str]  # paths in the package; a folder ends with a slash
    lines: dict[str, list[str | tuple[str, str]]]  # file -> its lines that go, or become others; without indentation
    # Arguments that only the feature takes; the package refuses a checkpoint with the last ones too.
    refused: list[dict[str, Any]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # its public names


FEATURES = {
    "LoRA+": Feature(
        ["optim/loraplus.py"],
        {
            "__init__.py": [
                "from lightning_qlora.optim.loraplus import loraplus_groups as loraplus_groups",
                '"loraplus_groups": "optim.loraplus",',
            ],
        },
        names=["loraplus_groups"],
    ),
    "the planner": Feature(
        [
            "tools/activations.py", "tools/cards.py", "tools/fake_model.py", "tools/longest_sequence.py",
            "tools/memory_estimate.py", "tools/patches.py", "tools/plan.py",
        ],
        {
            "__init__.py": [
                "from lightning_qlora.tools.memory_estimate import MemoryEstimate as MemoryEstimate",
                "from lightning_qlora.tools.memory_estimate import estimate_memory as estimate_memory",
                '"MemoryEstimate": "tools.memory_estimate",',
                '"estimate_memory": "tools.memory_estimate",',
            ],
            "tools/cli.py": ["from lightning_qlora.tools.plan import plan", '"plan": plan,'],
        },
        names=["MemoryEstimate", "estimate_memory"],
    ),
    "sharded loading": Feature(
        ["huggingface/sharded/"],
        {
            "__init__.py": [
                "from lightning_qlora.huggingface.sharded.load_weights import load_weights as load_weights",
                '"load_weights": "huggingface.sharded.load_weights",',
            ],
            "huggingface/quantizer.py": [
                "from lightning_qlora.huggingface.sharded.without_data import LaterWeights",
                "if (shards or self.loading.sharding) and is_folder and not needs_values:",
                "self.later = LaterWeights(self, model, paths[0].parent, self._shapes)",
            ],
        },
        names=["load_weights"],
    ),
    "rows of tokens": Feature(
        ["layers/trainable_tokens.py", "selection/token_selection.py"],
        {
            "adapters/load.py": ["trainable_token_indices=rows or None,"],
            "arguments.py": ["trainable_token_indices: list[int] | dict[str, list[int]] | None"],
            "config.py": [
                "trainable_token_indices: TokenIndices | None = "
                "_argument(None, check_token_indices, in_peft=True, needs_values=True)"
            ],
            "selection/selection.py": [
                "from lightning_qlora.selection.token_selection import TokenRows",
                "if config.trainable_token_indices:",
                "some_rows = TokenRows(seen, config.trainable_token_indices)",
            ],
        },
        refused=[{"trainable_token_indices": [1, 2]}],
    ),
    "DoRA": Feature(
        ["layers/dora.py"],
        {
            "arguments.py": ["use_dora: bool"],
            "config.py": [
                "use_dora: bool = "
                "_argument(False, check_bool, of_layer=True, at_loading=True, of_function=True, in_peft=True)"
            ],
            "layers/lora_layer.py": [
                "from lightning_qlora.layers.dora import DoRAMatrix",
                "True: DoRAMatrix,",
                ("self.matrix_class = ADAPTERS[config.use_dora]", "self.matrix_class = Matrix"),
            ],
            "adapters/base_compatibility.py": [
                ('for key in (*Quantization._fields, "use_dora"):', "for key in Quantization._fields:")
            ],
        },
        refused=[{"use_dora": True}],
    ),
    "disable_adapter": Feature(
        ["layers/disable_adapter.py"],
        {
            "__init__.py": [
                "from lightning_qlora.layers.disable_adapter import disable_adapter as disable_adapter",
                '"disable_adapter": "layers.disable_adapter",',
            ],
        },
        names=["disable_adapter"],
    ),
    "tensor parallelism": Feature(
        ["layers/tensor_parallel.py"],
        {
            "huggingface/operations.py": [
                "from lightning_qlora.layers.tensor_parallel import SPLIT_EXPERTS, unknown_style",
                ("return SPLIT_EXPERTS", "return LOAD_WHOLE"),
                (
                    "return None if type(place.placements[0]) is Shard else "
                    'unknown_style("a plan for fused layers")',
                    "return LOAD_WHOLE",
                ),
            ],
            "layers/qlora_linear.py": [
                "from lightning_qlora.layers.tensor_parallel import split, unknown_style",
                "def split_over(self, mesh: Any, by_inputs: bool) -> None:",
                "self._split = split(self, mesh, by_inputs)",
                (
                    """raise ValueError(f"{self.full_name}: {unknown_style('another style')}")""",
                    'raise ValueError(f"{self.full_name}: a 4-bit layer can\'t be split by a plan.")',
                ),
            ],
        },
    ),
    "calibration": Feature(
        ["calibration/", "starts/calibrated.py", "starts/input_statistics.py"],
        {
            "__init__.py": [
                "from lightning_qlora.calibration.calibration import calibrate as calibrate",
                '"calibrate": "calibration.calibration",',
            ],
            "config.py": [
                (
                    'InitLoRAWeights = Literal["default", "gaussian", "calibrated"]',
                    'InitLoRAWeights = Literal["default", "gaussian"]',
                )
            ],
            "conversion/convert.py": [
                "from lightning_qlora.calibration.calibration import calibration_of",
                "if any(layer.input_observer is not None for layer in parts.layers.values()):",
                "report.calibration = calibration_of(parts.modules, run.sharded)",
            ],
            "starts/starts.py": [
                "from lightning_qlora.starts.calibrated import begin_again, wait_for_inputs",
                '"calibrated": Start(default, wait_for_inputs, begin_again),',
            ],
        },
        refused=[{"init_lora_weights": "calibrated"}],
        names=["calibrate"],
    ),
    "deferred logits": Feature(
        ["logits/"],
        {
            "arguments.py": ['deferred_logits: bool | Literal["auto"]'],
            "config.py": ['deferred_logits: bool | Literal["auto"] = _argument("auto", check_auto)'],
            "conversion/convert.py": [
                "from lightning_qlora.logits.deferred_head import "
                "check_output_embeddings, defer_output_embeddings",
                "if config.deferred_logits is True and not seen.was_converted:",
                "check_output_embeddings(parts)",
                "if config.deferred_logits is True or parts.traits.is_wide:",
                "report.deferred_logits = defer_output_embeddings(parts, config.deferred_logits, run.sharded)",
            ],
            "tools/plan.py": [
                'config = replace(config, deferred_logits="auto")  # would save nothing, so it is not advised'
            ],
        },
        refused=[{"deferred_logits": value} for value in (True, False, "auto")],
    ),
}  # fmt: skip


def without(features, folder):
    """Copy the package into a folder, without features."""
    package = folder / PACKAGE.name
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    for feature in features:
        for name in feature.files:
            path = package / name
            if name.endswith("/"):
                shutil.rmtree(path)
            else:
                path.unlink()
        for name, gone in feature.lines.items():
            change(package / name, dict(line if isinstance(line, tuple) else (line, "") for line in gone))
    return package


def change(path, lines):
    """Replace lines of a file, without their indentation, by others; by an empty text: remove them."""
    if not path.is_file():
        return  # another feature that goes had it
    left = []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if text not in lines:
            left.append(line)
            continue
        found.append(text)
        if lines[text]:
            left.append(line.replace(text, lines[text]))
    assert sorted(found) == sorted(lines), f"{path}: these lines must be there once"
    path.write_text("\n".join(left) + "\n", encoding="utf-8")


@functools.cache
def names_of(source):
    """What a file defines or imports, and what it imports from the package: (module, name)."""
    names = set()
    imported = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_qlora"):
                imported += [(node.module, alias.name) for alias in node.names]
    return names, imported


def missing_imports(package):
    """What files of the package import from it, and it does not have."""
    files = {
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"): names_of(
            path.read_bytes()
        )
        for path in package.rglob("*.py")
    }
    return [
        (file, module, name)
        for file, (_, imported) in files.items()
        for module, name in imported
        if f"{module}.{name}" not in files and name not in files.get(module, [()])[0]
    ]


def run_plain_flow(features, folder):
    """What `tests/scripts/plain_flow.py` does, in a process that finds the package without these features."""
    package = without(features, folder)
    refused = [arguments for feature in features for arguments in feature.refused]
    names = [name for feature in features for name in feature.names]
    files = []
    for feature in features:
        for arguments in feature.refused[-1:]:
            module = llama()
            convert(module, r=4, **arguments)
            files.append(f"{folder}/{len(files)}.pt")
            torch.save(module.state_dict(), files[-1])
    arguments = str(package), names, refused, files
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/scripts/plain_flow.py"), *map(json.dumps, arguments)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_is_its_files_and_a_few_lines(name, tmp_path):
    feature = FEATURES[name]
    assert sum(map(len, feature.lines.values())) <= MOST_LINES
    assert missing_imports(without([feature], tmp_path)) == []


def test_the_rest_works_without_all_of_them(tmp_path):
    run_plain_flow([*FEATURES.values()], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", FEATURES)
def test_the_rest_works_without_a_feature(name, tmp_path):
    run_plain_flow([FEATURES[name]], tmp_path)
