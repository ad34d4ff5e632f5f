"""The examples for several machines, with two processes here: a worker is killed, and the run ends as if it was not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import PORTS, ROOT
from tests.toys import chat_model

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md")]
    return chat_model(tmp_path_factory.mktemp("llama"), pages)


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """The last checkpoint of a run on one machine that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    (run,) = start([[*TORCHRUN, "--standalone", "--nproc-per-node", "2", *example("machines.py", base, folder)]])
    assert run.wait(300) == 0
    return newest(folder)


def example(script, base, folder):
    return [f"examples/{script}", "--fast", f"--base={base}", f"--output={folder}"]


def start(commands, **environment):
    """Start the processes, each with its number as SLURM's rank."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    ranks = [dict.fromkeys(("SLURM_PROCID", "SLURM_NODEID"), str(rank)) for rank in range(len(commands))]
    return [
        subprocess.Popen(command, cwd=ROOT, env={**variables, **rank})
        for command, rank in zip(commands, ranks, strict=True)
    ]


def newest(folder):
    path = max(folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    return torch.load(path, weights_only=False)


def wait_for_checkpoint(folder, process):
    while not list(folder.rglob("*.ckpt")):
        assert process.poll() is None
        time.sleep(0.01)


def workers(folder, name):
    """Processes of this run whose command line has the name, in the order in which they began."""
    pids = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
            environment = (entry / "environ").read_bytes()
        except OSError:  # it ended
            continue
        if name in command and f"OF_THE_TEST={folder}".encode() in environment.split(b"\0"):
            pids.append(int(entry.name))
    return sorted(pids)


def assert_equal(found, expected):
    for key in ("state_dict", "optimizer_states", "epoch", "global_step"):
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=0)


def test_the_fsdp_script_trains_and_resumes_from_its_shards(base, tmp_path):
    command = [sys.executable, *example("fsdp.py", base, tmp_path), "--devices=2", "--accelerator=cpu"]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300)
    assert run.returncode == 0
    steps = sorted(int(path.stem.rpartition("=")[2]) for path in tmp_path.rglob("*.ckpt") if path.is_dir())
    assert steps[-1] == 4  # two epochs of two steps, the second after a resume


def test_torchrun_starts_all_workers_again(base, whole, tmp_path):
    options = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "2", "--rdzv-backend", "c10d"]
    options += ["--rdzv-endpoint", f"localhost:{next(PORTS)}", "--rdzv-id", "test"]
    agents = start(
        [[*TORCHRUN, *options, *example("machines.py", base, tmp_path)]] * 2,
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
        OF_THE_TEST=str(tmp_path),
    )
    wait_for_checkpoint(tmp_path, agents[0])
    killed = [pid for pid in workers(tmp_path, b"machines.py") if pid not in {agent.pid for agent in agents}][-1]
    os.kill(killed, signal.SIGKILL)
    assert [agent.wait(300) for agent in agents] == [0, 0]
    assert_equal(newest(tmp_path), whole)


def test_a_slurm_job_is_submitted_again(base, whole, tmp_path):
    variables = {
        "SLURM_JOB_ID": "4631",
        "SLURM_JOB_NAME": "test",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "2",
        "SLURM_LOCALID": "0",
        "SLURM_NODELIST": "localhost",
        "MASTER_PORT": str(next(PORTS)),
    }
    command = [sys.executable, *example("machines.py", base, tmp_path)]
    ranks = start([command] * 2, **variables)
    wait_for_checkpoint(tmp_path, ranks[0])
    for rank in reversed(ranks):  # srun --kill-on-bad-exit=1 kills the others
        rank.kill()
    assert [rank.wait() for rank in ranks] == [-signal.SIGKILL] * 2
    assert newest(tmp_path)["epoch"] < whole["epoch"]
    assert [rank.wait(300) for rank in start([command] * 2, **variables)] == [0, 0]
    assert_equal(newest(tmp_path), whole)


def test_ray_starts_all_workers_again(base, whole, tmp_path):
    pytest.importorskip("ray.train")
    (driver,) = start(
        [[sys.executable, *example("machines_ray.py", base, tmp_path)]],
        OF_THE_TEST=str(tmp_path),
        RAY_USAGE_STATS_ENABLED="0",
    )
    wait_for_checkpoint(tmp_path, driver)
    before = workers(tmp_path, b"RayTrainWorker")
    os.kill(before[-1], signal.SIGKILL)
    assert driver.wait(500) == 0 and len(before) == 2
    assert_equal(newest(tmp_path), whole)
