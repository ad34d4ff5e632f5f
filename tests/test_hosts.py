"""Fine-tuning on two and three hosts (tests/hosts.py) that fail, and the bytes that they send."""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import cache

import pytest
import torch

from tests.conftest import ROOT
from tests.hosts import connected
from tests.test_machines import TORCHRUN, assert_equal, example, newest, wait_for_checkpoint
from tests.toys import chat_model

pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # six processes on two cores, and a rendezvous of a minute
PROCESSES = {"ddp": 1, "hsdp": 2, "fsdp": 1}  # on each host


@pytest.fixture
def hosts():
    with ExitStack() as stack:
        try:
            made = stack.enter_context(connected(3))
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"hosts can't be made: {error}")
        yield made


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return chat_model(tmp_path_factory.mktemp("llama"), [page.read_text() for page in (ROOT / "docs").glob("*.md")])


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """The last checkpoint of a run on two hosts that nothing interrupted."""

    @cache
    def last(strategy):
        folder = tmp_path_factory.mktemp(strategy)
        with connected(2) as two:
            finish(fit(two, base, folder, strategy))
        return newest(folder)

    return last


def torchrun(nodes, processes):
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "host0:29400"]
    return [*TORCHRUN, "--nnodes", str(nodes), "--nproc-per-node", str(processes), *rendezvous]


def fit(hosts, base, folder, strategy="ddp", nodes=None, processes=None, arguments=(), stdout=None):
    """Start examples/machines.py on these hosts."""
    launch = [*torchrun(nodes or len(hosts), processes or PROCESSES[strategy]), "--max-restarts", "3"]
    command = [*launch, *example("machines.py", base, folder), f"--strategy={strategy}", *arguments]
    return [host.start(command, stdout) for host in hosts]


def finish(runs):
    assert [run.wait(900) for run in runs] == [0] * len(runs)


def optimizer_state(checkpoint):
    """In the order of the parameters: each strategy has numbers of its own for them."""
    return [state for _, state in sorted(checkpoint["optimizer_states"][0]["state"].items())]


def interrupt(hosts, base, folder, strategy="ddp"):
    """Run until there is a checkpoint, and kill all hosts."""
    runs = fit(hosts, base, folder, strategy)
    wait_for_checkpoint(folder, runs[0])
    for host, run in zip(hosts, runs, strict=True):
        host.kill()
        run.wait()
    return newest(folder)


@pytest.mark.parametrize("strategy", PROCESSES)
def test_a_host_that_was_killed_joins_again(hosts, base, whole, tmp_path, strategy):
    runs = fit(hosts[:2], base, tmp_path, strategy)
    wait_for_checkpoint(tmp_path, runs[0])
    hosts[1].kill()
    runs[1:] = fit([hosts[1]], base, tmp_path, strategy, nodes=2)
    finish(runs)
    assert_equal(newest(tmp_path), whole(strategy))


@pytest.mark.parametrize("strategy", PROCESSES)
def test_the_command_is_started_again(hosts, base, whole, tmp_path, strategy):
    saved = interrupt(hosts[:2], base, tmp_path, strategy)
    assert saved["epoch"] < whole(strategy)["epoch"]
    finish(fit(hosts[:2], base, tmp_path, strategy))
    assert_equal(newest(tmp_path), whole(strategy))


def test_without_the_host_of_the_rendezvous_the_others_end(hosts, base, tmp_path):
    runs = fit(hosts[:2], base, tmp_path)
    wait_for_checkpoint(tmp_path, runs[0])
    hosts[0].kill()
    assert runs[1].wait(900) != 0


@pytest.mark.parametrize("strategy", PROCESSES)
def test_a_link_is_cut_for_a_while(hosts, base, whole, tmp_path, strategy):
    runs = fit(hosts[:2], base, tmp_path, strategy)
    wait_for_checkpoint(tmp_path, runs[0])
    hosts[1].cut()
    time.sleep(20)
    hosts[1].mend()
    finish(runs)
    assert_equal(newest(tmp_path), whole(strategy))


