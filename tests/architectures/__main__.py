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
from textwrap import fill

import peft  # noqa: F401, so that each process has it
import torch
import transformers
from transformers.models.auto import modeling_auto

from lightning_qlora import QLoRAConfig
from lightning_qlora.selection.selection import select_layers
from tests.architectures.checks import CHECKS, not_loaded_again
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
    seen = set()
    reasons = choice.skip | choice.train
    packed = {id(row.owner._parameters[row.key]) for row in choice.convert.values()}
    total = 0
    quantized = 0
    rest = Counter()
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
    # Defaults that transformers can't build.
    except (AttributeError, TypeError, ValueError, IndexError, ImportError) as error:
        found |= {"weights": "-", "in 4 bits": "-", "the rest": f"no default model ({type(error).__name__})"}
    return found | results(kind, CHECKS)


def results(kind, names):
    """The result of each check."""
    made = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            try:
                found = CHECKS[name](kind, Path(folder))
                made[name] = f"no: {found}" if found else "yes"
            except Exception as error:
                lines = str(error).strip().splitlines() or [""]
                made[name] = f"FAILS: {type(error).__name__} {lines[0][:200]}"
    return made


HEAD = """# Architectures

Models of transformers that were built with a tiny configuration, converted and checked. Other models work in the same
way if their layers are linear; the report of the conversion says what it found.

Written by `python -m tests.architectures --write docs/architectures.md` with transformers {transformers} and torch
{torch}, on a CPU. {total} architectures, {plain} of them without an exception:

{names}

The checks (`tests/architectures/checks.py`; `make test-all` runs them):

{checks}

## Exceptions

| architecture | check | what it does |
| --- | --- | --- |
{exceptions}

## Much that stays in 16 bits

Of most models more than 60% of the weights are in 4 bits. Less, with the default configuration of transformers, mostly
because of embeddings: {shares}.
"""
NO_EXCEPTION = ("yes", "no: no language model")


def page(rows):
    """The page of the documentation: the names, and what is not as expected."""
    names = f"```text\n{fill(', '.join(one['architecture'] for one in rows), 118, break_on_hyphens=False)}\n```"
    notes = {}
    for one in rows:
        for name in CHECKS:
            if one[name] not in NO_EXCEPTION:
                note = re.sub(r" of this \w+", "", one[name].removeprefix("no: "))
                note = re.sub(r"adapters of \d+ layers", "adapters of some layers", note).replace("|", "/")
                notes.setdefault((name, note), []).append(f"`{one['architecture']}`")
    shares = [one for one in rows if one["in 4 bits"] != "-" and float(one["in 4 bits"].rstrip("%")) < 60]
    head = HEAD.format(
        transformers=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        total=len(rows),
        plain=sum(all(one[name] in NO_EXCEPTION for name in CHECKS) for one in rows),
        names=names,
        checks="\n".join(f"- **{name}**: {check.__doc__}" for name, check in CHECKS.items()),
        exceptions="\n".join(f"| {', '.join(kinds)} | {name} | {note} |" for (name, note), kinds in notes.items()),
        shares=", ".join(f"`{one['architecture']}` {one['in 4 bits']}" for one in shares),
    )
    return head + TAIL


TAIL = """
- Embeddings, and output embeddings that `target_modules` does not name, stay in 16 bits, as do routers of mixtures of
  experts, tied weights and convolutions.
- So does the joint `in_proj_weight` of `nn.MultiheadAttention`: torch multiplies with it inside one function, which
  would keep the decoded weight until the backward pass.
- Layers so small that their adapter would not be smaller, or of at most 64 weights, train in full.

## What some models need

- **RWKV** divides its weights in place in evaluation, validation included: `config.rescale_every = 0`, which gives the
  same outputs, and `config.use_cache = False` to train in eval mode.
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
