"""Which ops compute wrongly on a card: found out at its first use, and kept in the private cache folder.

The kernels run in a child process, so a kernel that hangs or faults ends the child and not the run.
"""

import faulthandler
import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import torch

from lightning_qlora.files.cache_folder import cache_folder, lock_file, objection
from lightning_qlora.files.folder_writer import atomic_files
from lightning_qlora.kernels.self_test import OPS, fault, faults

LIMIT = 120.0  # seconds for one op, most of which compile its kernels
MARK = "@verdict "  # of the child's lines that are for us
LATE = "Timeout ("  # the line of `faulthandler`
KERNELS = "lightning_qlora.kernels.triton"
PACKAGE = Path(__file__).parents[1]
Verdict = dict[str, str | None]  # op -> what its kernels do wrong
_log = logging.getLogger("lightning_qlora")


def verdict(device: torch.device, repeat: bool = False) -> Verdict:
    """What the kernels of each op do wrong on a device, None for those that are right; from the cache if it is there.

    Any number of processes may ask at the same time: one checks, and the others wait for it.
    """
    facts = setup(device)
    found: Verdict | None = None
    try:
        file = cache_folder() / f"kernels-{hashlib.sha256(repr(facts).encode()).hexdigest()[:20]}.json"
        found = None if repeat else _read(file)
        if found is not None:
            return found
        with lock_file(file.with_suffix(".lock"), timeout=LIMIT * len(OPS)):
            found = None if repeat else _read(file)  # it may be there now
            if found is None:
                found = examine(device)
                with atomic_files(file.parent) as folder:
                    (folder / file.name).write_text(json.dumps({"setup": facts, "ops": found}, indent=1) + "\n")
    except OSError as error:  # no private folder, or no space
        _log.warning("The kernels are checked again in each process: %s", error)
    return found or examine(device)


def setup(device: torch.device) -> dict[str, str]:
    """What a verdict depends on: card, driver, versions, and the sources of the kernels."""
    facts = {name: import_module(name).__version__ for name in ("lightning_qlora", "torch", "triton")}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        architecture = f"{card.major}.{card.minor}"
        if torch.version.hip:
            architecture = card.gcnArchName
        drivers = (Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version"))
        facts["card"] = f"{card.name}, {architecture}"
        facts["toolkit"] = str(torch.version.cuda or torch.version.hip)
        facts["supported by the driver"] = str(getattr(torch._C, "_cuda_getDriverVersion", int)())
        facts["driver"] = " ".join(file.read_text().strip() for file in drivers if file.exists())
    digest = hashlib.sha256()
    for file in sorted([*(PACKAGE / "kernels").rglob("*"), *(PACKAGE / "quantization").rglob("*")]):
        if file.suffix in (".py", ".json"):
            digest.update(file.read_bytes())
    return facts | {"sources": digest.hexdigest()}


def _read(file: Path) -> Verdict | None:
    """The verdict in a file; None if there is none, it is damaged, or another user could have written it."""
    try:
        found: Any = None if objection(file) else json.loads(file.read_text())["ops"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not isinstance(found, dict) or list(found) != list(OPS):
        return None
    return found if all(why is None or isinstance(why, str) for why in found.values()) else None


def examine(device: torch.device) -> Verdict:
    """Check every op now. After a wrong op another child checks the rest, because a fault ends the use of a device.

    Raises:
        torch.OutOfMemoryError: If the device has no memory for the check, which is no verdict.
    """
    found: Verdict = {}
    while left := [op for op in OPS if op not in found]:
        answers = _ask(device, left)
        if not answers:  # a card for one process, or without memory for a second one: here, without a time limit
            found = faults(import_module(KERNELS), device)
            break
        found |= zip(left, answers, strict=False)
    if any(map(is_out_of_memory, found.values())):
        raise torch.OutOfMemoryError(
            f"{device} has no memory for the check of the kernels at their first use. Make the batch smaller, or use "
            "4-bit layers on it before the rest of its memory is taken."
        )
    return found


def is_out_of_memory(error: object) -> bool:
    """Whether an error, or its text, is that of torch's allocator, or of the driver, which loads a kernel beside it."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def _ask(device: torch.device, ops: list[str]) -> list[str | None]:
    """What a child finds in these ops, until one is wrong; empty if it can't use the device."""
    end, output = start(device, ops)
    answers: list[str | None] = []
    ending = "the process of the check ended"
    try:
        for line in output:
            if line.startswith(LATE):
                ending = f"no result after {LIMIT:g} s"
            elif line.startswith(MARK):
                answers.append(json.loads(line.removeprefix(MARK)))
                if answers[-1] or len(answers) > len(ops):
                    return answers[1:]
        return [*answers[1:], ending] if answers else []
    finally:
        end()
        output.close()


def start(device: torch.device, ops: list[str]) -> tuple[Callable[[], object], IO[str]]:
    """Start a process that calls `check`: what ends it, and its output.

    Not a fork, in which CUDA can't be used. Its working folder is the first in which Python looks for the package.
    """
    code = (
        f"import faulthandler, sys; faulthandler.dump_traceback_later({2 * LIMIT}, exit=True)\n"
        f"from {__name__} import check; check(sys.argv[1], sys.argv[2:], sys.stdout)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(device), *ops],
        cwd=PACKAGE.parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        errors="replace",  # and so as text
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout is not None
    return child.kill, child.stdout


def check(name: str, ops: Iterable[str], output: IO[str]) -> None:
    """In a child: write None once the device of this name can be used, then what each op does wrong, until one does.

    The child ends itself if an op takes too long, also in a call of C that never returns.
    """
    kernels = import_module(KERNELS)
    device = torch.device(name)
    torch.zeros(1, dtype=torch.float32, device=device)
    print(MARK + "null", file=output, flush=True)
    for op in ops:
        faulthandler.dump_traceback_later(LIMIT, exit=True, file=output)
        text = fault(kernels, device, op)
        print(MARK + json.dumps(text), file=output, flush=True)
        if text:
            break
    faulthandler.cancel_dump_traceback_later()
