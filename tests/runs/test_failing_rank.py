"""A rank that fails while two train: the other one ends with an error, and the last checkpoint is whole."""

import os
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import pytest
import torch

from lightning_qlora.files.lightning_checkpoint import read_checkpoint
from tests.conftest import PORTS, RANKS, ROOT, TORCHRUN

pytestmark = pytest.mark.slow
KILLED = -signal.SIGKILL


class Ended(NamedTuple):
    code: int
    text: str


def run(folder, strategy, failure, step, resume="", end=2) -> list[Ended]:
    """Two processes that nobody stops, each with what torchrun would give it, until this many have ended."""
    folder.mkdir(exist_ok=True)
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(next(PORTS)), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    own |= {"PATH": f"{folder.parent}:{os.environ['PATH']}"} | TORCHRUN
    command = [sys.executable, "-m", "tests.scripts.failing_rank", *map(str, (folder, strategy, failure, step, resume))]
    outputs = [folder / f"output{rank}" for rank in range(2)]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **own, **dict.fromkeys(RANKS, str(rank))},
            stdout=output.open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank, output in enumerate(outputs)
    ]
    codes: dict[int, int] = {}
    try:
        while len(codes) < end:  # at most as long as a test may take
            time.sleep(0.05)
            codes = {rank: process.returncode for rank, process in enumerate(ranks) if process.poll() is not None}
    finally:
        for process in ranks:
            process.kill()
    return [Ended(code, outputs[rank].read_text()) for rank, code in codes.items()]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_killed_rank_ends_the_other_and_the_run_resumes_exactly(strategy, tmp_path):
    whole = run(tmp_path / "whole", strategy, "none", 0)
    survivor, killed = run(tmp_path / "killed", strategy, "kill", 5)
    assert [end.code for end in whole] == [0, 0] and killed.code == KILLED
    assert survivor.code == 1
    last = tmp_path / "killed/saved/step=4.ckpt"
    read_checkpoint(last)
    resumed = run(tmp_path / "killed", strategy, "none", 0, last)
    assert [end.code for end in resumed] == [0, 0]
    assert_equal(tmp_path, "whole", "killed", 4)


def assert_equal(folder, whole, resumed, step):
    for rank in range(2):
        expected, found = (torch.load(folder / name / f"rank{rank}.pt", weights_only=True) for name in (whole, resumed))
        assert found["losses"] == expected["losses"][step:]
        for name, value in expected["adapters"].items():
            assert torch.equal(found["adapters"][name], value)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_rank_that_dies_while_it_saves_leaves_the_checkpoints_before_it_whole(strategy, tmp_path):
    survivor, killed = run(tmp_path / "run", strategy, "save", 6)
    assert killed.code == KILLED and survivor.code == 1
    for step in (2, 4):
        read_checkpoint(tmp_path / f"run/saved/step={step}.ckpt")
    if strategy == "fsdp":  # the folder that was being written
        with pytest.raises((FileNotFoundError, ValueError)):
            read_checkpoint(tmp_path / "run/saved/step=6.ckpt")


def test_the_others_get_an_error_if_a_rank_raises(tmp_path):
    survivor, failed = run(tmp_path / "run", "ddp", "raise", 5)
    assert survivor.code == 1 and failed.code == 1


def test_a_rank_that_stops_ends_the_others_after_the_timeout(tmp_path):
    (waiting,) = run(tmp_path / "run", "ddp", "stop", 5, end=1)
    assert waiting.code == 1 and "Timed out" in waiting.text
