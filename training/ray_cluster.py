"""Connect this process to a Ray cluster.

This module needs the extra `ray`. Import it before any other module that imports Ray, because Ray reads environment
variables when it is imported.
"""

import logging
import os
import signal
import socket
import threading
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from training.errors import ReportedError

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# A thread of Serve would start further clusters after the end of this one.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")

import ray
from ray.exceptions import RayError

LOCAL = "local"
"""Address that starts a cluster on this machine, which ends with this process."""

NAMESPACE = "cifar100"

_REACH_S = 10.0
_TEMPORARY = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray")  # noqa: S108  Ray's own default
_OBJECT_STORE_BYTES = 400 << 20  # holds the data set of a training run


class ClusterError(ReportedError, ConnectionError):
    """There is no cluster at an address, or it does not answer."""


_connections: list[str] = []  # addresses to which `connect` has connected this process


def connect(address: str) -> None:
    """Connect to a cluster, or start one on this machine. Do nothing if this process is connected.

    The processes of a local cluster end with the thread that started them. Ray replaces the handler of SIGTERM, which
    this function restores.

    Args:
        address: `local`, `auto` for the cluster whose node runs on this machine, or host:port of the head node.

    Raises:
        ClusterError: There is no cluster at the address, or it does not answer.
    """
    if ray.is_initialized():
        return
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    options: dict[str, Any] = {"address": address}
    if address == LOCAL:
        options |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    # It warns that a local cluster uses tokens.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    try:
        _check_reachable(address)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            ray.init(namespace=NAMESPACE, log_to_driver=False, logging_level=logging.WARNING, **options)
    except (RayError, OSError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ClusterError(f"cannot connect to the Ray cluster {address}: {reason}") from error
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, handler)
    _connections.append(address)


def _check_reachable(address: str) -> None:
    """Connect to the head node's port once, because Ray itself tries for minutes.

    Raises:
        OSError: Nothing answers at the address.
    """
    if address == "auto":  # Ray keeps the address of the node that runs on this machine in a file
        address = os.environ.get("RAY_ADDRESS", "")
        with suppress(OSError):
            address = address or (_TEMPORARY / "ray_current_cluster").read_text().strip()
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _REACH_S).close()


def disconnect() -> None:
    """End the connection of `connect`, and a local cluster. A connection that other code has made stays."""
    if _connections:
        _connections.clear()
        ray.shutdown()
