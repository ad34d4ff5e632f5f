"""Runs the tests of this folder's kernels under Triton's interpreter, a process for each file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.triton.conftest import INSIDE

HERE = Path(__file__).parent


@pytest.mark.parametrize("file", [name for name in INSIDE if (HERE / name).exists()])
def test_under_the_interpreter(file: str) -> None:
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file)],
        env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=HERE.parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
