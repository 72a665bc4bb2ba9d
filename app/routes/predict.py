"""Serve POST /predict, which takes images and returns the most probable classes of each.

A request passes the access check first. Its body is a form or one raw image. A small image is decoded with its batch,
other images are decoded by `Decoders`. The `Batcher` of the model computes the scores.
"""

import asyncio
import io
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Annotated, Any, cast

import numpy as np
from fastapi import APIRouter, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError
from pydantic_core import to_json
from starlette.datastructures import QueryParams, UploadFile
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from app.dependencies import Services, services_of
from app.errors import EXPECTED, error_response
from app.exceptions import BadRequest, TooLarge, UnsupportedImage
from app.inference import images
from app.inference.batching import ImageSource, Scores
from app.inference.decode_cost import DecodeCost
from app.inference.decoding import File
from app.inference.images import CostlyImage
from app.inference.pool import Model, Version
from app.machine import MIB, cpu_count
from app.middleware.access import access_of, authorize_prediction, client_of
from app.routes.uploads import media_type, read_form
from app.server.protocol import ON_DISCONNECT
from app.settings import Settings
from training.store import ModelCard
from training.text import quote

# An image up to this size is decoded with its batch, in less time than a decoder thread needs to start. On a single
# processor this includes images that take a few milliseconds, because a thread would share that processor.
_SMALL_BYTES, _SMALL_PIXELS = (128 << 10, 512 * 512) if cpu_count() == 1 else (8 << 10, 64 * 64)
_SMALL_COST = DecodeCost(5, 16 * MIB)
# Compressed chunks of a PNG. They may decompress to a thousand times their size, independent of the image size.
_PNG, _COMPRESSED = b"\x89PNG", (b"zTXt", b"iTXt", b"iCCP")

_PATH = "/predict"

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_DESCRIPTION: dict[str, Any] = {
    "security": [{}, {"HTTPBearer": []}],  # the API key is required if one is configured
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                }
            },
            "image/*": _BINARY,
            "application/octet-stream": _BINARY,
        },
    },
}


class PredictQuery(BaseModel, frozen=True):
    """The query parameters of a prediction."""

    model: str | None = Field(default=None, description="By default the configured one, or the most accurate live one.")
    version: Version | None = Field(default=None, description="By default the live one.")
    top_k: int = Field(default=5, ge=1, le=100, description="How many classes per image.")


@dataclass(slots=True)  # frozen dataclasses take three times as long to create
class Class:
    """One class and its calibrated probability."""

    class_id: int
    label: str
    superclass: str
    probability: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """The most probable classes of one image, best first, and the name of its file."""

    file: str | None
    classes: list[Class]


@dataclass(frozen=True, slots=True)
class Predictions:
    """The predictions in the order of the images, and the milliseconds from the end of the body to the response."""

    model: str
    version: int
    milliseconds: float
    predictions: list[Prediction]


router = APIRouter(tags=["predict"])


@router.post(_PATH, openapi_extra=_DESCRIPTION, summary="Classify images")
async def predict(request: Request, asked: Annotated[PredictQuery, Query()]) -> Predictions:
    """Classify the images of the multipart fields `file`, or one image that is sent as the raw body."""
    authorize_prediction(request)
    services = services_of(request)
    settings = services.settings
    async with _files(request, settings) as files:
        started = time.perf_counter()
        deadline = time.monotonic() + settings.deadline_s
        chosen, scores = await _scores(request, services, asked, files, deadline)
    return Predictions(
        model=chosen.card.name,
        version=chosen.card.version,
        milliseconds=round((time.perf_counter() - started) * 1000, 3),
        predictions=[
            Prediction(name, classes)
            for (name, _), classes in zip(files, top_classes(scores, chosen.card, asked.top_k), strict=True)
        ],
    )


