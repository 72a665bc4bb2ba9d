"""Run `cifar100` in process, with words as users type them."""

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from app.cli.main import cli


def typed(*words: str | Path, stdin: bytes | None = None, **environment: Any) -> Result:
    """Run a command. Its output is not on a terminal.

    Args:
        words: Words after `cifar100`.
        stdin: Content of stdin.
        environment: Environment variables to set.
    """
    return CliRunner().invoke(cli, [str(word) for word in words], input=stdin, env=environment, prog_name="cifar100")


def answered(*words: str | Path, **options: Any) -> Any:
    """Run a command with --json and return its stdout. Its exit status must be 0."""
    result = typed(*words, "--json", **options)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(status: int, *words: str | Path, **options: Any) -> str:
    """Run a command that must fail with this exit status. Return its error, which must be one line without result."""
    result = typed(*words, **options)
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    *progress, error = result.stderr.splitlines()
    assert all(line.endswith("...") for line in progress)
    assert error.startswith("error: ")
    return error.removeprefix("error: ")
