"""Hosts on this machine, each with a network, processes and a name of its own: Linux namespaces. Root is needed.

    python -m tests.hosts 2 torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint host0:29400 SCRIPT

runs the command on host0 and host1. Hosts see the files of this machine. They end with the process that made them,
however it ends.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
UNSHARE = ("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
BOOT = 'hostname "$0" && mount --bind "$1" /etc/hosts && ip link set lo up && echo ready && exec cat'
TORCHRUN = {
    "GLOO_SOCKET_IFNAME": "eth0",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


class Namespaces:
    """Namespaces of Linux that end with their first process: `cat`, which ends when nobody can write to it."""

    def __init__(self, name: str, names: Path) -> None:
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.outer = subprocess.Popen([*UNSHARE, "sh", "-c", BOOT, name, str(names)], cwd=ROOT, text=True, **pipes)
        if self.outer.stdout.readline() != "ready\n":
            raise OSError(self.outer.communicate()[1].strip())
        self.pid = Path(f"/proc/{self.outer.pid}/task/{self.outer.pid}/children").read_text().strip()

    def end(self) -> None:
        """Return when all processes inside are dead: the kernel kills them with the first."""
        os.kill(int(self.pid), signal.SIGKILL)
        self.outer.communicate()

    def command(self, *words: str) -> list[str]:
        return ["nsenter", "--target", self.pid, "--all", f"--wd={ROOT}", *words]

    def net(self, command: str) -> None:
        """Run a command in this network, among the processes of this machine."""
        subprocess.run(["nsenter", "--target", self.pid, "--net", *command.split()], check=True)


class Host(Namespaces):
    """host0 is 10.77.0.1, host1 10.77.0.2, and so on; its interface `eth0` leads to a switch."""

    def __init__(self, number: int, switch: Namespaces, names: Path) -> None:
        super().__init__(f"host{number}", names)
        self.switch = switch
        self.port = f"port{number}"
        switch.net(f"ip link add {self.port} type veth peer name eth0 netns {self.pid}")
        switch.net(f"ip link set {self.port} master switch up")
        self.net(f"ip address add 10.77.0.{number + 1}/24 dev eth0")
        self.net("ip link set eth0 up")

    def start(self, command: list[str], stdout: object = None, **environment: str) -> subprocess.Popen:
        """Start a command on the host."""
        variables = {**os.environ, **TORCHRUN, **environment}
        return subprocess.Popen(self.command(*command), stdout=stdout, text=True, env=variables)

    def kill(self) -> None:
        """Kill all processes of the host. The others see that its connections are closed, unless it was cut off."""
        subprocess.run(self.command("sh", "-c", "kill -s KILL -- -1"), check=True)

    def cut(self) -> None:
        self.switch.net(f"ip link set {self.port} down")

    def mend(self) -> None:
        self.switch.net(f"ip link set {self.port} up")

    def slow(self) -> None:
        """Send each packet 20 ms later; without netem in the kernel, send at most 20 Mbit in a second."""
        try:
            self.net("tc qdisc add dev eth0 root netem delay 20ms")
        except subprocess.CalledProcessError:
            self.net("tc qdisc add dev eth0 root tbf rate 20mbit burst 32kb latency 400ms")


@contextmanager
def connected(number: int) -> Iterator[list[Host]]:
    """Make hosts with a switch between them.

    Raises:
        OSError, CalledProcessError: If this process or this kernel can't make them. Root can on most machines.
    """
    hosts: list[Host] = []
    with tempfile.TemporaryDirectory() as folder:
        names = Path(folder, "hosts")
        names.write_text("127.0.0.1 localhost\n" + "".join(f"10.77.0.{n + 1} host{n}\n" for n in range(number)))
        switch = Namespaces("switch", names)
        try:
            switch.net("ip link add switch type bridge")
            switch.net("ip link set switch up")
            for n in range(number):
                hosts.append(Host(n, switch, names))
            yield hosts
        finally:
            for each in (*hosts, switch):
                each.end()


def main(number: str, *command: str) -> int:
    with connected(int(number)) as hosts:
        runs = [host.start(list(command)) for host in hosts]
        return max(run.wait() for run in runs)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