async def _scores(
    request: Request, services: Services, asked: PredictQuery, files: list[File], deadline: float
) -> tuple[Model, Scores]:
    async def computed(pixels: ImageSource) -> tuple[Model, Scores]:
        chosen = await services.pool.get(asked.model, asked.version)
        # No other task runs between these two lines, so the model cannot be swapped in between.
        return chosen, await chosen.batcher.run(pixels, deadline)

    if decode := _small(files, services.settings):
        with suppress(TooLarge, CostlyImage):  # a file with few bytes may have many pixels or scans
            return await computed(decode)
    charge = partial(access_of(request).charge_prediction, request) if services.settings.predict_rate_limit else None
    return await computed(await services.decoders.decode(files, client_of(request), deadline, charge))


class PredictMiddleware:
    """ASGI middleware that passes POST /predict directly to `predict`, with the same responses.

    FastAPI's routing, dependencies and validation would take as long as all other work outside the network. A request
    whose client disconnects is cancelled.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != _PATH or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        scope["route"] = router.routes[0]
        request = Request(scope, receive)
        task, left = cast("asyncio.Task[None]", asyncio.current_task()), False

        def leave() -> None:
            nonlocal left
            left = True
            task.cancel()

        scope[ON_DISCONNECT] = leave
        try:
            predictions = await predict(request, _asked(scope["query_string"]))
        except EXPECTED as error:
            response: Response = await error_response(request, error)
        except asyncio.CancelledError:
            if not left:
                raise
            task.uncancel()
            raise ClientDisconnect from None
        else:
            response = Response(to_json(predictions), media_type="application/json")
        finally:
            del scope[ON_DISCONNECT]
        await response(scope, receive, send)


@lru_cache(256)
def _asked(query: bytes) -> PredictQuery:
    try:
        return PredictQuery.model_validate(dict(QueryParams(query)))
    except ValidationError as error:
        faults = [{**fault, "loc": ("query", *fault["loc"])} for fault in error.errors()]
        raise RequestValidationError(faults) from None


def top_classes(scores: Scores, card: ModelCard, top_k: int) -> list[list[Class]]:
    """Return the `top_k` most probable classes of each image, best first."""
    order, probabilities = (each[:, :top_k].tolist() for each in scores.ranking)
    return [
        [Class(number, card.classes[number], card.superclasses[number], probability) for number, probability in best]
        for best in map(zip, order, probabilities)
    ]


@asynccontextmanager
async def _files(request: Request, settings: Settings) -> AsyncIterator[list[File]]:
    """Read the request body and yield the names and contents of its images.

    The larger files of a form are on disk. They are closed at the end of the context.

    Raises:
        BadRequest: The form has no file.
        UnsupportedImage: The content type is not supported.
    """
    content_type = media_type(request)
    if content_type == "multipart/form-data":
        form = await read_form(request, min(settings.max_images, settings.max_batch), max_fields=8)
        try:
            uploads = [part for part in form.getlist("file") if isinstance(part, UploadFile)]
            if not uploads:
                raise BadRequest("the form has no field 'file' with an image: curl -F file=@photo.jpg")
            yield [(upload.filename, upload.file) for upload in uploads]
        finally:
            await form.close()
    elif content_type.startswith("image/") or content_type == "application/octet-stream":
        content = bytearray()
        async for chunk in request.stream():
            if len(content) <= settings.max_image_bytes:  # read the rest, so that the client gets the response
                content += chunk
        yield [(None, io.BytesIO(content))]
    else:
        raise UnsupportedImage(
            f"the content type {quote(content_type or '(none)')} is not supported; send multipart/form-data with a "
            "field 'file', or an image as the body with its image/* type"
        )


def _small(files: list[File], settings: Settings) -> Callable[[], NDArray[np.uint8]] | None:
    """Return a function that decodes a small image. Returns None for several images or a larger one.

    The function raises `TooLarge` or `CostlyImage` if the image has too many pixels or costs more than `_SMALL_COST`.
    """
    max_bytes = min(_SMALL_BYTES, settings.max_image_bytes)
    max_pixels = min(_SMALL_PIXELS, settings.max_image_pixels)
    (_, file), *more = files
    if more:
        return None
    content = file.read(max_bytes + 1)
    if len(content) > max_bytes or (content.startswith(_PNG) and any(kind in content for kind in _COMPRESSED)):
        return None
    return partial(images.decode, content, max_bytes, max_pixels, _SMALL_COST)
