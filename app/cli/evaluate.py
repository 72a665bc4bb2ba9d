"""`cifar100 evaluate`: measure a version on the data set, or on labeled photos."""

import threading
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.options import (
    Key,
    Models,
    Server,
    find_card,
    load_local,
    local_settings,
    open_client,
    require_local,
    split_version,
)
from training.__main__ import LOADING, Data, Flip, Int8, Split, print_measurement
from training.console import Json, out, print_json, working
from training.errors import UsageError

if TYPE_CHECKING:
    from app.client import Evaluation
    from training.commands import Measurement


def evaluate(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(metavar="[NAME[/VERSION]]", help="Model or version. Default: as for predict.")
    ] = None,
    photos: Annotated[
        Path | None,
        typer.Option(metavar="FILE.zip", help="A zip with a folder of photos for each class, instead of the data set."),
    ] = None,
    split: Split = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Number of images of the split. Default: all.")] = None,
    int8: Int8 = False,
    flip: Flip = False,
    data_source: Data = None,
    server: Server = None,
    key: Key = None,
    models: Models = None,
    as_json: Json = False,
) -> None:
    """Measure a version on the data set or on your own photos.

    On this machine, a model computes in float32, a cascade with the engines that serve. A service uses its own engines.
    """
    if photos and (limit or split != "test"):
        raise UsageError("--split and --limit choose images of the data set; a zip is measured whole")
    if photos and int8:
        raise UsageError("photos are measured with the engine that serves; set CIFAR100_RUNTIME=int8 instead of --int8")
    if server:
        require_local(context, "int8", "flip", "data_source")
        if split == "validation":
            raise UsageError("a service measures on the test or the train split; leave out --server for this one")
        name, version = split_version(model)
        with open_client(context, server, key) as client, working("the service measures"):
            source = None if photos else split
            evaluation = client.evaluate(photos, model=name, version=version, split=source, limit=limit)
        _print_evaluation(evaluation, as_json)
        return
    measured = (
        _measure_photos(photos, model, models, flip)
        if photos
        else _measure_split(model, models, data_source, split, limit, int8, flip)
    )
    if as_json:
        print_json(measured.model_dump(mode="json"))
    else:
        print_measurement(measured, flip)


def _measure_split(
    model: str | None, models: str | None, data: str | None, split: Split, limit: int | None, int8: bool, flip: bool
) -> "Measurement":
    store, card = find_card(local_settings(models=models), model)
    with working(LOADING):
        from training import commands
    return commands.measure(store, card, data, split, int8=int8, flip=flip, limit=limit)


def _measure_photos(photos: Path, model: str | None, models: str | None, flip: bool) -> "Measurement":
    """Measure a version on the photos of a zip, with the decoder and the engine of the service."""
    with photos.open("rb") as file:
        local = load_local(model, models)
        from app.jobs.labeled_images import read_zip
        from training import commands, dataset

        with working(f"reading {photos}"):
            labeled = read_zip(local_settings(), file, local.card.classes, threading.Event())
    images = dataset.Split(labeled.images.transpose(0, 2, 3, 1), labeled.labels)
    return commands.measure_images(local.card, local.engine, images, "zip", flip=flip)


def _print_evaluation(evaluation: "Evaluation", as_json: bool) -> None:
    if as_json:
        print_json(asdict(evaluation))
    elif result := evaluation.result:
        out.print(
            f"{evaluation.model}/{evaluation.version} on {result.images} {evaluation.split} images: "
            f"top-1 {result.top1:.2%}, top-5 {result.top5:.2%}, loss {result.loss:.4f}, ECE {result.ece:.2%} "
            f"({evaluation.engine})"
        )
