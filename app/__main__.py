"""Runs the service: `python -m app --help`."""

import sys
from typing import Annotated

import typer
from pydantic import ValidationError

from app import logs, workers
from app.settings import Settings


def main(
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="0 takes a free one.", show_default="8000")] = None,
    worker: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
) -> None:
    """Serve the models of the store. Further settings are environment variables, see app/settings.py."""
    try:
        settings = Settings()
    except ValidationError as error:
        faults = (f"{'_'.join(map(str, ('CIFAR100', *each['loc']))).upper()}: {each['msg']}" for each in error.errors())
        sys.exit("; ".join(faults))
    update = {"host": host or settings.host, "port": settings.port if port is None else port}
    count = settings.workers or workers.processors()
    if count > 1 and sys.platform != "linux":
        sys.exit("several workers need Linux: CIFAR100_WORKERS=1")
    settings = settings.model_copy(update=update | {"workers": count})
    logs.configure(settings.log_style, settings.log_level)
    if count > 1 and not worker:
        try:
            listening = workers.listener(settings.host, settings.port)
        except OSError as error:
            sys.exit(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}")
        sys.exit(workers.Supervisor(count, listening, settings.drain_s).run())
    from app.server import serve  # all that the supervisor does without

    sys.exit(serve(settings, supervised=worker))


def cli() -> None:
    """Entry point of the console command."""
    typer.run(main)


if __name__ == "__main__":
    cli()
