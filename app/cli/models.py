"""`cifar100 models`: list, show, compare, promote, roll back, delete, download and upload versions."""

import json
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.options import Key, Models, Server, connect, open_client, require_version, split_version
from training.console import CommandGroup, Json, make_table, out, print_json, print_table, working
from training.errors import ReportedError, UsageError
from training.recipes import RECIPES, format_value, rename_former_fields
from training.store import CARD, Promotion

if TYPE_CHECKING:
    from app.cli.local import LocalService
    from app.client import Client, ModelSummary

cli = typer.Typer(name="models", cls=CommandGroup, help="List, show, compare, promote, move and delete versions.")

Version = Annotated[str, typer.Argument(metavar="NAME/VERSION", help="A version, such as resnet18/5.")]
NameOrVersion = Annotated[str, typer.Argument(metavar="NAME[/VERSION]", help="A version, or the live one of a model.")]

Card = dict[str, Any]
"""The card of a version as JSON, see `training.store.ModelCard`."""

_EXTREMES = 5  # classes that a comparison names in each direction


@cli.command("list")
def list_models(
    context: typer.Context, server: Server = None, key: Key = None, models: Models = None, as_json: Json = False
) -> None:
    """List the models, their versions, and the test accuracy of the live ones."""
    with connect(context, server, key, models) as service:
        rows = [_make_row(service, each) for each in service.models()]
    if as_json:
        print_json(rows)
        return
    table = make_table("model", "live", "test top-1", "versions", "error")
    for row in rows:
        versions = ", ".join(map(str, row["versions"]))
        table.add_row(row["name"], str(row["live"] or "-"), _percent(row["test_top1"]), versions, row["error"] or "")
    print_table(table)


def _make_row(service: "Client | LocalService", model: "ModelSummary") -> dict[str, Any]:
    card = service.card(model.name, model.live) if model.live and not model.error else None
    return {
        "name": model.name,
        "live": model.live,
        "versions": list(model.versions),
        "test_top1": card["test"]["top1"] if card else None,
        "error": model.error,
    }


@cli.command()
def show(
    context: typer.Context,
    version: NameOrVersion,
    server: Server = None,
    key: Key = None,
    models: Models = None,
    as_json: Json = False,
) -> None:
    """Show the card of a version. --json prints all of it."""
    with connect(context, server, key, models) as service:
        card = _read_card(service, version)
    if as_json:
        print_json(card)
        return
    table = make_table()
    for name, value in _describe(card).items():
        table.add_row(name, value)
    print_table(table)


@cli.command()
def compare(
    context: typer.Context,
    first: NameOrVersion,
    second: NameOrVersion,
    server: Server = None,
    key: Key = None,
    models: Models = None,
    as_json: Json = False,
) -> None:
    """Compare two versions: measures, recipes, and the classes whose accuracy differs most."""
    with connect(context, server, key, models) as service:
        cards = [_read_card(service, version) for version in (first, second)]
    if cards[0]["classes"] != cards[1]["classes"]:
        raise ReportedError(f"{first} and {second} have other classes than each other and cannot be compared")
    comparison = _compare(cards[0], cards[1])
    if as_json:
        print_json(comparison)
    else:
        _print_comparison(comparison)


@cli.command()
def promote(
    context: typer.Context,
    version: Version,
    server: Server = None,
    key: Key = None,
    models: Models = None,
    as_json: Json = False,
) -> None:
    """Make a version live. Running services on the store serve it within about a second."""
    with connect(context, server, key, models) as service:
        summary = service.promote(*require_version(version))
    _print_live(summary, as_json)


@cli.command()
def rollback(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model.")],
    server: Server = None,
    key: Key = None,
    models: Models = None,
    as_json: Json = False,
) -> None:
    """Make the newest version before the live one live."""
    with connect(context, server, key, models) as service:
        model = _find_model(service, name)
        earlier = [version for version in model.versions if model.live and version < model.live]
        if not earlier:
            raise ReportedError(
                f"{name} has no version before the live one, {model.live}; it has {_join(model.versions)}"
            )
        summary = service.promote(name, earlier[-1])
    _print_live(summary, as_json)


