"""Changes to torch's log and to how Python prints warnings, each with the reason and what would remove it."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def silence_fake_tensor_log() -> Iterator[None]:
    """Turn off torch's log of errors on tensors without data.

    Upstream: torch/_subclasses/fake_tensor.py logs the traceback of an error before it raises the error.
    Why: `estimate_memory` raises the same error with a message of one line.
    Removed by: an option of FakeTensorMode that turns the log off.
    """
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def print_warnings_in_one_line() -> None:
    """Print warnings of the command line as `lightning-qlora: warning: ...`, without file and source line.

    Upstream: Python's warnings.py, showwarning, which its documentation says may be replaced by assignment.
    Removed by: nothing; the process of the command line is ours.
    """

    def show(message: Any, *_: Any, **__: Any) -> None:
        print(f"lightning-qlora: warning: {message}", file=sys.stderr)

    warnings.showwarning = show
