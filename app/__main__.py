"""Runs the service from the command line: `python -m app --help`."""

import signal
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from app import logs
from app.server import workers
from app.server.signals import call_at_exit, exit_immediately, handle_stop_signals
from app.server.startup import StartupError, check_store, listen, read_settings
from app.server.unix_socket import listen_on_unix_socket
from app.settings import Settings
from training.encoding import restart_in_utf8_mode


def main(
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="0 takes a free one.", show_default="8000")] = None,
    uds: Annotated[Path | None, typer.Option(help="Unix socket to listen on, instead of host and port.")] = None,
    worker: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
) -> None:
    """Serve the models of the store. Further settings are environment variables, see app/settings.py."""
    restart_in_utf8_mode()
    handle_stop_signals(signal.SIG_IGN if worker else exit_immediately)
    link = workers.SupervisorLink.from_stdin() if worker else None
    try:
        settings = read_settings()
        options = {"host": host, "port": port, "uds": uds}
        settings = settings.model_copy(
            update={name: value for name, value in options.items() if value not in (None, "")}
        )
        logs.configure(settings.log_style, settings.log_level)
        sockets = []
        if not link:
            settings = settings.model_copy(update={"workers": workers.choose_count(settings.workers)})
            check_store(settings)
            sockets = _listen(settings)
    except StartupError as error:
        sys.exit(str(error))
    if settings.workers > 1 and not link:
        sys.exit(workers.Supervisor(settings, sockets).run())
    from app.server.serve import serve  # imports PyTorch, which the supervisor does not need

    sys.exit(serve(settings, sockets, link))


def _listen(settings: Settings) -> list[socket.socket]:
    """Listen on the unix socket if there is one, else on host and port."""
    if not settings.uds:
        return listen(settings.host, settings.port)
    listening = listen_on_unix_socket(settings.uds)
    call_at_exit(listening.close)
    return [listening]


def cli() -> None:
    """Run the console command."""
    typer.run(main)


if __name__ == "__main__":
    cli()
