"""The attack on files, threads and arguments: a small one, and a long one with `make test-all`; tests/record.md."""

import os
import random

import pytest
import torch

from tests.attack.__main__ import ATTACKS, run

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork") or torch.cuda.is_available(), reason="forks after a backward pass"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(autouse=True)
def _one_thread():
    """A forked process has no other thread of torch's pool."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


LONG = ("kills at random moments of a training", "soak")  # what each does once takes seconds


@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in LONG])
def test_a_small_attack(name, tmp_path):
    print(f"seed 0: {run(name, 0, 0.4, tmp_path)}")


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", ATTACKS)
def test_a_long_attack(name, tmp_path):
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    print(run(name, seed, 25, tmp_path))
