"""Runs work in forked processes, which may be killed; torch and Lightning are imported once."""

import os
import signal
import sys
import time
import traceback
from pathlib import Path

import lightning_qlora

PACKAGE = str(Path(lightning_qlora.__file__).parent)


def start(work):
    """Fork a process that runs `work`; its id. It ends with 0, or with 1 and its traceback if `work` raises."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(pid):
    """Exit code of a process when it has ended; the negative signal if it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(work):
    """Run `work` in a process; its exit code."""
    return ended(start(work))


def kill_later(work, ready, share):
    """Run `work` in a process and kill it; whether it had not ended before.

    `ready()` says whether the process has come so far; `share`: of the time that this took, how long to wait after it.
    """
    begin = time.perf_counter()
    pid = start(work)
    while not ready() and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.001)
    time.sleep(share * (time.perf_counter() - begin))
    os.kill(pid, signal.SIGKILL)
    return ended(pid) == -signal.SIGKILL


def exit_at_line(work, number):
    """Run `work` in a process that ends at once before a line of the package is executed; whether it got there."""

    def traced():
        left = number

        def trace(frame, event, _):
            nonlocal left
            if not frame.f_code.co_filename.startswith(PACKAGE):
                return None
            if event == "line":
                left -= 1
                if left < 0:
                    os._exit(9)
            return trace

        sys.settrace(trace)
        work()

    code = run(traced)
    assert code in (0, 9), code
    return code == 9


def lines_of(work):
    """How many lines of the package `work` executes."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return count
