"""Runs the service from the command line: `python -m app --help`. It is the command `cifar100 serve`."""

import typer

from app.cli.serve import serve
from training.console import Command

cli = typer.Typer(add_completion=False)
cli.command(cls=Command)(serve)

if __name__ == "__main__":
    cli(prog_name="python -m app")