@cli.command()
def delete(
    context: typer.Context,
    version: Version,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    server: Server = None,
    key: Key = None,
    models: Models = None,
    as_json: Json = False,
) -> None:
    """Delete a version for good. The live version, the newest one and those in use are kept."""
    name, number = require_version(version)
    with connect(context, server, key, models) as service:
        service.card(name, number)  # an unknown version fails before the question
        if not yes:
            if not sys.stdin.isatty():
                raise UsageError("there is no terminal to confirm at; add --yes")
            typer.confirm(f"Delete {version} for good?", abort=True, err=True)
        summary = service.delete_version(name, number)
    if as_json:
        print_json({"name": summary.name, "live": summary.live, "versions": list(summary.versions)})
    else:
        out.print(f"deleted {version}; {name} has {_join(summary.versions)}")


@cli.command()
def download(
    context: typer.Context,
    version: NameOrVersion,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="The zip to write. Default: NAME-VERSION.zip.")
    ] = None,
    server: Server = None,
    key: Key = None,
    models: Models = None,
    as_json: Json = False,
) -> None:
    """Write a zip of the card and the files of a version, for 'cifar100 models upload'."""
    with connect(context, server, key, models) as service:
        card = _read_card(service, version)
        file = output or Path(f"{card['name']}-{card['version']}.zip")
        with working(f"downloading {card['name']}/{card['version']}"):
            content = service.download_version(card["name"], card["version"])
    file.write_bytes(content)
    if as_json:
        print_json({"name": card["name"], "version": card["version"], "file": str(file), "bytes": len(content)})
    else:
        out.print(f"{card['name']}/{card['version']} is in {file}")


@cli.command()
def upload(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The zip of 'cifar100 models download'.")],
    promote: Annotated[Promotion, typer.Option(help="When the new version goes live.")] = "never",
    server: Server = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Publish a version on a service that accepts uploads. The service checks it first."""
    if not server:
        raise UsageError("a service checks and publishes the version; name it by --server or CIFAR100_SERVER")
    name = _read_name(file)
    with open_client(context, server, key) as client, working(f"waiting for the check of {file}"):
        uploaded = client.upload_version(name, file, promote=promote)
    if as_json:
        print_json({"name": uploaded.name, "version": uploaded.version, "live": uploaded.live, "check": uploaded.check})
    else:
        state = "live" if uploaded.live else "not live"
        out.print(f"{uploaded.name}/{uploaded.version} is published and {state}")


def _read_name(file: Path) -> str:
    """Return the name of the model in the card of a zip.

    Raises:
        ReportedError: The file is no such zip.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return str(json.loads(archive.read(CARD))["name"])
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError) as error:
        raise ReportedError(f"{file} is no zip of 'cifar100 models download': {error}") from error


def _find_model(service: "Client | LocalService", name: str) -> "ModelSummary":
    """Return the summary of a model.

    Raises:
        ReportedError: There is no such model.
    """
    found = {model.name: model for model in service.models()}
    if name not in found:
        raise ReportedError(f"there is no model {name!r}; there are: {', '.join(found) or 'none'}")
    return found[name]


def _read_card(service: "Client | LocalService", text: str) -> Card:
    """Read the card of NAME/VERSION, or of the live version of NAME."""
    name, version = split_version(text)
    if name is None:
        raise UsageError("a version is NAME or NAME/VERSION, such as resnet18/5")
    if version is None:
        version = _find_model(service, name).live
    if version is None:
        raise ReportedError(f"{name} has no live version; give NAME/VERSION")
    return service.card(name, version)


def _print_live(model: "ModelSummary", as_json: bool) -> None:
    if as_json:
        print_json({"name": model.name, "live": model.live, "versions": list(model.versions)})
    else:
        out.print(f"{model.name}/{model.live} is live")


