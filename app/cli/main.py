"""`cifar100`: the console command of the project. `cifar100 --help` lists the commands."""

import os
from collections.abc import Callable
from typing import Annotated

import typer
from typing_extensions import override

from app import version as package_version
from app.cli import data, jobs, models
from app.cli.doctor import doctor
from app.cli.evaluate import evaluate
from app.cli.images import explain, predict
from app.cli.serve import serve
from training import __main__ as training
from training.console import CommandGroup, Debug, out
from training.encoding import restart_in_utf8_mode
from training.errors import ReportedError


class _Cli(CommandGroup):
    """The root of all commands. It also knows the errors of the client and of the decoder."""

    @override
    def describe(self, error: Exception) -> tuple[str, int]:
        if isinstance(error, ReportedError | typer.TyperException | OSError):
            return super().describe(error)
        import httpx

        from app.client import ServiceError
        from app.exceptions import Problem

        match error:
            case ServiceError(__cause__=httpx.TransportError()):
                return str(error), os.EX_UNAVAILABLE
            case ServiceError(status=401):
                return f"{error.detail}; give it by --key or CIFAR100_API_KEY", 1
            case ServiceError(status=429 | 503):
                return error.detail, os.EX_TEMPFAIL
            case ServiceError() | Problem():
                return error.detail, 1
        return super().describe(error)


cli = typer.Typer(cls=_Cli)


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"cifar100 {package_version()}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")]


@cli.callback()
def start(
    version: Version = False,  # noqa: ARG001  `_print_version` reads it
    debug: Debug = False,  # noqa: ARG001  CommandGroup reads it
) -> None:
    """Train, export, serve, measure and retrain CIFAR-100 residual networks."""
    restart_in_utf8_mode()


_COMMANDS: dict[str, tuple[Callable[..., None], ...]] = {
    "Classify and measure": (predict, explain, evaluate),
    "Serve": (serve, doctor),
    "Train": (training.train, training.export, training.cascade, training.familiarity, training.recipes),
}
for panel, commands in _COMMANDS.items():
    for command in commands:
        cli.command(rich_help_panel=panel)(command)
for group in (models, jobs, data):
    cli.add_typer(group.cli, rich_help_panel="Manage")
