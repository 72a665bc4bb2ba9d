"""Runs one server process, either alone or as one of several workers.

Input: settings and, for a worker, connections from its supervisor. Output: an exit status, after the process was told
to stop and the requests in progress are answered.
"""

import asyncio
import gc
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI
from typing_extensions import override
from uvicorn.config import STARTUP_FAILURE

from app.machine import bound_malloc
from app.main import create_app
from app.server import workers
from app.server.connections import ConnectionTable
from app.server.protocol import BoundedHttp
from app.server.signals import exit_immediately, exit_process, exit_status, handle_stop_signals
from app.server.startup import format_address
from app.settings import Settings

log = logging.getLogger(__name__)

_STOP_S = 20
_LEAVE_S = 7.0  # a training process has 3 s to stop and is killed within another 3 s
_MAX_CONNECTIONS = 900
_OTHER_FILES = 120  # file descriptors that are not connections


class DrainingServer(uvicorn.Server):
    """A server that keeps serving for some seconds after SIGTERM while it reports that it is not ready.

    Load balancers notice this and stop sending requests before the server exits.

    Args:
        app: Application to serve.
        config: uvicorn configuration.
        drain_s: Seconds to keep serving after SIGTERM.
        link: A worker's connection to its supervisor, see `app.server.workers`. The worker takes connections and orders
            from it instead of from listening sockets and signals. None for a server without a supervisor.
    """

    def __init__(self, app: FastAPI, config: uvicorn.Config, drain_s: float, link: workers.SupervisorLink | None):
        super().__init__(config)
        self._services = app.state.services
        self._drain_s = drain_s
        self._link = link
        self._connecting: set[asyncio.Task[None]] = set()
        self._exiting: asyncio.Task[None] | None = None
        self.signals: list[int] = []
        """Signals received so far."""

    @override
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening in sockets or ():
            log.info("running on %s", format_address(listening.getsockname()))
        if self._link:
            log.info("running on %s", format_address(self.config.uds or (self.config.host, self.config.port)))
            self._link.finish_loading()
            self._link.socket.setblocking(False)
            asyncio.get_running_loop().add_reader(self._link.socket, self._read_orders, self._link.socket)
            self._beat(self._link)
        # Objects created so far live as long as the process. Without the freeze, garbage collection would scan them and
        # pause the service for 0.1 s every second.
        gc.collect()
        gc.freeze()

    @override
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install no handlers, because `serve` does. uvicorn raises signals again at exit and does not know SIGHUP."""
        yield

    @override
    def handle_exit(self, sig: int, frame: FrameType | None = None) -> None:
        """Handle a signal. A worker ignores signals until it stops; then its supervisor sends one to hurry it."""
        if self._link and not self.should_exit:
            return
        self.signals.append(sig)
        if not self.started or self._exiting:
            exit_immediately(sig)
        asyncio.get_running_loop().call_soon_threadsafe(self._stop, sig)  # the threadsafe call wakes the loop

    def _stop(self, sig: int) -> None:
        """React to a signal: the first one drains, SIGINT or a second one stops, a further one exits at once."""
        if self.should_exit:
            self._exiting = self._exiting or asyncio.create_task(self._exit_now())
        elif self._drain_s and sig != signal.SIGINT and not self._services.draining:
            self._services.draining = True
            asyncio.get_running_loop().call_later(self._drain_s, self._end)
        else:
            self._end()

    async def _exit_now(self) -> None:
        """Exit without waiting for requests. Stop the training process first, as it would outlive the server."""
        try:
            async with asyncio.timeout(_LEAVE_S):
                await self._services.training_runner.stop()
        finally:
            exit_process(exit_status(self.signals))

    def _beat(self, link: workers.SupervisorLink) -> None:
        link.beat(workers.BEAT)
        asyncio.get_running_loop().call_later(workers.BEAT_S, self._beat, link)

    def _read_orders(self, link: socket.socket) -> None:
        """Read connections and orders from the supervisor. The end of the stream stops the worker."""
        loop = asyncio.get_running_loop()
        order = workers.CONNECTION
        while order:
            try:
                order, connections, _, _ = socket.recv_fds(link, 1, 1, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            except ConnectionResetError:  # the supervisor was killed before it read the last heartbeat
                break
            for descriptor in connections:
                task = loop.create_task(self._serve_connection(socket.socket(fileno=descriptor)))
                self._connecting.add(task)
                task.add_done_callback(self._connecting.discard)
            if order == workers.DRAIN:
                self._services.draining = True
        loop.remove_reader(link)
        self._end()

    async def _serve_connection(self, connection: socket.socket) -> None:
        """Serve a connection that the supervisor has accepted."""
        loop = asyncio.get_running_loop()
        protocol = self.config.http_protocol_class(  # type: ignore[call-arg]  # same arguments as in `super().startup`
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state, _loop=loop
        )
        with suppress(OSError):  # the client may have disconnected
            await loop.connect_accepted_socket(lambda: protocol, connection)

    def _end(self) -> None:
        self._services.draining = True
        self.should_exit = True


def serve(settings: Settings, listening: Sequence[socket.socket], link: workers.SupervisorLink | None = None) -> int:
    """Serve until a signal or, in a worker, the supervisor stops the process.

    Args:
        settings: Limits and folders.
        listening: Listening sockets from `app.server.startup.listen`, or a unix socket. Empty for a worker.
        link: A worker's connection to its supervisor.

    Returns:
        The exit status.
    """
    bound_malloc()
    if settings.cluster and not _connect(settings.cluster):
        return STARTUP_FAILURE
    descriptors = _allow_files()
    app = create_app(settings)
    table = ConnectionTable(max(1, min(_MAX_CONNECTIONS, descriptors - _OTHER_FILES)), settings.trusted_proxies)
    services = app.state.services
    http = partial(
        BoundedHttp,
        should_shed=services.shedder.should_shed,
        exceeds_share=services.shedder.exceeds_share,
        count_refusal=services.metrics.count_refusal,
        table=table,
        root_path=settings.root_path,
    )
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        uds=os.fspath(settings.uds) if settings.uds else None,
        http=http,  # type: ignore[arg-type]  # uvicorn only calls it
        ws="none",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,  # app.middleware.proxy applies them
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=_STOP_S,
    )
    server = DrainingServer(app, config, settings.drain_s, link)
    handle_stop_signals(server.handle_exit)
    server.run(list(listening))
    handle_stop_signals(exit_immediately)  # the threads that still run have nothing to save
    return exit_status(server.signals) if server.started else STARTUP_FAILURE


def _connect(cluster: str) -> bool:
    """Connect to the Ray cluster at an address. Return False if that fails."""
    from training import ray_cluster

    try:
        ray_cluster.connect(cluster)
    except ray_cluster.ClusterError as error:
        log.error("CIFAR100_CLUSTER: %s", error)
        return False
    return True


def _allow_files() -> int:
    """Raise the limit of open file descriptors to the hard limit, and return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # some systems report "unlimited" but grant less
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft
