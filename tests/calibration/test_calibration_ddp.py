"""The calibrated start under strategy="ddp": one start for all ranks, from the batches of all ranks."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.conftest import dataset

ROOT = Path(__file__).parents[2]


def test_all_ranks_start_alike_from_the_inputs_of_all(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PL_", "LOCAL_", "MASTER_", "NODE_"))}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.ddp_calibration", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(2))
    for accumulate in (1, 2):
        (state, rows), (other, _) = first[accumulate], second[accumulate]
        assert rows == 2 * 4 * accumulate
        assert all(torch.equal(value, other[name]) for name, value in state.items())
        inputs = dataset(64).tensors[0][:rows]
        torch.testing.assert_close(state["net.0.input_rms"], inputs.square().mean(0).sqrt())
