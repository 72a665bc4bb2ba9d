"""POST /predict: images in, the most probable classes out."""

import asyncio
import io
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, BinaryIO

import numpy as np
from fastapi import APIRouter, Query, Request
from numpy.typing import NDArray
from pydantic import BaseModel
from starlette.datastructures import UploadFile

from app import images
from app.access import ForPredictors
from app.errors import BadRequest, Problem, UnsupportedImage
from app.services import FromApp
from app.settings import Settings
from training.store import ModelCard

router = APIRouter(tags=["predict"])

File = tuple[str | None, BinaryIO]

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_DESCRIPTION: dict[str, Any] = {
    "security": [{}],  # or the key, where the service is set up to want one
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


class Class(BaseModel):
    """One class and its probability."""

    class_id: int
    label: str
    superclass: str
    probability: float
    """Calibrated."""


class Prediction(BaseModel):
    """The most probable classes of one image, best first."""

    file: str | None
    """Name under which the image was sent."""
    classes: list[Class]


class Predictions(BaseModel):
    """Answers in the order of the images."""

    model: str
    version: int
    milliseconds: float
    """From the body's arrival to the answer."""
    predictions: list[Prediction]


@router.post("/predict", dependencies=[ForPredictors], openapi_extra=_DESCRIPTION, summary="Classify images")
async def predict(
    request: Request,
    services: FromApp,
    model: Annotated[str | None, Query(description="By default the most accurate live model.")] = None,
    version: Annotated[int | None, Query(ge=1, description="By default the live one.")] = None,
    top_k: Annotated[int, Query(ge=1, le=100, description="How many classes per image.")] = 5,
) -> Predictions:
    """Send images as multipart fields `file`, or one image as the raw body."""
    async with _files(request, services.settings) as files:
        started = time.perf_counter()
        loop = asyncio.get_running_loop()
        pixels = await loop.run_in_executor(services.decoders, _decode, files, services.settings)
    # Between here and the queue nothing else runs, so a swap cannot slip in between.
    chosen = await services.pool.get(model, version)
    logits = await chosen.batcher.run(pixels, services.settings.deadline_s)
    return Predictions(
        model=chosen.card.name,
        version=chosen.card.version,
        milliseconds=round((time.perf_counter() - started) * 1000, 3),
        predictions=[
            Prediction(file=name, classes=top_classes(row, chosen.card, top_k))
            for (name, _), row in zip(files, logits, strict=True)
        ],
    )


def top_classes(logits: NDArray[np.float32], card: ModelCard, top_k: int) -> list[Class]:
    """The `top_k` most probable classes of logits [classes], best first."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max())
    probabilities = exponentials / exponentials.sum()
    order = np.argsort(-probabilities, kind="stable")[:top_k]
    return [
        Class(
            class_id=int(number),
            label=card.classes[number],
            superclass=card.superclasses[number],
            probability=float(probabilities[number]),
        )
        for number in order
    ]


@asynccontextmanager
async def _files(request: Request, settings: Settings) -> AsyncIterator[list[File]]:
    """Names and contents of the images sent. A form's larger files are on disk and closed at the end."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == "multipart/form-data":
        max_files = min(settings.max_images, settings.max_batch)
        async with request.form(max_files=max_files, max_fields=8) as form:
            uploads = [part for part in form.getlist("file") if isinstance(part, UploadFile)]
            if not uploads:
                raise BadRequest("the form has no field 'file' with an image: curl -F file=@photo.jpg")
            yield [(upload.filename, upload.file) for upload in uploads]
    elif content_type.startswith("image/") or content_type == "application/octet-stream":
        content = bytearray()
        async for chunk in request.stream():
            if len(content) <= settings.max_image_bytes:  # the rest is read, so that the client hears the answer
                content += chunk
        yield [(None, io.BytesIO(content))]
    else:
        raise UnsupportedImage(
            f"the content type {content_type or '(none)'!r} is not supported; send multipart/form-data with a field "
            "'file', or an image as the body with its image/* type"
        )


def _decode(files: list[File], settings: Settings) -> NDArray[np.uint8]:
    pixels = []
    for name, file in files:
        try:
            content = file.read(settings.max_image_bytes + 1)
            pixels.append(images.decode(content, settings.max_image_bytes, settings.max_image_pixels))
        except Problem as error:
            if len(files) > 1:
                error.detail = f"{name}: {error.detail}"
            raise
    return np.stack(pixels)
