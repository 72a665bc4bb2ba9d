"""Serve POST /predict, which takes images and returns the most probable classes of each.

A request passes the access check first. Its body is a form or one raw image. `ImageScorer` decodes and scores the
images.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from fastapi import APIRouter, Query, Request
from pydantic import Field

from app.dependencies import services_of
from app.errors import ProblemDetails, describe_problem
from app.exceptions import Problem
from app.inference.batching import Scores
from app.middleware.access import authorize_prediction
from app.routes.images import DESCRIBED, ImageRoute, ModelQuery, describe_body, read_images
from app.routes.parameters import parse_parameters
from app.routes.scoring import ImageScorer
from training.store import ModelCard


class PredictQuery(ModelQuery, frozen=True):
    """The parameters of a prediction, in the query or as text fields of the form."""

    top_k: int = Field(default=5, ge=1, le=100, description="Number of classes per image.")
    partial: bool = Field(
        default=False,
        description="True to answer with a prediction or an error for each image, instead of refusing all of them if "
        "one cannot be decoded.",
    )
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


@dataclass(frozen=True, slots=True)
class FailedPrediction:
    """The error of an image that cannot be decoded."""

    __pydantic_config__: ClassVar = DESCRIBED

    file: str | None
    """Name of the file in the form; None for a raw body."""
    error: ProblemDetails
    """The problem that a request with this image alone would get."""


@dataclass(frozen=True, slots=True)
class PartialPredictions:
    """The predictions of a request with `partial=true`."""

    __pydantic_config__: ClassVar = DESCRIBED

    model: str
    """Name of the model that answered."""
    version: int
    """Version of the model that answered."""
    milliseconds: float
    """Time from the end of the body to the response."""
    predictions: list[Prediction | FailedPrediction]
    """The prediction or the error of each image, in the order of the images."""


router = APIRouter(tags=["predict"], route_class=ImageRoute)


@router.post("/predict", openapi_extra=describe_body(PredictQuery), summary="Classify images")
async def predict(request: Request, query: Annotated[PredictQuery, Query()]) -> Predictions | PartialPredictions:
    """Classify the images of the multipart fields `file`, or one image that is sent as the raw body.

    If an image cannot be decoded, the request is refused. With `partial=true` the response is 200 and has a prediction
    or an error for each image.
    """
    authorize_prediction(request)
    services = services_of(request)
    max_images = min(services.settings.max_images, services.settings.max_batch)
    async with read_images(request, services.settings.max_image_bytes, max_images) as (files, fields):
        if fields:
            query = parse_parameters(PredictQuery, request.scope["query_string"], fields)
        started = time.perf_counter()
        scorer = ImageScorer(
            request,
            services,
            query.model,
            query.version,
            time.monotonic() + services.settings.deadline_s,
            tolerate_errors=query.partial,
            full_familiarity=query.familiarity == "full",
        )
        model, scores, warnings, errors = await scorer.score(files)
    names = [name for name, _ in files]
    decoded = [name for number, name in enumerate(names) if number not in errors] if errors else names
    predictions = make_predictions(decoded, scores, warnings, model.card, query)
    milliseconds = round((time.perf_counter() - started) * 1000, 3)
    if not query.partial:
        return Predictions(model.card.name, model.card.version, milliseconds, predictions)
    merged = _merge(names, predictions, errors)
    return PartialPredictions(model.card.name, model.card.version, milliseconds, merged)


def _merge(
    names: list[str | None], predictions: Iterable[Prediction], errors: dict[int, Problem]
) -> list[Prediction | FailedPrediction]:
    """Return the prediction or the error of each image, in the order of the images."""
    rest = iter(predictions)
    return [
        FailedPrediction(name, describe_problem(errors[number].status, errors[number].detail))
        if number in errors
        else next(rest)
        for number, name in enumerate(names)
    ]


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