@pytest.mark.parametrize("strategy", PROCESSES)
def test_a_host_is_slow(hosts, base, whole, tmp_path, strategy):
    hosts[1].slow()
    finish(fit(hosts[:2], base, tmp_path, strategy))
    assert_equal(newest(tmp_path), whole(strategy))


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("strategy", ["hsdp", "fsdp"])
def test_a_checkpoint_of_two_hosts_resumes_on_one_and_three(hosts, base, tmp_path, strategy, number):
    saved = interrupt(hosts[:2], base, tmp_path, strategy)
    path = max(tmp_path.rglob("*.ckpt"))
    for name in (strategy, "ddp"):
        copy = tmp_path / f"copy of {name}"
        script = ["tests/scripts/save_again.py", name, base, str(path), str(copy)]
        finish([host.start([*torchrun(number, PROCESSES[strategy]), *script]) for host in hosts[:number]])
        found = torch.load(copy, weights_only=False)
        assert found["global_step"] == saved["global_step"]
        for part in (lambda checkpoint: checkpoint["state_dict"], optimizer_state):
            torch.testing.assert_close(part(found), part(saved), rtol=0, atol=0)
    finish(fit(hosts[:number], base, tmp_path, strategy))
    assert newest(tmp_path)["global_step"] == 12


@pytest.mark.parametrize("unplugged", [False, True])
def test_a_run_goes_on_without_a_host_that_left(hosts, base, tmp_path, unplugged):
    """The global batch is half as large then, and the learning rate is the same: nothing scales it."""
    folder = tmp_path / "elastic"
    log = tmp_path / "log"
    arguments = ["--timeout=0.5"]  # a host that loses power closes no connection
    with log.open("w") as file:
        runs = fit(hosts[:2], base, folder, nodes="1:2", arguments=arguments, stdout=file)
        wait_for_checkpoint(folder, runs[0])
        if unplugged:
            hosts[1].cut()
        hosts[1].kill()
        time.sleep(5)  # an epoch that had ended is saved
        alone = shutil.copytree(folder, tmp_path / "alone")
        finish(runs[:1])
    left = newest(alone)
    end = newest(folder)
    assert left["global_step"] < end["global_step"] == 12
    assert [group["lr"] for group in end["optimizer_states"][0]["param_groups"]] == [5e-4]

    command = [sys.executable, *example("machines.py", base, alone)]
    expected = hosts[2].start(command, subprocess.PIPE).communicate()[0]
    assert_equal(newest(alone), end)
    (line,) = [line for line in expected.splitlines() if "step 12" in line]
    assert line in log.read_text() and line.startswith("1 ranks, step 12: train_loss")


@pytest.mark.parametrize("strategy", [*PROCESSES, "full"])
def test_bytes_that_a_host_sends_in_a_step(hosts, base, strategy):
    """The small messages of a step, and the headers of packets, are 8 KB of it."""
    command = [*torchrun(2, 2), "-m", "benchmarks.network", strategy, "--base", base]
    runs = [host.start(command, subprocess.PIPE) for host in hosts[:2]]
    for run in runs:
        (line,) = [line for line in run.communicate()[0].splitlines() if line.startswith("{")]
        row = json.loads(line)
        assert 0 <= row["counted"] - row["computed"] < 0.02 * row["computed"] + 10_000


def test_ray_starts_all_workers_again_when_a_host_was_killed(hosts, base, whole, tmp_path):
    pytest.importorskip("ray.train")
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", "--num-gpus=0"]
    join = [*start, "--address=10.77.0.1:6379", "--node-ip-address=10.77.0.2"]
    with tempfile.TemporaryDirectory(prefix="ray") as sessions:  # names of sockets are short
        head = [*start, "--head", "--node-ip-address=10.77.0.1", "--include-dashboard=false", f"--temp-dir={sessions}"]
        finish([hosts[0].start(head, RAY_USAGE_STATS_ENABLED="0")])
        finish([hosts[1].start(join)])
        command = [sys.executable, *example("machines_ray.py", base, tmp_path)]
        driver = hosts[0].start(command, RAY_ADDRESS="10.77.0.1:6379")
        wait_for_checkpoint(tmp_path, driver)
        hosts[1].kill()
        finish([hosts[1].start(join)])
        finish([driver])
        hosts[0].kill()
    assert_equal(newest(tmp_path), whole("ddp"))