def _describe(card: Card) -> dict[str, str]:
    """Return the lines of a card by their names."""
    lines = {
        "version": f"{card['name']}/{card['version']}",
        "created": card["created"],
        "recipe": _format_recipe(card["recipe"]),
        "test": _format_measures(card["test"]),
    }
    if int8 := card["int8"]:
        lines["int8"] = _format_measures(int8["test"]) if int8["test"] else "not accepted"
    if cascade := card["cascade"]:
        lines["members"] = f"{' and '.join(cascade['members'])}; {cascade['test_sent_on']:.1%} are sent on"
    if familiarity := card["familiarity"]:
        lines["familiar"] = f"score of at least {familiarity['threshold']:.3f}"
    lines |= {
        "parameters": f"{card['parameters']:,}",
        "trained": f"{card['training_seconds']:,.0f} s on {card['device']}",
        "libraries": ", ".join(f"{name} {number}" for name, number in card["libraries"].items()),
        "commit": card["commit"] or "unknown",
        "files": ", ".join(card["files"]),
    }
    return lines | ({"notes": card["notes"]} if card["notes"] else {})


def _format_recipe(recipe: dict[str, Any]) -> str:
    """Return the name of a recipe and the fields that differ from it."""
    name = recipe.get("name", "unknown")
    original = RECIPES[name].model_dump(mode="json") if name in RECIPES else {"name": name}
    changed = {field: value for field, value in rename_former_fields(recipe).items() if value != original.get(field)}
    return " ".join([name, *(f"{field}={_format(value)}" for field, value in changed.items())])


def _format(value: Any) -> str:
    return format_value(tuple(value) if isinstance(value, list) else value)


def _format_measures(measures: dict[str, Any]) -> str:
    return (
        f"top-1 {measures['top1']:.2%}, top-5 {measures['top5']:.2%}, loss {measures['loss']:.4f}, "
        f"ECE {measures['ece']:.2%} on {measures['images']:,} images"
    )


def _compare(first: Card, second: Card) -> dict[str, Any]:
    """Return the measures of two cards, the fields of their recipes that differ, and the accuracy of each class."""
    pair = (first, second)
    recipes = [card["recipe"] for card in pair]
    fields = [field for field in {**recipes[0], **recipes[1]} if recipes[0].get(field) != recipes[1].get(field)]
    accuracies = zip(first["classes"], first["test"]["per_class"], second["test"]["per_class"], strict=True)
    measured = [each for each in accuracies if None not in each]
    int8 = [card["int8"] and card["int8"]["test"] for card in pair]
    return {
        "versions": [f"{card['name']}/{card['version']}" for card in pair],
        "test": {name: [card["test"][name] for card in pair] for name in ("top1", "top5", "loss", "ece", "images")},
        "int8_top1": [each and each["top1"] for each in int8],
        "parameters": [card["parameters"] for card in pair],
        "same_data": first["data"] == second["data"],
        "recipe": {field: [recipe.get(field) for recipe in recipes] for field in fields},
        "classes": [
            {"label": label, "top1": [before, after]}
            for label, before, after in sorted(measured, key=lambda each: each[1] - each[2])
        ],
    }


def _print_comparison(comparison: dict[str, Any]) -> None:
    test = comparison["test"]
    table = make_table("", *comparison["versions"])
    for name, title in (("top1", "test top-1"), ("top5", "test top-5")):
        table.add_row(title, *map(_percent, test[name]))
    table.add_row("test loss", *(f"{value:.4f}" for value in test["loss"]))
    table.add_row("test ECE", *map(_percent, test["ece"]))
    table.add_row("int8 test top-1", *map(_percent, comparison["int8_top1"]))
    table.add_row("parameters", *(f"{value:,}" for value in comparison["parameters"]))
    for field, values in comparison["recipe"].items():
        table.add_row(field, *("-" if value is None else _format(value) for value in values))
    print_table(table)
    if not comparison["same_data"]:
        out.print("They were trained and measured on different data sets, so their measures cannot be compared.")
    out.print()
    classes = comparison["classes"]
    table = make_table("class", *comparison["versions"], "difference")
    shown = classes if len(classes) <= 2 * _EXTREMES else classes[:_EXTREMES] + classes[-_EXTREMES:]
    for each in shown:
        before, after = each["top1"]
        table.add_row(each["label"], _percent(before), _percent(after), f"{after - before:+.2%}")
    print_table(table)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _join(versions: tuple[int, ...]) -> str:
    return f"the versions {', '.join(map(str, versions))}"
