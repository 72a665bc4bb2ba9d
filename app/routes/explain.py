"""Serve POST /explain, which takes an image and returns how much each region of it speaks for a class.

A request is read, limited and charged as one to /predict. The engine that answers /predict computes the masked images,
when no prediction waits.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, ClassVar

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

from app.clients import FairShares
from app.dependencies import services_of
from app.exceptions import Unavailable
from app.inference import explanation
from app.middleware.access import access_of, authorize_prediction, client_of
from app.routes.images import DESCRIBED, ImageRoute, ModelQuery, describe_body, read_images
from app.routes.parameters import parse_parameters
from app.routes.scoring import decoding_charge

_PNG = "image/png"
_JSON_TYPES = ("application/json", "application/*", "*/*")
_REMEDY = "explanations need a higher CIFAR100_PREDICT_RATE_LIMIT"


class ExplainQuery(ModelQuery, frozen=True):
    """The parameters of an explanation, in the query or as text fields of the form."""

    label: str | None = Field(
        default=None, alias="class", description="Label of the class to explain. Default: the most probable class."
    )


@dataclass(frozen=True, slots=True)
class Explanation:
    """A map of how much each region of an image speaks for a class."""

    __pydantic_config__: ClassVar = DESCRIBED

    model: str
    """Name of the model that answered."""
    version: int
    """Version of the model that answered."""
    milliseconds: float
    """Time from the end of the body to the response."""
    file: str | None
    """Name of the file in the form; None for a raw body."""
    class_id: int
    """Index of the explained class in the card of the model."""
    label: str
    """Label of the explained class."""
    superclass: str
    """Superclass of the explained class."""
    probability: float
    """Probability of the class for the whole image."""
    map: list[list[float]]
    """8 rows of 8 cells of the square that the network sees, from the top left. A cell has its share in the fall of the
    logarithm of the probability in nats if it is hidden; it is negative if the probability rises."""
    warnings: list[str]
    """Missing parts of a damaged image that was explained nevertheless."""


router = APIRouter(tags=["predict"], route_class=ImageRoute)


@router.post(
    "/explain",
    openapi_extra=describe_body(ExplainQuery, max_images=1),
    responses={200: {"content": {_PNG: {"schema": {"type": "string", "format": "binary"}}}}},
    response_model=Explanation,
    summary="Explain a class",
)
async def explain(request: Request, query: Annotated[ExplainQuery, Query()]) -> Explanation | Response:
    """Return how much each region of one image speaks for a class, as numbers.

    With `Accept: image/png` the response is a transparent picture, to be laid over the square that the network sees:
    orange regions speak for the class, blue ones against it.
    """
    authorize_prediction(request)
    services, settings = services_of(request), services_of(request).settings
    charge = decoding_charge(request, services)
    async with read_images(request, settings.max_image_bytes, max_images=1) as (files, fields):
        if fields:
            query = parse_parameters(ExplainQuery, request.scope["query_string"], fields)
        started = time.perf_counter()
        deadline = time.monotonic() + settings.deadline_s
        images = await services.decoders.decode(files, client_of(request), deadline, charge)
    model = await services.pool.get(query.model, query.version)
    wanted = None if query.label is None else explanation.find_class(query.label, model.card)
    if settings.predict_rate_limit:  # the request was charged one unit before its body was read
        access_of(request).charge_prediction(request, explanation.COUNT - 1, _REMEDY)
    with _share(services.masked_images, client_of(request)):
        masked = explanation.occlude(images.pixels[0])
        probabilities = await model.batcher.run_in_background(masked, deadline)
    class_id = int(probabilities[0].argmax()) if wanted is None else wanted
    importance = explanation.importance_map(probabilities[:, class_id])
    if _prefers_png(request):
        return Response(explanation.draw_overlay(importance), media_type=_PNG, headers={"Vary": "Accept"})
    return Explanation(
        model=model.card.name,
        version=model.card.version,
        milliseconds=round((time.perf_counter() - started) * 1000, 3),
        file=files[0][0],
        class_id=class_id,
        label=model.card.classes[class_id],
        superclass=model.card.superclasses[class_id],
        probability=float(probabilities[0, class_id]),
        map=importance.round(explanation.DECIMALS).tolist(),
        warnings=images.warnings[0],
    )


@contextmanager
def _share(masked: FairShares, client: str) -> Iterator[None]:
    """Count the images of an explanation for a client while they wait.

    Raises:
        Unavailable: The client has its full share.
    """
    if masked.exceeds_share(client, explanation.COUNT):
        raise Unavailable(f"{masked.total} masked images are waiting already; try again later", "queue_full")
    masked.add(client, explanation.COUNT)
    try:
        yield
    finally:
        masked.remove(client, explanation.COUNT)


def _prefers_png(request: Request) -> bool:
    """Return whether the first type of the header Accept that this route can produce is a picture."""
    accepted = (each.partition(";")[0].strip() for each in request.headers.get("accept", "").split(","))
    return next((each for each in accepted if each in (_PNG, *_JSON_TYPES)), "") == _PNG
