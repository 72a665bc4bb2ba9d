"""A Ray cluster of several nodes on this machine, each in a network namespace with an address of its own.

A namespace has its own network interface, so that nodes talk to each other over a network as machines do. The files and
the processors are shared. This needs root and the command `ip`.
"""

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
from processes import read_command
from server import wait_for

PORT = 6379
READY_S = 300.0
_OBJECT_STORE_BYTES = 400 << 20
_RAY = str(Path(sys.executable).with_name("ray"))


class Node:
    """One node of the cluster.

    Args:
        number: Number of the node; 0 is the head.
        cpus: Processors that the node offers to the cluster.
        dashboard: Start the dashboard on the head, which has the REST API of Serve.
    """

    def __init__(self, number: int, cpus: int, dashboard: bool = False):
        self.number = number
        self.address = f"10.77.0.{number + 1}"
        self.namespace = self.interface = f"cifar100-{number}"
        self._cpus = cpus
        self._dashboard = dashboard

    def command(self, *command: str) -> list[str]:
        """Return a command that runs in the namespace of the node."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def start(self) -> None:
        """Start Ray, as an operator does."""
        if self.number:
            where = ["--address", f"{Node(0, 0).address}:{PORT}"]
        else:
            where = ["--head", "--port", str(PORT)]
            where += ["--dashboard-host", self.address] if self._dashboard else ["--include-dashboard", "false"]
        where += ["--node-ip-address", self.address, "--num-cpus", str(self._cpus), "--num-gpus", "0"]
        where += ["--object-store-memory", str(_OBJECT_STORE_BYTES)]
        done = subprocess.run(
            self.command(_RAY, "start", *where, "--disable-usage-stats"),
            capture_output=True,
            text=True,
            timeout=READY_S,
        )
        if done.returncode:
            raise RuntimeError(f"node {self.number} does not start: {done.stderr or done.stdout}")

    def kill(self) -> None:
        """Kill all processes in the namespace with SIGKILL, as a machine that loses its power."""
        for process in self.processes():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def processes(self, title: str = "") -> list[int]:
        """Return the processes in the namespace whose command line contains a text."""
        listed = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True).stdout
        return [int(process) for process in listed.split() if title in read_command(int(process))]


class Nodes:
    """A cluster. As a context manager, it starts all nodes, and kills them at exit.

    Args:
        cpus: Processors that each node offers; the first node is the head.
        dashboard: Start the dashboard, see `Node`.
    """

    def __init__(self, cpus: Sequence[int], dashboard: bool = False):
        self.nodes = [Node(number, each, dashboard) for number, each in enumerate(cpus)]
        self.head = self.nodes[0]

    def __enter__(self) -> Self:
        try:
            _ip("link", "add", "cifar100", "type", "bridge")
            _ip("addr", "add", "10.77.0.254/24", "dev", "cifar100")
            _ip("link", "set", "cifar100", "up")
            for node in self.nodes:
                _ip("netns", "add", node.namespace)
                _ip("link", "add", node.interface, "type", "veth", "peer", "name", "eth0", "netns", node.namespace)
                _ip("link", "set", node.interface, "master", "cifar100", "up")
                _ip("-n", node.namespace, "addr", "add", f"{node.address}/24", "dev", "eth0")
                _ip("-n", node.namespace, "link", "set", "eth0", "up")
                _ip("-n", node.namespace, "link", "set", "lo", "up")
                node.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def delete_applications(self) -> None:
        """Delete all applications of Serve. Without this, they go on when their service has ended."""
        code = "import ray; from ray import serve; ray.init('auto'); serve.shutdown()"
        subprocess.run(self.head.command(sys.executable, "-W", "ignore", "-c", code), capture_output=True, check=True)

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        for node in reversed(self.nodes):
            node.kill()
            wait_for(lambda node=node: not node.processes(), READY_S)  # type: ignore[misc]
            for removed in (("link", "del", node.interface), ("netns", "del", node.namespace)):
                subprocess.run(["ip", *removed], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", "cifar100"], capture_output=True, check=False)


@contextmanager
def ray_environment() -> Iterator[None]:
    """Set the variables that all processes of a cluster need, with a new token."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_AUTH_MODE", "token")
        environment.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield


def can_make_namespaces() -> bool:
    """Return whether this process may make network namespaces, and interfaces and bridges between them."""
    name = "cifar-probe"
    made = (("netns", "add", name), ("link", "add", name, "type", "bridge"))
    pair = ("link", "add", f"{name}0", "type", "veth", "peer", "name", f"{name}1")
    try:
        return all(subprocess.run(["ip", *each], capture_output=True).returncode == 0 for each in (*made, pair))
    except OSError:
        return False
    finally:
        for each in (("netns", "del", name), ("link", "del", name), ("link", "del", f"{name}0")):
            with suppress(OSError):
                subprocess.run(["ip", *each], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
