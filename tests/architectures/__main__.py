"""The table of docs/architectures.md.

python -m tests.architectures                    all architectures, one process each; writes the page
python -m tests.architectures llama mixtral      these; prints their rows
python -m tests.architectures --classes          the checks of folders for one class of each architecture

With `--rows FILE` each row is added to the file as it comes, and rows that the file has are not computed again.
"""

import argparse
import contextlib
import io
import json
import logging
import multiprocessing
import re
import signal
import tempfile
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import peft  # noqa: F401, so that each process has it
import torch
import transformers
from transformers.models.auto import modeling_auto

from lightning_qlora import QLoRAConfig
from lightning_qlora.layers.selection import select_layers
from tests.architectures.checks import CHECKS, known, not_loaded_again
from tests.architectures.classes import all_types, class_of, find_configuration
from tests.architectures.models import ALL

SECONDS = 600  # of one architecture


def share(kind):
    """Weights of the model with its default configuration, how many of them are in 4 bits, and what the others are."""
    name = kind.partition(":")[0]
    config = transformers.CONFIG_MAPPING[name]()
    auto = transformers.AutoModel
    if name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        auto = transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    choice = select_layers(model, QLoRAConfig())
    seen = set[int]()
    reasons = choice.skip | choice.train
    parts = [chosen.part for chosen in choice.convert.values()]
    packed = {id(p.weight if isinstance(p, torch.nn.Module) else p.owner._parameters[p.key]) for p in parts}
    total = 0
    quantized = 0
    rest = Counter[str]()
    for owner_name, owner in model.named_modules():
        for key, parameter in owner._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            total += parameter.numel()
            names = [name for name in (owner_name, f"{owner_name}.{key}") if name in reasons]
            if id(parameter) in packed:
                quantized += parameter.numel()
            else:
                rest[_why(reasons[names[0]]) if names else type(owner).__name__] += parameter.numel()
    large = [f"{why} {100 * count / total:.1f}%" for why, count in rest.most_common(3) if count > 0.005 * total]
    return total, quantized / total, ", ".join(large)


def _why(reason):
    """A reason without names and sizes, so that equal ones are counted together."""
    if reason.startswith("its weight is tied"):
        return "tied weights"
    return "small layers" if re.search(r"\d+x\d+", reason) else reason.partition(";")[0]


def row(kind):
    """The results of one architecture: each check is "yes", or why it was not made or what it found."""
    found = {"architecture": kind, "input": ALL[kind][0]}
    try:
        total, quantized, rest = share(kind)
        found |= {"weights": f"{total / 1e9:.2f} B", "in 4 bits": f"{100 * quantized:.1f}%", "the rest": rest}
    except (
        AttributeError,
        TypeError,
        ValueError,
        IndexError,
        ImportError,
    ) as error:  # defaults that transformers can't build
        found |= {"weights": "-", "in 4 bits": "-", "the rest": f"no default model ({type(error).__name__})"}
    return found | results(kind, CHECKS)


def results(kind, names):
    """The result of each check."""
    made = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            try:
                found = known(kind, name) or CHECKS[name](kind, Path(folder))
                made[name] = f"no: {found}" if found else "yes"
            except Exception as error:
                lines = str(error).strip().splitlines() or [""]
                made[name] = f"FAILS: {type(error).__name__} {lines[0][:200]}"
    return made


HEAD = """# Architectures

Whether a model of transformers trains, saves, merges and reloads with the plugin, and how much of it is in 4 bits.

Written by `python -m tests.architectures --write docs/architectures.md` with transformers {transformers} and torch
{torch}, on a CPU. The checks are in `tests/architectures/checks.py`; `make test-all` runs all of them.

Each architecture is built with a tiny configuration, converted with rank 2 and checked in a process of its own:

{checks}

"weights" and "in 4 bits" are those of the default configuration of each model in transformers, which is built without
data: the share of all weights that `QLoRAPrecision()` puts in 4 bits, embeddings included. "the rest" names what holds
more than 0.5% of the weights and stays in 16 bits.

{totals}

| architecture | input | weights | in 4 bits | the rest | {columns} |
| --- | --- | --- | --- | --- |{lines}
"""


def page(rows):
    """The page of the documentation."""
    names = list(CHECKS)
    body = []
    notes: dict[str, int] = {}
    for one in rows:
        cells = []
        for name in names:
            result = one[name]
            number = None if result == "yes" else notes.setdefault(result.removeprefix("no: "), len(notes) + 1)
            cells.append("yes" if number is None else f"[{number}]")
        first = [f"`{one['architecture']}`", one["input"], one["weights"], one["in 4 bits"], one["the rest"]]
        body.append("| " + " | ".join(first + cells) + " |")
    totals = ", ".join(f"{name} {sum(one[name] == 'yes' for one in rows)}" for name in names)
    head = HEAD.format(
        transformers=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        checks="\n".join(f"- **{name}**: {check.__doc__}" for name, check in CHECKS.items()),
        totals=f"{len(rows)} architectures. Passed: {totals}. Numbers in brackets are notes below the table.",
        columns=" | ".join(names),
        lines=" --- |" * len(names),
    )
    return (
        head + "\n".join(body) + "\n\n" + "\n".join(f"{number}. {note}" for note, number in notes.items()) + "\n" + TAIL
    )


