"""Runs the service: `python -m app --help`."""

import asyncio
import ctypes
import gc
import signal
import socket
import sys
from functools import partial
from types import FrameType
from typing import Annotated

import typer
import uvicorn
from fastapi import FastAPI

from app import logs
from app.main import create_app
from app.protocol import BoundedHttp
from app.settings import Settings

_STOP_S = 20

# Names and numbers of glibc's malloc.h
_M_TRIM_THRESHOLD, _TRIM_BYTES = -1, 16 << 20
_M_MMAP_THRESHOLD, _MMAP_BYTES = -3, 4 << 20


class DrainingServer(uvicorn.Server):
    """Goes on for a while after SIGTERM, not ready any more, so that load balancers notice before it is gone.

    Args:
        app: what it serves.
        config: how.
        drain_s: how long; a second signal ends it.
    """

    def __init__(self, app: FastAPI, config: uvicorn.Config, drain_s: float):
        super().__init__(config)
        self._services = app.state.services
        self._drain_s = drain_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # What has been made so far stays: looking through it for garbage would stop the service for 0.1 s every second.
        gc.collect()
        gc.freeze()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        draining, self._services.draining = self._services.draining, True
        if sig == signal.SIGTERM and self._drain_s and not draining:
            asyncio.get_running_loop().call_later(self._drain_s, super().handle_exit, sig, frame)
        else:
            super().handle_exit(sig, frame)


def bound_malloc() -> None:
    """Have glibc return the memory of what was large; left alone, it learns to keep ever larger blocks."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)


def main(
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="0 takes a free one.", show_default="8000")] = None,
) -> None:
    """Serve the models of the store. Further settings are environment variables, see app/settings.py."""
    settings = Settings()
    settings = settings.model_copy(
        update={"host": host or settings.host, "port": settings.port if port is None else port}
    )
    bound_malloc()
    logs.configure(settings.log_style, settings.log_level)
    # uvicorn drains on SIGTERM and then raises it again; a drained service has ended well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=partial(BoundedHttp, sheds=app.state.services.sheds),  # type: ignore[arg-type]  # called, never inherited
        ws="none",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=settings.trusted_proxies,
        timeout_graceful_shutdown=_STOP_S,
    )
    DrainingServer(app, config, settings.drain_s).run()


def cli() -> None:
    """Entry point of the console command."""
    typer.run(main)


if __name__ == "__main__":
    cli()
