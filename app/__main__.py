"""Runs the service from the command line: `python -m app --help`."""

import signal
import sys
from typing import Annotated

import typer

from app import logs, workers
from app.signals import exit_at_once, on_stop
from app.startup import StartupError, check_store, listen, read_settings


def main(
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="0 takes a free one.", show_default="8000")] = None,
    worker: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
) -> None:
    """Serve the models of the store. Further settings are environment variables, see app/settings.py."""
    on_stop(signal.SIG_IGN if worker else exit_at_once)
    line = workers.Line.of_stdin() if worker else None
    try:
        settings = read_settings()
        address = {"host": host or settings.host, "port": settings.port if port is None else port}
        settings = settings.model_copy(update=address)
        logs.configure(settings.log_style, settings.log_level)
        sockets = []
        if not line:
            settings = settings.model_copy(update={"workers": workers.choose_count(settings.workers)})
            check_store(settings)
            sockets = listen(settings.host, settings.port)
    except StartupError as error:
        sys.exit(str(error))
    if settings.workers > 1 and not line:
        sys.exit(workers.Supervisor(settings, sockets).run())
    from app.server import serve  # imports PyTorch, which the supervisor does not need

    sys.exit(serve(settings, sockets, line))


def cli() -> None:
    """Run the console command."""
    typer.run(main)


if __name__ == "__main__":
    cli()
