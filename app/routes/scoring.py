"""Compute the scores of a request's images, for all routes that predict.

file   --small--> decoded with its batch ---------+--> Batcher of the model --> Scores
       --quick--> decoder thread -----------------+
files  --others-> Decoders --> pixels ------------+
pixels -------------------------------------------+
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import numpy as np
from fastapi import Request

from app.dependencies import Services
from app.exceptions import BadRequest, Problem, TooLarge, TooManyRequests, Unavailable
from app.inference.batching import BatchOutput, Images, ImageSource, Scores
from app.inference.decoding import Charge, File, QuickImage
from app.inference.images.encoded import CostlyImage
from app.inference.pool import Model
from app.middleware.access import access_of, client_of
from app.observability.metrics import ImageOutcome, Metrics
from training.store import ModelCard
from training.text import quote, suggest


class ScoredImages(NamedTuple):
    """The model that scored a request's images, their scores, and the warnings about each image.

    `errors` has the errors of images that have no scores, by their numbers in the request.
    """

    model: Model
    scores: Scores
    warnings: list[list[str]]
    errors: dict[int, Problem]


async def compute_scores(
    request: Request,
    services: Services,
    name: str | None,
    version: int | None,
    images: Sequence[File] | Images,
    deadline: float,
    tolerate_errors: bool = False,
) -> ScoredImages:
    """Decode images and compute their scores. Count the request in the statistics of the model.

    Args:
        request: The request, whose client is charged for the decoding.
        services: The objects of the service.
        name: Name of the model. None for the default model.
        version: Version of the model. None for the live version.
        images: Encoded images, or uint8 [N, 3, 32, 32] with at most `max_batch` images.
        deadline: Time on the monotonic clock at which the request is refused if its computation has not started.
        tolerate_errors: True to return the errors of images that cannot be decoded, instead of raising the first one.

    Raises:
        Problem: The model does not exist, an image cannot be decoded, or the service is overloaded.
    """
    started = time.perf_counter()
    try:
        scored, decoding_s = await _compute(request, services, name, version, images, deadline, tolerate_errors)
    except BaseException as error:
        model = services.pool.peek(name, version)
        if model and isinstance(error, Exception):
            model.statistics.count_failure(time.perf_counter() - started)
        services.metrics.count_images(model.card.name if model else "unknown", _outcome(error), len(images))
        raise
    scored.model.statistics.count_success(len(scored.warnings), time.perf_counter() - started, decoding_s)
    _count_predictions(services.metrics, scored)
    return scored


def _outcome(error: BaseException) -> ImageOutcome:
    """Return the outcome of the images of a request that an error ended."""
    match error:
        case Unavailable() | TooManyRequests():
            return "refused"
        case Problem():
            return "rejected"
        case Exception():
            return "failed"
    return "abandoned"  # the client has disconnected, or the service stops


def _count_predictions(metrics: Metrics, scored: ScoredImages) -> None:
    card, scores = scored.model.card, scored.scores
    unfamiliar = 0
    if card.familiarity:
        threshold = card.familiarity.threshold
        unfamiliar = len([score for score in scores.familiarity.tolist() if score < threshold])
    metrics.count_predictions(card.name, scores.confidence.tolist(), unfamiliar)
    if scored.errors:
        metrics.count_images(card.name, "rejected", len(scored.errors))


async def _compute(
    request: Request,
    services: Services,
    name: str | None,
    version: int | None,
    images: Sequence[File] | Images,
    deadline: float,
    tolerate_errors: bool,
) -> tuple[ScoredImages, float]:
    """Return the scores, and the seconds in which images were decoded before they joined a batch."""

    async def compute(source: ImageSource, warnings: list[list[str]], errors: dict[int, Problem]) -> ScoredImages:
        model = await services.pool.get(name, version)
        # No other task runs between these two lines, so the model cannot be swapped in between.
        return ScoredImages(model, await model.batcher.run(source, deadline), warnings, errors)

    if not isinstance(images, Sequence):
        return await compute(images, [[] for _ in images], {}), 0.0
    if not tolerate_errors and (decode := services.decoders.small_image_decoder(images)):
        with suppress(TooLarge, CostlyImage):  # a file with few bytes may have many pixels or scans
            return await compute(decode, [[]], {}), 0.0
    model = await services.pool.get(name, version)  # an unknown model is refused before images are decoded for it
    client, opened = client_of(request), None
    if len(images) == 1 and not tolerate_errors:
        image = QuickImage(services.decoders, images[0][1], client, deadline)
        try:
            scored = await compute(image, [[]], {})
        except CostlyImage:
            opened = image.opened
        else:
            return scored._replace(warnings=[image.warnings]), image.decoding_s
    charge = decoding_charge(request, services)
    started = time.perf_counter()
    decoded = await services.decoders.decode(images, client, deadline, charge, opened, tolerate_errors)
    decoding_s = time.perf_counter() - started
    if not decoded.warnings:  # no image can be decoded
        no_scores = Scores(BatchOutput(np.empty((0, len(model.card.classes)), np.float32)))
        return ScoredImages(model, no_scores, [], decoded.errors), decoding_s
    return await compute(*decoded), decoding_s


def decoding_charge(request: Request, services: Services) -> Charge | None:
    """Return the function that charges the rate limit of predictions for decoding, or None without a limit."""
    return partial(access_of(request).charge_prediction, request) if services.settings.predict_rate_limit else None


def find_class(label: str, card: ModelCard) -> int:
    """Return the id of a class.

    Raises:
        BadRequest: The model has no such class.
    """
    if label not in card.classes:
        raise BadRequest(f"{card.name} has no class {quote(label)}; {suggest(label, card.classes, 'classes')}")
    return card.classes.index(label)
