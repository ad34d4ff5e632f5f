"""Scripts of tests in forks of the first process of pytest, which has imported torch and Lightning: 8 s less for each.

That process forks the server before it has a thread or runs a test. Each script is a process of its own, with the
arguments, environment, folder and outputs that it would have as `python -m`.
"""

import gc
import json
import os
import random
import runpy
import select
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable

ADDRESS = "LIGHTNING_QLORA_TESTS_FORKS"
LONGEST = 2**17  # bytes of a request


def start() -> None:
    """Start the server, which ends with this process; workers of pytest-xdist find it by the environment."""
    folder = tempfile.mkdtemp()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"{folder}/server")
    listener.listen(64)
    end, open_while_alive = os.pipe()
    if os.fork() == 0:
        os.close(open_while_alive)
        _end_with(_serve, listener, end, folder)
    listener.close()
    os.close(end)
    os.environ[ADDRESS] = f"{folder}/server"


def run(module: str, arguments: list[str], folder: str, environment: dict[str, str], outputs: list[int]) -> int:
    """The exit code of `python -m module` in a fork that writes to these files; it does not outlive this call."""
    request = json.dumps([module, arguments, folder, environment]).encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(os.environ[ADDRESS])
        socket.send_fds(connection, [request], outputs)
        group = int(connection.recv(64))
        try:
            return int(connection.recv(64))
        except BaseException:
            os.killpg(group, signal.SIGKILL)
            raise


def _serve(listener: socket.socket, end: int, folder: str) -> None:
    gc.freeze()  # else each fork copies what the collector counts
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who answer
    while end not in select.select([listener, end], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _end_with(_answer, connection)
        connection.close()
    shutil.rmtree(folder)


def _answer(connection: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request, outputs, *_ = socket.recv_fds(connection, LONGEST, 2)
    module, arguments, folder, environment = json.loads(request)
    script = os.fork()
    if script == 0:
        connection.close()
        os.setsid()
        for place, output in enumerate(outputs, start=1):
            os.dup2(output, place)
            os.close(output)
        sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__  # pytest has replaced them
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        random.seed()  # else all forks have one sequence
        sys.argv = [module, *arguments]
        _end_with(runpy.run_module, module, None, "__main__", True)
    connection.send(str(script).encode())
    connection.send(str(os.waitstatus_to_exitcode(os.waitpid(script, 0)[1])).encode())


def _end_with(main: Callable[..., object], *arguments: object) -> None:
    """End this process after `main`, without what its parent would do at the end of the interpreter."""
    code = 0
    try:
        main(*arguments)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