TAIL = """
## What stays in 16 bits

- Embeddings, and output embeddings that `target_modules` does not name.
- Routers of mixtures of experts, and weights that are tied to others (the blocks that Zamba 2 shares).
- The joint `in_proj_weight` of `nn.MultiheadAttention`: a quarter of the weights of an `nn.TransformerEncoderLayer` of
  feed-forward width 4 E, and at most 1.9% of the models above. torch multiplies with it inside one function, which
  would keep the decoded weight until the backward pass, as it does for the smaller `out_proj`, which is converted. So 4
  bits would need more memory in training than 16, except with gradient checkpointing.
- The three-dimensional weights of XLNet's attention, 35.0% of it: its `einsum` would keep the decoded weight as well,
  and PEFT has no adapter for them.
- Convolutions, of kernel 1 too. Only SqueezeBERT is made of those (52.1% of it), and most of them have groups, so they
  are no linear layers.
- Layers so small that their adapter would not be smaller, or of at most 64 weights, train in full.

## Folders of more classes

`python -m tests.architectures --classes` makes the checks "loads", "merges" and "own folder" for one
class of each architecture that transformers has, with a head if it can be built with one, and says why a class can't
be built here. `python -m tests.architectures --classes molmo2 gemma4` makes them for these, and `--rows FILE`
continues after an interruption. One run of the first two for all 638 architectures, on 2026-11-26 at commit
e58e17e: 563 passed. Two were wrong, because a merge mistook square and 4-bit weights of Conv1D
beside linear layers (CLVP, Decision Transformer); they pass since 5445f2a. 24 have nothing to convert (convolutions
alone, or only a small head), 3 have names that PEFT can't tell apart (`save_adapter` says so: RF-DETR, LW-DETR,
SwiftFormer), 2 are not loaded by transformers itself (`shieldgemma2`, `nemo_speechlm`), and 44 could not be built
here: packages that were not installed, default configurations that transformers refuses, or more than 100 million
parameters. One run of "own folder" for the same 638, on 2026-11-27: 566 passed, and the others are those above, and
DBRX as in the table.

## What some models need

- **RWKV** divides its weights in place in evaluation, validation included: `config.rescale_every = 0`, which gives the
  same outputs. Training in eval mode with its cache is an error of autograd in the dense model too:
  `config.use_cache = False`.
- **Reformer** runs its layers inside an autograd function: `model.train()` and `model.enable_input_require_grads()`.
"""


SAID = {  # part of an error of ours -> what it means for a class
    "has no linear layer": "nothing to convert",
    "has no adapter": "nothing to convert",  # its linear layers are smaller than their adapters, and train in full
    "PEFT would also select": "save_adapter refuses two names that PEFT can't tell apart",
}


def class_row(name):
    """The results of the checks of folders for one class of an architecture."""
    kind = class_of(name)
    first = {"architecture": name, "class": kind}
    if isinstance(why := find_configuration(kind), str):
        return first | {"built": f"not built: {why}"}
    found = results(kind, ["loads", "merges", "own folder"])
    for text, why in SAID.items():
        if any(text in result for result in found.values()):
            return first | {"built": why}
    if any(result != "yes" for result in found.values()):
        with tempfile.TemporaryDirectory() as folder:
            if why := not_loaded_again(kind, Path(folder)):
                return first | {"built": f"transformers does not load the weights that it saves: {why}"}
    return first | found


def in_a_process(make_row, kind):
    """The row, from a forked process: this one has imported everything already."""
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(1, mp_context=context, initializer=signal.alarm, initargs=(SECONDS,)) as pool:
        try:
            return pool.submit(make_row, kind).result()
        except BrokenProcessPool:
            ended = f"FAILS: the process crashed, or was stopped after {SECONDS} s"
            first = dict.fromkeys(["input", "weights", "in 4 bits", "the rest"], "-")
            return {"architecture": kind} | first | dict.fromkeys(CHECKS, ended)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="architectures; all of them if none")
    parser.add_argument("--write", type=Path, help="file for the page")
    parser.add_argument("--rows", type=Path, help="file of finished rows")
    parser.add_argument("--classes", action="store_true", help="only the checks of folders, of one class each")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # a fork of a process with threads of OpenMP may hang
    kinds = arguments.kinds or (all_types() if arguments.classes else ALL)
    rows = {}
    if arguments.rows and arguments.rows.exists():
        rows = {one["architecture"]: one for one in map(json.loads, arguments.rows.read_text().splitlines())}
    for kind in kinds:
        if kind not in rows:
            rows[kind] = in_a_process(class_row if arguments.classes else row, kind)
            print(" | ".join(rows[kind].values()), flush=True)
            if arguments.rows:
                with arguments.rows.open("a") as file:
                    file.write(json.dumps(rows[kind]) + "\n")
    if arguments.write:
        arguments.write.write_text(page([rows[kind] for kind in kinds]))


if __name__ == "__main__":
    main()
