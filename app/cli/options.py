"""Options that several commands share, and the service or the local folders that they name."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.server.startup import read_settings
from app.settings import Settings
from training.console import working
from training.errors import ReportedError, UsageError
from training.store import ModelCard, Store, open_store

if TYPE_CHECKING:  # httpx takes 0.2 s to import, and local work does not need it
    from app.cli.local import LocalService
    from app.client import Client
    from app.local import LocalModel

_PROBE_S = 5.0  # timeout of the first request to a service


class Unreachable(ReportedError):
    """No service answers."""

    exit_status = os.EX_UNAVAILABLE


Server = Annotated[
    str | None,
    typer.Option(
        "--server",
        metavar="URL",
        envvar="CIFAR100_SERVER",
        help="A running service, also unix:PATH. Without it, the command works on this machine.",
        rich_help_panel="Where",
    ),
]
Key = Annotated[
    str | None,
    typer.Option(
        "--key",
        metavar="KEY",
        envvar="CIFAR100_API_KEY",
        help="API key of the service. Better give it in the variable.",
        rich_help_panel="Where",
    ),
]
Models = Annotated[
    str | None,
    typer.Option(
        "--models",
        metavar="FOLDER|URL",
        envvar="CIFAR100_MODELS",
        help="The model store: a folder, or a URL such as s3://bucket/models. Default: models.",
        rich_help_panel="Where",
    ),
]
Runs = Annotated[
    Path | None,
    typer.Option(
        "--runs",
        metavar="FOLDER",
        envvar="CIFAR100_RUNS",
        help="Folder of the training jobs on this machine. Default: runs.",
        rich_help_panel="Where",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME[/VERSION]",
        help="Model or version. Default: that of the service, or else a live cascade or the most accurate live model.",
    ),
]


def require_local(context: typer.Context, *names: str) -> None:
    """Refuse options on the command line that have no meaning for a service.

    Args:
        context: Context of the command.
        names: Names of their parameters.

    Raises:
        UsageError: One of them is given.
    """
    given = [param.opts[0] for param in context.command.params if param.name in names and is_given(context, param.name)]
    if given:
        raise UsageError(f"{' and '.join(given)} cannot be used with a service; leave out --server and CIFAR100_SERVER")


def is_given(context: typer.Context, name: str) -> bool:
    """Return whether a parameter has its value from the command line, not from a variable or its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def split_version(text: str | None) -> tuple[str | None, int | None]:
    """Split NAME or NAME/VERSION into its parts.

    Raises:
        UsageError: The version is not a number.
    """
    name, slash, number = (text or "").partition("/")
    if slash and not (name and number.isdecimal()):
        raise UsageError(f"{text!r} is not NAME or NAME/VERSION, such as resnet18/5")
    return name or None, int(number) if slash else None


def require_version(text: str) -> tuple[str, int]:
    """Split NAME/VERSION into its parts.

    Raises:
        UsageError: The text has another form.
    """
    name, version = split_version(text)
    if name is None or version is None:
        raise UsageError(f"{text!r} names no version; give NAME/VERSION, such as resnet18/5")
    return name, version


def local_settings(**folders: str | Path | None) -> Settings:
    """Return the settings of this machine, with the folders that options name.

    Raises:
        StartupError: A setting is invalid.
    """
    return read_settings({name: str(folder) for name, folder in folders.items() if folder is not None})


def find_card(settings: Settings, model: str | None) -> tuple[Store, ModelCard]:
    """Return the store of this machine and the card of a version.

    Args:
        settings: Model store and default model.
        model: NAME, NAME/VERSION, or None for the version that a service would answer with.

    Raises:
        StoreError: There is no such store or version.
    """
    store = open_store(settings.models)
    wanted = model or settings.default_model
    return store, store.card(*store.parse(wanted)) if wanted else store.default_card()


def load_local(model: str | None, models: str | None) -> "LocalModel":
    """Load a version from the store of this machine, as a service with the same settings would.

    The arguments and errors are those of `find_card` and `local_settings`.
    """
    settings = local_settings(models=models)
    store, card = find_card(settings, model)
    with working(f"loading {card.name}/{card.version}"):
        from app.local import LocalModel
        from training.runtimes import selection

        return LocalModel(card, selection.load_version(store, card, settings.device, settings.runtime), settings)


@contextmanager
def connect(
    context: typer.Context, server: str | None, key: str | None, models: str | None, runs: Path | None = None
) -> "Iterator[Client | LocalService]":
    """Open the service that --server names, or else the store and the runs folder of this machine.

    Raises:
        ReportedError: There is no service at this address.
    """
    if server:
        with open_client(context, server, key) as client:
            yield client
        return
    from app.cli.local import LocalService

    service = LocalService(local_settings(models=models, runs=runs))
    try:
        yield service
    finally:
        service.close()


@contextmanager
def open_client(context: typer.Context, server: str, key: str | None) -> "Iterator[Client]":
    """Open a client of a service, once the service has answered.

    Raises:
        UsageError: An option applies to local folders only, or the address is invalid.
        ReportedError: There is no service at this address.
    """
    require_local(context, "models", "runs")
    import httpx

    from app.client import Client, ServiceError

    socket = server.removeprefix("unix:") if server.startswith("unix:") else None
    url = "http://localhost" if socket else server if "://" in server else f"http://{server}"

    def make_client(**limits: float) -> Client:
        return Client(url, api_key=key, transport=httpx.HTTPTransport(uds=socket) if socket else None, **limits)

    try:
        with working(f"connecting to {server}"), make_client(timeout_s=_PROBE_S, budget_s=0) as probe:
            if "uptime_s" not in probe.health():
                raise ValueError("another form")
    except httpx.InvalidURL as error:
        raise UsageError(f"--server {server}: {error}") from None
    except (ServiceError, ValueError, TypeError) as error:
        if isinstance(error, ServiceError) and error.status is None:
            hint = "start one with 'cifar100 serve', or give another --server"
            raise Unreachable(f"no service answers at {server} ({error}); {hint}") from error
        answer = f"{error.status} {error.title}" if isinstance(error, ServiceError) else error
        raise ReportedError(f"{server} is no service ({answer} for GET /health); give another --server") from error
    with make_client() as client:
        yield client
