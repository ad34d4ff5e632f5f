"""Processes that are forks of the one of the test: they have what it replaced."""

import os
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from typing import IO

import torch

from lightning_qlora.kernels import verdict


def _fork(call, *arguments):
    """A fork that ends with 0 if the call returns something true. It has one thread: those of its parent are gone."""

    def run():
        torch.set_num_threads(1)
        sys.exit(not call(*arguments))

    child = get_context("fork").Process(target=run)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: of the parent's threads
        child.start()
    return child


def in_forks(number, call):
    """The exit codes of forks that do call(rank) at the same time, a minute at most: 0 if it returns something true."""
    children = [_fork(call, rank) for rank in range(number)]
    for child in children:
        child.join(60)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    return codes


def start_in_fork(device: torch.device, ops: list[str]) -> tuple[Callable[[], object], IO[str]]:
    """In place of `verdict.start`."""
    read, write = os.pipe()

    def run() -> None:
        with os.fdopen(write, "w") as output, ThreadPoolExecutor(1) as pool:  # torch's modes are those of a thread
            pool.submit(verdict.check, str(device), ops, output).result()

    child = _fork(run)
    os.close(write)
    return child.kill, os.fdopen(read)
