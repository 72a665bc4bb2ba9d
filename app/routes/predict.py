"""Serve POST /predict, which takes images and returns the most probable classes of each.

A request passes the access check first. Its body is a form or one raw image. `compute_scores` decodes and scores the
images.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from fastapi import APIRouter, Query, Request
from pydantic import Field

from app.dependencies import services_of
from app.inference.batching import Scores
from app.middleware.access import authorize_prediction
from app.routes.images import DESCRIBED, ImageRoute, ModelQuery, describe_body, read_images
from app.routes.parameters import parse_parameters
from app.routes.scoring import compute_scores
from training.store import ModelCard


class PredictQuery(ModelQuery, frozen=True):
    """The parameters of a prediction, in the query or as text fields of the form."""

    top_k: int = Field(default=5, ge=1, le=100, description="Number of classes per image.")
    familiarity: Literal["fast", "full"] = Field(
        default="fast",
        description="Score of `familiar`. `fast` adds no computation. `full` is the agreement of both members of a "
        "cascade, which compute all images.",
    )


@dataclass(slots=True)  # frozen dataclasses take three times as long to create
class PredictedClass:
    """One class and its calibrated probability."""

    __pydantic_config__: ClassVar = DESCRIBED

    class_id: int
    """Index of the class in the card of the model."""
    label: str
    """Label of the class."""
    superclass: str
    """Superclass of the class."""
    probability: float
    """Calibrated probability, 0-1."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """The most probable classes of one image."""

    __pydantic_config__: ClassVar = DESCRIBED

    file: str | None
    """Name of the file in the form; None for a raw body."""
    classes: list[PredictedClass]
    """The most probable classes, best first."""
    familiar: bool | None
    """False if the image is probably none of the classes: its score is below the threshold in the card of the model.
    None if the card has no threshold."""
    familiarity: float
    """Score of the image. The card of the model describes it."""
    warnings: list[str]
    """Missing parts of a damaged image that was classified nevertheless."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """The predictions of one request."""

    __pydantic_config__: ClassVar = DESCRIBED

    model: str
    """Name of the model that answered."""
    version: int
    """Version of the model that answered."""
    milliseconds: float
    """Time from the end of the body to the response."""
    predictions: list[Prediction]
    """The predictions in the order of the images."""


router = APIRouter(tags=["predict"], route_class=ImageRoute)


@router.post("/predict", openapi_extra=describe_body(PredictQuery), summary="Classify images")
async def predict(request: Request, query: Annotated[PredictQuery, Query()]) -> Predictions:
    """Classify the images of the multipart fields `file`, or one image that is sent as the raw body."""
    authorize_prediction(request)
    services = services_of(request)
    max_images = min(services.settings.max_images, services.settings.max_batch)
    async with read_images(request, services.settings.max_image_bytes, max_images) as (files, fields):
        if fields:
            query = parse_parameters(PredictQuery, request.scope["query_string"], fields)
        started = time.perf_counter()
        deadline = time.monotonic() + services.settings.deadline_s
        model, scores, warnings = await compute_scores(
            request, services, query.model, query.version, files, deadline, query.familiarity == "full"
        )
    return Predictions(
        model=model.card.name,
        version=model.card.version,
        milliseconds=round((time.perf_counter() - started) * 1000, 3),
        predictions=make_predictions([name for name, _ in files], scores, warnings, model.card, query),
    )


def make_predictions(
    names: Sequence[str | None], scores: Scores, warnings: Sequence[list[str]], card: ModelCard, query: PredictQuery
) -> list[Prediction]:
    """Return the predictions of images, given their file names, their scores and the warnings about each."""
    fitted = card.full_familiarity if query.familiarity == "full" else card.familiarity
    threshold = fitted.threshold if fitted else None
    return [
        Prediction(name, classes, None if threshold is None else score >= threshold, score, image_warnings)
        for name, classes, score, image_warnings in zip(
            names, top_classes(scores, card, query.top_k), scores.familiarity.tolist(), warnings, strict=True
        )
    ]


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
