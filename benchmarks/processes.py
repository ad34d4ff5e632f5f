"""Variants in processes of their own that take turns, one step each, so that each has the memory of itself alone."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import measure


def steps_in_turns(
    module: str, arguments: Sequence[str], variants: Sequence[str], steps: int, threads: int
) -> dict[str, dict[str, Any]]:
    """What each variant reports: its first line, and under "steps" a line for each step.

    A variant is `python -m MODULE ARGUMENTS --variant NAME`. It prints a line of JSON when it is ready, and one for
    each line that it reads.

    Raises:
        RuntimeError: If a variant ends early.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "BITSANDBYTES_NOWELCOME": "1",
        "PYTHONPATH": str(measure.ROOT),
    }
    command = [sys.executable, "-m", module, *arguments, "--variant"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    processes = {name: subprocess.Popen([*command, name], cwd=measure.ROOT, **pipes) for name in variants}
    try:
        found: dict[str, dict[str, Any]] = {name: _reply(one) | {"steps": []} for name, one in processes.items()}
        for _ in range(steps):
            for name, process in processes.items():
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
                found[name]["steps"].append(_reply(process))
    finally:
        for process in processes.values():
            process.kill()
    return found


def _reply(process: "subprocess.Popen[str]") -> dict[str, Any]:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            reply: dict[str, Any] = json.loads(line)
            return reply
    raise RuntimeError(f"a variant ended early, with status {process.wait()}: {process.args!r}")
