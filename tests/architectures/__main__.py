"""The table of docs/architectures.md.

python -m tests.architectures                    all architectures, one process each; writes the page
python -m tests.architectures llama mixtral      these; prints their rows
"""

import argparse
import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers
from transformers.models.auto import modeling_auto

import lightning_qlora
from lightning_qlora import QLoRAConfig
from lightning_qlora.layers.selection import select_in_part
from tests.architectures.checks import CHECKS, known
from tests.architectures.models import ALL


def share(kind):
    """Weights of the model with its default configuration, how many of them are in 4 bits, and what the others are."""
    name = kind.partition(":")[0]
    config = transformers.CONFIG_MAPPING[name]()
    auto = transformers.AutoModel
    if name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        auto = transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    choice = select_in_part(model, QLoRAConfig())
    seen, reasons = set[int](), choice.skip | choice.train
    packed = {id(one.layer.weight) for one in choice.convert.values()}
    packed |= {id(stack.owner._parameters[stack.key]) for stack, *_ in choice.stacks.values()}
    total, quantized, rest = 0, 0, Counter[str]()
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
    results = {"architecture": kind, "input": ALL[kind][0]}
    try:
        total, quantized, rest = share(kind)
        results |= {"weights": f"{total / 1e9:.2f} B", "in 4 bits": f"{100 * quantized:.1f}%", "the rest": rest}
    except (AttributeError, TypeError, ValueError, IndexError) as error:  # defaults that transformers can't build
        results |= {"weights": "-", "in 4 bits": "-", "the rest": f"no default model ({type(error).__name__})"}
    for name, check in CHECKS.items():
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            try:
                found = known(kind, name) or check(kind, Path(folder))
                results[name] = f"no: {found}" if found else "yes"
            except Exception as error:
                lines = str(error).strip().splitlines() or [""]
                results[name] = f"FAILS: {type(error).__name__} {lines[0][:200]}"
    return results


HEAD = """# Architectures

Written by `python -m tests.architectures` with transformers {transformers} and torch {torch}, on a CPU. The checks
are in `tests/architectures/checks.py`; `make test-all` runs all of them, and `make test` some.

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
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="architectures; all of them, and the page, if none")
    parser.add_argument("--row", action="store_true", help="run the checks of one in this process, and print JSON")
    arguments = parser.parse_args()
    if arguments.row:
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        print(json.dumps(row(*arguments.kinds)))
        return
    rows = []
    for kind in arguments.kinds or ALL:
        command = [sys.executable, "-m", "tests.architectures", "--row", kind]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{kind}: the process ended with {done.returncode}.\n{done.stderr[-2000:]}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(" | ".join(rows[-1].values()), flush=True)
    if not arguments.kinds:
        path = Path(lightning_qlora.__file__).parents[1] / "docs/architectures.md"
        path.write_text(page(rows))
        print(path)


if __name__ == "__main__":
    main()
