"""`cifar100 predict` and `cifar100 explain`."""

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.style import Style
from rich.text import Text

from app.cli.options import Key, Model, Models, Server, load_local, local_settings, open_client, split_version
from training.console import FAILED, Json, err, out, print_error, print_json, track, working
from training.encoding import replace_surrogates

if TYPE_CHECKING:
    from app.client import Explanation, Image, Prediction

    Classify = Callable[[list[Image]], list[Prediction]]

_STDIN = "-"
_CHUNK = 32  # images per request
_IMAGE_FAULTS = (400, 413, 415, 422)  # statuses of images that cannot be classified, or not together
_FOR, _AGAINST = (255, 96, 0), (0, 96, 255)  # colors of regions that speak for the class, and against it
_PICTURE = 256  # side of a picture in pixels


def predict(
    context: typer.Context,
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Images. - reads one from stdin.")],
    model: Model = None,
    top_k: Annotated[int, typer.Option(min=1, help="Number of classes for each image.")] = 3,
    server: Server = None,
    key: Key = None,
    models: Models = None,
    as_json: Json = False,
) -> None:
    """Classify images.

    The exit status is 1 if an image cannot be classified. The others are classified nevertheless.
    """
    images = [(file, _read(file)) for file in files]
    answers: list[dict[str, Any]] = []
    has_failed = False
    with _classifier(context, model, top_k, server, key, models) as classify:
        chunks = (images[start : start + _CHUNK] for start in range(0, len(images), _CHUNK))
        results = chain.from_iterable(_classify_each(classify, chunk) for chunk in chunks)
        shows_results = out.is_terminal and not as_json  # these are progress enough
        for file, result in results if shows_results else track(results, len(images), "classifying"):
            if isinstance(result, str):
                has_failed = True
                print_error(f"{file}: {result}")
                answers.append({"file": file, "error": result})
            elif as_json:
                first = {"file": file, "model": result.model, "version": result.version}
                answers.append(first | asdict(replace(result, file=file)))
            else:
                _print_prediction(file, result)
    if as_json:
        print_json(answers)
    if has_failed:
        raise typer.Exit(FAILED)


@contextmanager
def _classifier(
    context: typer.Context, model: str | None, top_k: int, server: str | None, key: str | None, models: str | None
) -> "Iterator[Classify]":
    """Yield a function that classifies images, by a service or in this process."""
    if not server:
        local = load_local(model, models)
        yield lambda images: local.predict(images, top_k=top_k)
        return
    name, version = split_version(model)
    with open_client(context, server, key) as client:
        yield lambda images: client.predict(images, model=name, version=version, top_k=top_k)


def _classify_each(classify: "Classify", images: "list[tuple[str, Image]]") -> "Iterator[tuple[str, Prediction | str]]":
    """Classify named images together, or each alone if one of them cannot be classified.

    Yields:
        The name of each image, and its prediction or its fault.
    """
    from app.client import ServiceError

    names = [name for name, _ in images]
    try:
        yield from zip(names, classify([image for _, image in images]), strict=True)
        return
    except OSError as error:
        fault = error.strerror or str(error)
    except ServiceError as error:
        if error.status not in _IMAGE_FAULTS:
            raise
        fault = error.detail.removeprefix(f"{Path(names[0]).name}: ")
    if len(images) == 1:
        yield names[0], fault
    else:
        for image in images:
            yield from _classify_each(classify, [image])


def _read(file: str) -> "Image":
    """Return the bytes of stdin, or the path of any other file, which is read later."""
    return sys.stdin.buffer.read() if file == _STDIN else file


def _print_prediction(file: str, prediction: "Prediction") -> None:
    out.print(f"{replace_surrogates(file)}  ({prediction.model}/{prediction.version})")
    width = max(len(each.label) for each in prediction.classes)
    for each in prediction.classes:
        out.print(f"  {each.probability:7.2%}  {each.label:<{width}}  {each.superclass}")
    if prediction.familiar is False:
        out.print("  The image is probably none of the classes.")
    for warning in prediction.warnings:
        out.print(f"  Warning: {warning}.")


def explain(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="An image. - reads it from stdin.")],
    label: Annotated[
        str | None, typer.Option("--class", metavar="LABEL", help="Class to explain. Default: the most probable one.")
    ] = None,
    model: Model = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the map over the image into a PNG file.")
    ] = None,
    server: Server = None,
    key: Key = None,
    models: Models = None,
    as_json: Json = False,
) -> None:
    """Show how much each region of an image speaks for a class."""
    image = _read(file)
    if server:
        name, version = split_version(model)
        with open_client(context, server, key) as client, working("explaining"):
            result = client.explain(image, model=name, version=version, label=label)
    else:
        local = load_local(model, models)
        with working("explaining"):
            result = local.explain(image, label=label)
    if picture:
        _draw(image, result, picture)
    if as_json:
        print_json({"file": file} | asdict(replace(result, file=file)))
    else:
        _print_explanation(file, result)


def _print_explanation(file: str, result: "Explanation") -> None:
    model = f"{result.model}/{result.version}"
    name = replace_surrogates(file)
    out.print(f"{name}: {result.label}, {result.superclass}, {result.probability:.2%}  ({model})")
    highest = max(abs(cell) for row in result.map for cell in row) or 1.0
    for row in result.map:
        cells = (Text(f"{round(cell, 2) + 0.0:7.2f}", _shade(cell / highest)) for cell in row)
        out.print(Text("  ").append_text(Text().join(cells)))
    out.print("Fall of the log-probability in nats if the region is hidden. Positive regions speak for the class.")
    for warning in result.warnings:
        out.print(f"Warning: {warning}.")


def _shade(strength: float) -> Style:
    """Return the background of a cell: orange for the class, blue against it, stronger for a larger part in it."""
    color = _FOR if strength > 0 else _AGAINST
    red, green, blue = (round(channel * abs(strength)) for channel in color)
    return Style.parse(f"on rgb({red},{green},{blue})")


def _draw(image: "Image", result: "Explanation", file: Path) -> None:
    """Draw the square that the network sees, with the map over it."""
    import numpy as np
    from PIL import Image as Pillow

    from app.client import encode_image
    from app.inference import explanation
    from app.inference.images.encoded import EncodedImage

    settings = local_settings()
    content = encode_image(image)[1]
    pixels = EncodedImage(content, settings.max_image_bytes, settings.max_image_pixels).decode()
    overlay = Pillow.open(io.BytesIO(explanation.draw_overlay(np.array(result.map))))
    square = Pillow.fromarray(pixels.transpose(1, 2, 0)).convert("RGBA")
    size = (_PICTURE, _PICTURE)
    Pillow.alpha_composite(square.resize(size), overlay.resize(size)).convert("RGB").save(file, "PNG")
    err.print(f"wrote {file}")
