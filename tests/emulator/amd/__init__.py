"""Executes AMD's machine code on a CPU: the code objects that Triton makes, in the emulator of tinygrad's tests.

tinygrad's emulator executes what calculates, branches or moves values between registers. Loads, stores, atomic
operations and waits (`accesses.py`) and what moves values between lanes (`lanes.py`) are executed here, with the checks
of `tests/emulator/memory.py`. A wave is called a warp there, and a work group a block.

No package contains that emulator. The environment variable TINYGRAD names a folder with tinygrad's repository at
`COMMIT`; without it the tests are skipped.
"""

import os
import shutil

import pytest

COMMIT = "a9069c177a9da9cca18593edf55acd2e6073cca6"
FOLDER = os.environ.get("TINYGRAD")
TARGETS = ("gfx1100", "gfx1201", "gfx942")  # RDNA 3, RDNA 4, CDNA 3
INSTALL = (
    f"git init F && git -C F fetch --depth 1 https://github.com/tinygrad/tinygrad {COMMIT} && git -C F checkout "
    "FETCH_HEAD; then set TINYGRAD to the full path of F, and CC if clang has another name"
)
needs_tinygrad = pytest.mark.skipif(
    not (FOLDER and shutil.which(os.environ.get("CC", "clang"))),
    reason=f"AMD's machine code needs clang and the emulator of tinygrad's tests: {INSTALL}",
)


def targets(*names):
    """Targets as parameters of a slow test."""
    return [pytest.param(name, marks=[pytest.mark.slow, needs_tinygrad]) for name in names or TARGETS]
