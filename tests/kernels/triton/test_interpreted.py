"""Runs the tests of this folder's kernels under Triton's interpreter, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.triton.conftest import PARTS

HERE = Path(__file__).parent


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part[0])
def test_under_the_interpreter(part) -> None:
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(HERE / f"test_{name}.py" for name in part)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=HERE.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
