"""Runs the service: `python -m app --help`."""

import logging
import signal
import sys
from typing import Annotated

import typer
import uvicorn

from app.main import create_app
from app.settings import Settings

_DRAIN_S = 20


def main(
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="0 takes a free one.", show_default="8000")] = None,
) -> None:
    """Serve the models of the store. Further settings are environment variables, see app/settings.py."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    settings = Settings()
    settings = settings.model_copy(
        update={"host": host or settings.host, "port": settings.port if port is None else port}
    )
    # uvicorn drains on SIGTERM and then raises it again; a drained service has ended well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    uvicorn.run(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=_DRAIN_S,
    )


def cli() -> None:
    """Entry point of the console command."""
    typer.run(main)


if __name__ == "__main__":
    cli()
