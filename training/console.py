"""This module gives all commands one form: results on stdout, progress and errors on stderr, and an exit status.

A failure is one line on stderr, and with --debug its traceback as well. The exit status is 0, 1 for a failure, 2 for
wrong usage, 130 after Ctrl-C, or that of the `ReportedError`.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup
from typing_extensions import override

from training.encoding import replace_surrogates
from training.errors import WRONG_USAGE, ReportedError

Item = TypeVar("Item")

FAILED = 1
"""Exit status of a command that failed."""
STOPPED = 130
"""Exit status of a command that Ctrl-C or SIGTERM ended."""

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Print the traceback of an error, too. May stand anywhere.")]

out = Console(markup=False, highlight=False, soft_wrap=True)
err = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)

_PATIENCE_S = 1.0  # work that takes longer is shown
_LINE_S = 5.0  # interval of progress lines without a terminal
_PIPE_WIDTH = 160  # columns of a table without a terminal


def print_json(value: Any) -> None:
    """Print a result as JSON."""
    print(json.dumps(value, indent=2))


def make_table(*columns: str) -> Table:
    """Return a table without lines. Without columns, it has no header either."""
    return Table(*columns, box=None, pad_edge=False, show_header=bool(columns))


def print_table(table: Table) -> None:
    """Print a table. Without a terminal, it has no spaces at the ends of its lines, and not the width of a terminal."""
    if out.is_terminal:
        out.print(table)
        return
    width = None if "COLUMNS" in os.environ else _PIPE_WIDTH
    console = Console(width=width, markup=False, highlight=False)
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def print_error(message: str) -> None:
    """Print an error as one line on stderr."""
    err.print(f"error: {replace_surrogates(' '.join(message.splitlines()))}", style="red")


@contextmanager
def working(message: str) -> Iterator[None]:
    """Show on stderr that work goes on: a spinner on a terminal, elsewhere a line after one second."""
    if _is_animated():
        with err.status(Text(message)):
            yield
        return
    timer = threading.Timer(_PATIENCE_S, err.print, (f"{message} ...",))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # a line that is being printed comes before the next one


def track(items: Iterable[Item], total: int, message: str) -> Iterator[Item]:
    """Iterate over items and show the progress on stderr: a bar on a terminal, elsewhere a line every few seconds."""
    if _is_animated():
        from rich.progress import track as show

        yield from show(items, message, total, console=err, transient=True)
        return
    shown = time.monotonic() - _LINE_S + _PATIENCE_S
    for done, item in enumerate(items):
        if time.monotonic() - shown >= _LINE_S:
            shown = time.monotonic()
            err.print(f"{message}: {done} of {total}")
        yield item


def _is_animated() -> bool:
    return err.is_terminal and not err.is_dumb_terminal


class CommandGroup(TyperGroup):
    """A group of commands that ends every failure with one line on stderr."""

    def describe(self, error: Exception) -> tuple[str, int]:
        """Return the text for the user and the exit status."""
        return _describe(error)

    @override
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            typer.echo(ctx.get_help())
            raise typer.Exit(WRONG_USAGE)
        return super().parse_args(ctx, args)

    @override
    def main(self, args: Sequence[str] | None = None, *_: Any, **options: Any) -> Any:
        _run(super().main, self.describe, args, options)


class Command(TyperCommand):
    """A command without a group that ends every failure with one line on stderr."""

    @override
    def main(self, args: Sequence[str] | None = None, *_: Any, **options: Any) -> Any:
        _run(super().main, _describe, args, options)


def _run(
    main: Callable[..., Any],
    describe: Callable[[Exception], tuple[str, int]],
    args: Sequence[str] | None,
    options: dict[str, Any],
) -> None:
    """Run a command, and exit with its status."""
    words = list(sys.argv[1:] if args is None else args)
    with_traceback = "--debug" in words
    try:
        status = main([word for word in words if word != "--debug"], **options | {"standalone_mode": False})
        _flush()
    except Exception as error:
        if with_traceback:
            traceback.print_exc()
        message, status = describe(error)
        print_error(message)
    sys.exit(status if isinstance(status, int) else 0)


def _flush() -> None:
    """Flush stdout. If its reader has gone, the rest of the output is dropped."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)


def _describe(error: Exception) -> tuple[str, int]:
    match error:
        case ReportedError():
            return str(error), error.exit_status
        case typer.TyperException():  # an unknown option, or a value of a wrong type
            context = getattr(error, "ctx", None)
            hint = f"; see '{context.command_path} --help'" if context else ""
            return error.format_message().rstrip(".") + hint, error.exit_code
        case OSError(filename=str() | bytes() as file):
            return f"{os.fsdecode(file)}: {error.strerror}", FAILED
        case OSError():
            return str(error), FAILED
        case MemoryError():
            return "out of memory", FAILED
        case typer.Abort():
            return "aborted", FAILED
        case _:
            return f"{type(error).__name__}: {error}; add --debug for the traceback", FAILED
