"""The service as a process that listens: one server, alone or one of several workers.

In: settings, and for a worker connections.  Out: an exit status, once it was told to end and requests are answered.
"""

import asyncio
import ctypes
import gc
import logging
import os
import resource
import signal
import socket
import sys
from contextlib import suppress
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI
from typing_extensions import override
from uvicorn.config import STARTUP_FAILURE

from app import workers
from app.connections import ConnectionTable
from app.main import create_app
from app.protocol import BoundedHttp
from app.settings import Settings

log = logging.getLogger(__name__)

_STOP_S = 20
_MAX_CONNECTIONS = 900
_OTHER_FILES = 120  # descriptors of a process for all but connections

# Names and numbers of glibc's malloc.h
_M_TRIM_THRESHOLD, _TRIM_BYTES = -1, 16 << 20
_M_MMAP_THRESHOLD, _MMAP_BYTES = -3, 4 << 20


class DrainingServer(uvicorn.Server):
    """Goes on for a while after SIGTERM, not ready any more, so that load balancers notice before it is gone.

    Args:
        app: what it serves.
        config: how.
        drain_s: how long; a second signal ends it.
        supervised: whether it takes connections and orders from its supervisor, see `app.workers`, instead of listening
            and of signals.
    """

    def __init__(self, app: FastAPI, config: uvicorn.Config, drain_s: float, supervised: bool):
        super().__init__(config)
        self._services = app.state.services
        self._drain_s = drain_s
        self._line = socket.socket(fileno=os.dup(sys.stdin.fileno())) if supervised else None
        self._adopting: set[asyncio.Task[None]] = set()

    @override
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._line:
            log.info("running on http://%s:%d", self.config.host, self.config.port)
            self._line.setblocking(False)
            asyncio.get_running_loop().add_reader(self._line, self._obey, self._line)
            self._beat(self._line)
        # What has been made so far stays: looking through it for garbage would stop the service for 0.1 s every second.
        gc.collect()
        gc.freeze()

    @override
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._line:
            return
        if sig == signal.SIGTERM and not self._services.draining and self._drain_s:
            self._services.draining = True
            asyncio.get_running_loop().call_later(self._drain_s, self._end, signal.SIGTERM)
        else:
            self._end(sig, frame)

    def _beat(self, line: socket.socket) -> None:
        with suppress(OSError):  # the supervisor may be busy with something else, or gone
            line.send(workers.BEAT)
        asyncio.get_running_loop().call_later(workers.BEAT_S, self._beat, line)

    def _obey(self, line: socket.socket) -> None:
        """Take what the supervisor has sent: connections and orders, and the end of it as the last one."""
        loop = asyncio.get_running_loop()
        order = workers.CONNECTION
        while order:
            try:
                order, connections, _, _ = socket.recv_fds(line, 1, 1, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            except ConnectionResetError:  # a supervisor that was killed before it read the last beat
                break
            for descriptor in connections:
                task = loop.create_task(self._adopt(socket.socket(fileno=descriptor)))
                self._adopting.add(task)
                task.add_done_callback(self._adopting.discard)
            if order == workers.DRAIN:
                self._services.draining = True
        loop.remove_reader(line)
        self._end(signal.SIGTERM)

    async def _adopt(self, connection: socket.socket) -> None:
        """Serve a connection that the supervisor has accepted."""
        loop = asyncio.get_running_loop()
        protocol = self.config.http_protocol_class(  # type: ignore[call-arg]  # as `super().startup` makes them
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state, _loop=loop
        )
        with suppress(OSError):  # its client may have gone
            await loop.connect_accepted_socket(lambda: protocol, connection)

    def _end(self, sig: int, frame: FrameType | None = None) -> None:
        self._services.draining = True
        super().handle_exit(sig, frame)


def serve(settings: Settings, supervised: bool = False) -> int:
    """Serve until a signal comes, or as a worker until its supervisor says so.

    Args:
        settings: address included.
        supervised: whether as a worker, see `app.workers`.

    Returns:
        The exit status.
    """
    _bound_malloc()
    descriptors = _allow_files()
    if supervised:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    else:
        # uvicorn drains on SIGTERM and then raises it again; a drained service has ended well.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    app = create_app(settings)
    table = ConnectionTable(max(1, min(_MAX_CONNECTIONS, descriptors - _OTHER_FILES)), settings.trusted_proxies)
    http = partial(BoundedHttp, sheds=app.state.services.sheds, table=table)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=http,  # type: ignore[arg-type]  # called, never inherited
        ws="none",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=settings.trusted_proxies,
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=_STOP_S,
    )
    server = DrainingServer(app, config, settings.drain_s, supervised)
    server.run([] if supervised else None)
    return 0 if server.started else STARTUP_FAILURE


def _allow_files() -> int:
    """Raise the number of file descriptors that this process may open to the most that it can get, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # of a system that calls more than it gives unlimited
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def _bound_malloc() -> None:
    """Have glibc return the memory of what was large; left alone, it learns to keep ever larger blocks."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)
