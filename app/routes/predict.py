"""Serve POST /predict, which takes images and returns the most probable classes of each.

A request passes the access check first. Its body is a form or one raw image. `compute_scores` decodes and scores the
images.
"""

import io
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field
from pydantic_core import to_json
from typing_extensions import override

from app.dependencies import services_of
from app.exceptions import UnsupportedImage, UnsupportedMediaType
from app.inference.batching import Scores
from app.inference.decoding import File
from app.inference.pool import Version
from app.middleware.access import authorize_prediction
from app.routes.disconnects import run_until_disconnect
from app.routes.parameters import parse_parameters
from app.routes.scoring import compute_scores
from app.routes.uploads import MULTIPART, URLENCODED, form_schema, media_type, read_form
from app.settings import Settings
from training.store import ModelCard
from training.text import quote

_UNKNOWN_TYPES = ("", URLENCODED)  # clients send these for bodies of any kind
_BINARY_TYPES = ("application/octet-stream", "binary/octet-stream")
_HOW_TO_SEND = "send multipart/form-data with a field 'file', or an image as the body with its image/* type"
_EXAMPLE = "curl -F file=@photo.jpg"
_BINARY = {"schema": {"type": "string", "format": "binary"}}


class PredictQuery(BaseModel, frozen=True):
    """The parameters of a prediction, in the query or as text fields of the form."""

    model: str | None = Field(default=None, description="Default: the configured model, or the most accurate live one.")
    version: Version | None = Field(default=None, description="Default: the live version.")
    top_k: int = Field(default=5, ge=1, le=100, description="Number of classes per image.")


_DESCRIPTION: dict[str, Any] = {
    "security": [{}, {"HTTPBearer": []}],  # the API key is required if one is configured
    "requestBody": {
        "required": True,
        "content": {
            MULTIPART: {"schema": form_schema({"type": "array", "items": _BINARY["schema"]}, PredictQuery)},
            "image/*": _BINARY,
            "application/octet-stream": _BINARY,
        },
    },
}


@dataclass(slots=True)  # frozen dataclasses take three times as long to create
class PredictedClass:
    """One class and its calibrated probability."""

    class_id: int
    label: str
    superclass: str
    probability: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """The most probable classes of one image, best first, and the name of its file.

    Warnings name missing parts of a damaged image that was classified nevertheless.
    """

    file: str | None
    classes: list[PredictedClass]
    warnings: list[str]


@dataclass(frozen=True, slots=True)
class Predictions:
    """The predictions in the order of the images, and the milliseconds from the end of the body to the response."""

    model: str
    version: int
    milliseconds: float
    predictions: list[Prediction]


class PredictRoute(APIRoute):
    """A route that parses the query itself and cancels a request whose client disconnects.

    FastAPI's dependencies and validation would take as long as all other work outside the network. The OpenAPI document
    comes from the endpoint's signature, as usual.
    """

    @override
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return self._respond

    @staticmethod
    async def _respond(request: Request) -> Response:
        """Run `predict` and serialize its result. Cancel it if the client disconnects."""
        query = _parse_query(request.scope["query_string"])
        predictions = await run_until_disconnect(request, predict(request, query))
        return Response(to_json(predictions), media_type="application/json")


router = APIRouter(tags=["predict"], route_class=PredictRoute)


@router.post("/predict", openapi_extra=_DESCRIPTION, summary="Classify images")
async def predict(request: Request, query: Annotated[PredictQuery, Query()]) -> Predictions:
    """Classify the images of the multipart fields `file`, or one image that is sent as the raw body."""
    authorize_prediction(request)
    services = services_of(request)
    async with _read_images(request, services.settings) as (files, fields):
        if fields:
            query = parse_parameters(PredictQuery, request.scope["query_string"], fields)
        started = time.perf_counter()
        deadline = time.monotonic() + services.settings.deadline_s
        model, scores, warnings = await compute_scores(request, services, query.model, query.version, files, deadline)
    return Predictions(
        model=model.card.name,
        version=model.card.version,
        milliseconds=round((time.perf_counter() - started) * 1000, 3),
        predictions=[
            Prediction(name, classes, image_warnings)
            for (name, _), classes, image_warnings in zip(
                files, top_classes(scores, model.card, query.top_k), warnings, strict=True
            )
        ],
    )


@lru_cache(256)
def _parse_query(query: bytes) -> PredictQuery:
    return parse_parameters(PredictQuery, query)


def top_classes(scores: Scores, card: ModelCard, top_k: int) -> list[list[PredictedClass]]:
    """Return the `top_k` most probable classes of each image, best first."""
    order, probabilities = (each[:, :top_k].tolist() for each in scores.ranking)
    return [
        [
            PredictedClass(class_id, card.classes[class_id], card.superclasses[class_id], probability)
            for class_id, probability in best
        ]
        for best in map(zip, order, probabilities)
    ]


@asynccontextmanager
async def _read_images(request: Request, settings: Settings) -> AsyncIterator[tuple[list[File], list[tuple[str, str]]]]:
    """Read the request body. Yield the names and contents of its images, and the text fields of its form.

    A body without a Content-Type, or with the default type of several clients, is an image if its bytes are one. The
    larger files of a form are on disk. They are closed at the end of the context.

    Raises:
        UnsupportedMediaType: The content type is not supported.
        Problem: The errors of `read_form`.
    """
    content_type = media_type(request)
    if content_type == MULTIPART:
        form = await read_form(request, min(settings.max_images, settings.max_batch), _EXAMPLE)
        try:
            yield [(upload.filename, upload.file) for upload in form.files], form.fields
        finally:
            await form.close()
    elif content_type.startswith("image/") or content_type in (*_BINARY_TYPES, *_UNKNOWN_TYPES):
        content = bytearray()
        async for chunk in request.stream():
            if len(content) <= settings.max_image_bytes:  # read the rest, so that the client gets the response
                content += chunk
        try:
            yield [(None, io.BytesIO(content))], []
        except UnsupportedImage as error:
            if content_type in _UNKNOWN_TYPES:
                error.detail += f"; the content type is {quote(content_type or '(none)')}: {_HOW_TO_SEND}"
            raise
    else:
        raise UnsupportedMediaType(f"the content type {quote(content_type)} is not supported; {_HOW_TO_SEND}")
