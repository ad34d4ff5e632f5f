"""The tests marked `gpu`, by folder: how many passed, and which failed."""

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from benchmarks.gpu_cells import Row
from benchmarks.measure import ROOT


class Results:
    """A pytest plugin that collects the outcome of each test."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called for set-up, call and tear-down of each test."""
        if report.failed:
            self.failures.append(f"{report.nodeid}: {str(report.longrepr)[-600:]}")
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1


def training(device: torch.device, small: bool) -> Iterator[Row]:
    """Tests of the plugin."""
    yield from _run("tests/plugin/test_gpu.py", "tests/plugin/test_gpu_bytes.py")


def kernels(device: torch.device, small: bool) -> Iterator[Row]:
    """Tests of the ops; compute-sanitizer is a separate cell."""
    yield from _run("tests/kernels", "-k", "not sanitizer")


def optim(device: torch.device, small: bool) -> Iterator[Row]:
    """Tests of paging."""
    yield from _run("tests/optim")


def _run(*arguments: str) -> Iterator[Row]:
    results = Results()
    options = ["-v", "--tb=short", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-m", "gpu"]
    status = pytest.main([*options, *arguments], plugins=[results])
    for failure in results.failures:
        yield {"failure": failure}
    yield {"tests": dict(results.counts)}
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {status!r}.")
