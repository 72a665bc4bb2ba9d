"""Test the options of `cifar100 serve`, which are made from the settings."""

import os
from pathlib import Path
from typing import Any

import pytest
from command_line import refused, typed
from typer.main import get_command

from app import logs
from app.cli import serve as module
from app.cli.main import cli
from app.server import serve as server
from app.settings import Settings

COMMAND: Any = get_command(cli)
OPTIONS = {parameter.name: parameter for parameter in COMMAND.commands["serve"].params}


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings of the services that the test has started. None of them serves or changes the process."""
    started: list[Settings] = []

    def run(settings: Settings, sockets: Any, _: Any) -> int:
        for each in sockets:
            each.close()
        started.append(settings)
        return 0

    monkeypatch.setattr(server, "serve", run)
    monkeypatch.setattr(module, "handle_stop_signals", lambda _: None)
    monkeypatch.setattr(logs, "configure", lambda *_: None)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # the command changes it
    (tmp_path / "resnet" / "1").mkdir(parents=True)
    (tmp_path / "resnet" / "1" / "card.json").touch()
    monkeypatch.setenv("CIFAR100_MODELS", str(tmp_path))
    return started


def test_every_setting_is_an_option_with_a_description_and_a_panel() -> None:
    assert set(OPTIONS) == {*Settings.model_fields, "worker"}
    for name, field in Settings.model_fields.items():
        option = OPTIONS[name]
        assert f"--{name.replace('_', '-')}" in option.opts
        assert option.rich_help_panel
        assert " ".join((field.description or "-").split()) in option.help
    assert OPTIONS["log_level"].type_descriptor.choices
    assert OPTIONS["port"].help.endswith("Default: 8000.")


def test_an_option_precedes_its_variable_and_reaches_the_workers(served: list[Settings]) -> None:
    result = typed("serve", "--port", "0", "--max-queue", "7", CIFAR100_MAX_QUEUE="9", CIFAR100_MAX_BATCH="8")
    assert result.exit_code == 0, result.output
    (settings,) = served
    assert (settings.max_queue, settings.max_batch) == (7, 8)


def test_options_are_variables_of_the_processes_that_the_service_starts(served: list[Settings]) -> None:
    key = "0123456789abcdef"
    assert typed("serve", "--port", "0", "--predict-needs-key", "--api-keys", key).exit_code == 0
    assert (os.environ["CIFAR100_PREDICT_NEEDS_KEY"], os.environ["CIFAR100_API_KEYS"]) == ("True", key)
    assert served[0].predict_needs_key


@pytest.mark.parametrize(
    ("words", "status", "fault"),
    [
        (("--port", "http"), 2, "--port: Input should be a valid integer"),
        (("--max-queue", "0"), 2, "--max-queue: Input should be greater than 0"),
        (("--api-keys", "short-secret"), 2, "--api-keys: Value should have at least 16 items"),
        (("--runtime", "tpu"), 2, "Invalid value for '--runtime'"),
        (("--predict-needs-key",), 1, "CIFAR100_PREDICT_NEEDS_KEY needs CIFAR100_API_KEYS"),
        (("--default-model", "none"), 1, "there is no model 'none'"),
    ],
)
def test_an_invalid_option_prevents_the_start(
    words: tuple[str, ...], status: int, fault: str, served: list[Settings]
) -> None:
    error = refused(status, "serve", *words)
    assert fault in error
    assert "short-secret" not in error
    assert not served


def test_the_key_of_a_client_is_not_taken_for_the_keys_of_the_service(served: list[Settings]) -> None:
    key = "0123456789abcdef"
    assert "CIFAR100_API_KEYS" in refused(1, "serve", "--port", "0", CIFAR100_API_KEY=key)
    result = typed("serve", "--port", "0", CIFAR100_API_KEY=key, CIFAR100_API_KEYS=key)
    assert result.exit_code == 0, result.output
    assert len(served) == 1
