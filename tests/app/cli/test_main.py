"""Test what all commands have in common: options, exit statuses, errors in one line, and imports."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import refused, typed
from typer.main import get_command

from app import version
from app.cli import images
from app.cli.main import cli

CONSOLE = [sys.executable, "-c", "from app.cli.main import cli; cli(prog_name='cifar100')"]

LIGHT = """
import sys
from typer.testing import CliRunner
from app.cli.main import cli
for words in (["--version"], ["--help"], ["serve", "--help"], ["train", "--help"], ["models", "list"], ["jobs", "list"],
              ["predict", "a.jpg", "--server", "127.0.0.1:1"], ["models", "list", "--server", "127.0.0.1:1"]):
    CliRunner().invoke(cli, words)
assert "torch" not in sys.modules
print(CliRunner().invoke(cli, ["models", "list", "--server", "127.0.0.1:1"]).exit_code)
"""


def list_commands(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Iterate over all commands below a group, each with its words."""
    for name, each in getattr(command, "commands", {}).items():
        yield from list_commands(each, (*words, name))
    if not hasattr(command, "commands"):
        yield words, command


COMMANDS = dict(list_commands(get_command(cli)))


def test_every_command_but_serve_prints_json_and_describes_its_parameters() -> None:
    assert {("predict",), ("models", "compare"), ("jobs", "follow"), ("data", "check"), ("doctor",)} <= set(COMMANDS)
    for words, command in COMMANDS.items():
        options = {name for parameter in command.params for name in parameter.opts}
        assert ("--json" in options) == (words != ("serve",)), words
        assert command.help, words
        for parameter in command.params:
            assert parameter.help or parameter.hidden, (words, parameter.name)


def test_version_and_help_have_no_escape_codes() -> None:
    assert typed("--version").stdout == f"cifar100 {version()}\n"
    for words in ((), ("--help",), ("models",), ("serve", "--help")):
        result = typed(*words)
        assert result.exit_code == (0 if "--help" in words else 2)
        assert "Usage: cifar100" in result.stdout
        assert "\x1b" not in result.output


@pytest.mark.slow
def test_help_and_calls_to_a_service_do_not_import_pytorch(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", LIGHT], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{os.EX_UNAVAILABLE}\n", "")


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (("prdict",), "No such command 'prdict'. Did you mean 'predict'?; see 'cifar100 --help'"),
        (("predict",), "Missing argument 'FILE...'; see 'cifar100 predict --help'"),
        (("predict", "a.jpg", "--top"), "No such option: --top (Possible options: --top-k)"),
        (("predict", "a.jpg", "--top-k", "0"), "Invalid value for '--top-k'"),
        (("models", "promote", "resnet"), "'resnet' names no version; give NAME/VERSION"),
        (("models", "show", "resnet/new"), "'resnet/new' is not NAME or NAME/VERSION"),
        (("train", "resnet", "epoch=3"), "a recipe has no field 'epoch'; did you mean epochs?"),
        (("evaluate", "--photos", "a.zip", "--limit", "3"), "--split and --limit choose images of the data set"),
        (("evaluate", "--flip", "--server", "localhost"), "--flip cannot be used with a service"),
        (("models", "list", "--models", ".", "--server", "localhost"), "--models cannot be used with a service"),
        (("models", "list", "--server", "http://localhost:http"), "--server http://localhost:http: Invalid port"),
    ],
)
def test_wrong_usage_is_one_line_with_status_2(words: tuple[str, ...], fault: str) -> None:
    assert fault in refused(2, *words)


@pytest.mark.parametrize(
    "words",
    [("predict", "a.jpg"), ("evaluate",), ("models", "list"), ("cascade",), ("familiarity", "resnet")],
)
def test_a_folder_without_a_store_is_named(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, environment in (("models", {}), ("elsewhere", {"CIFAR100_MODELS": "elsewhere"})):
        fault = f"there is no model store {tmp_path / folder}; name one by --models or CIFAR100_MODELS"
        assert refused(1, *words, **environment) == fault
    assert not list(tmp_path.iterdir())


def test_an_unexpected_error_is_one_line_and_has_a_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise TypeError("a\nbug")

    monkeypatch.setattr(images, "_read", fail)
    assert refused(1, "predict", "a.jpg") == "TypeError: a bug; add --debug for the traceback"
    for words in (("--debug", "predict", "a.jpg"), ("predict", "a.jpg", "--debug")):
        result = typed(*words)
        assert result.exit_code == 1
        assert result.stderr.startswith("Traceback")
        assert result.stderr.endswith("error: TypeError: a bug; add --debug for the traceback\n")


def test_ctrl_c_ends_with_status_130_and_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(images, "_read", interrupt)
    result = typed("predict", "a.jpg")
    assert (result.exit_code, result.output) == (130, "")


@pytest.mark.slow
def test_a_reader_that_has_gone_gets_no_message() -> None:
    with subprocess.Popen([*CONSOLE, "serve", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_an_address_without_a_service_has_a_status_of_its_own() -> None:
    fault = refused(os.EX_UNAVAILABLE, "models", "list", "--server", "127.0.0.1:1")
    assert fault.startswith("no service answers at 127.0.0.1:1 (ConnectError: [Errno 111] Connection refused)")
