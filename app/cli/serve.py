"""`cifar100 serve` and `python -m app`: every setting of the service is an option.

The options are made from `app.settings.Settings`, so a new setting is an option as well.
"""

import inspect
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from app import logs
from app.server import workers
from app.server.signals import call_at_exit, exit_immediately, handle_stop_signals
from app.server.startup import StartupError, check_store, listen, read_settings
from app.server.unix_socket import listen_on_unix_socket
from app.settings import Settings
from training.encoding import restart_in_utf8_mode

# First setting of each panel of the help. A setting belongs to the panel of the nearest one above it in `Settings`.
_PANELS = {
    "host": "Address",
    "workers": "Processes",
    "api_keys": "Access",
    "log_style": "Logs",
    "drain_s": "Connections",
    "models": "Folders",
    "device": "Models",
    "max_image_bytes": "Limits of requests",
    "max_batch": "Batches",
    "store_poll_s": "Store and evaluations",
    "jobs": "Training jobs",
}


def serve(worker: bool, **options: Any) -> None:
    """Serve the models of the store.

    Every option is also an environment variable, such as CIFAR100_PORT for --port. An option precedes its variable.

    Give API keys and the database in their variables, because other users of the machine can read options.
    """
    restart_in_utf8_mode()
    handle_stop_signals(signal.SIG_IGN if worker else exit_immediately)
    link = workers.SupervisorLink.from_stdin() if worker else None
    given = {name: str(value) for name, value in options.items() if value is not None}
    settings = read_settings(given)
    if os.environ.get("CIFAR100_API_KEY") and not settings.api_keys:
        raise StartupError(
            "CIFAR100_API_KEY is the key that commands send to a service; give the keys of this one in "
            "CIFAR100_API_KEYS, or unset CIFAR100_API_KEY"
        )
    os.environ.update({f"CIFAR100_{name.upper()}": value for name, value in given.items()})  # for the workers
    logs.configure(settings.log_style, settings.log_level)
    sockets = []
    if not link:
        settings = settings.model_copy(update={"workers": workers.choose_count(settings.workers)})
        check_store(settings)
        sockets = _listen(settings)
    if settings.workers > 1 and not link:
        sys.exit(workers.Supervisor(settings, sockets).run())
    from app.server.serve import serve as run  # imports PyTorch, which the supervisor does not need

    sys.exit(run(settings, sockets, link))


def _listen(settings: Settings) -> list[socket.socket]:
    """Listen on the unix socket if there is one, else on host and port."""
    if not settings.uds:
        return listen(settings.host, settings.port)
    listening = listen_on_unix_socket(settings.uds)
    call_at_exit(listening.close)
    return [listening]


def _make_parameters() -> Iterator[inspect.Parameter]:
    """Make a parameter of `serve` for every setting, and the hidden option of a worker process."""
    panel = ""
    for name, field in Settings.model_fields.items():
        panel = _PANELS.get(name, panel)
        option = typer.Option(
            help=_describe(field),
            metavar=_type_name(field),
            show_default=False,
            rich_help_panel=panel,
        )
        kind: Any = field.annotation if field.annotation is bool or _is_choice(field) else str
        yield inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
        )
    hidden = Annotated[bool, typer.Option("--worker", hidden=True)]
    yield inspect.Parameter("worker", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=hidden)


def _is_choice(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is Literal


def _type_name(field: FieldInfo) -> str | None:
    """Return the type of a setting in the help. None leaves it to typer."""
    if field.annotation is bool or _is_choice(field):
        return None
    kinds = {field.annotation, *get_args(field.annotation)}
    return next((f"<{kind.__name__}>".lower() for kind in (int, float, Path) if kind in kinds), "<text>")


def _describe(field: FieldInfo) -> str:
    """Return the description of a setting, with its default if the description does not name it."""
    text = " ".join((field.description or "").split())
    if field.default is False or field.default in (None, (), ""):
        return text
    return f"{text} Default: {field.default}."


serve.__signature__ = inspect.Signature(list(_make_parameters()))  # type: ignore[attr-defined]
