"""Compute the scores of a request's images, for all routes that predict.

file   --small--> decoded with its batch ---------+--> Batcher of the model --> Scores
       --quick--> decoder thread -----------------+
files  --others-> Decoders --> pixels ------------+
pixels -------------------------------------------+
"""

import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
from fastapi import Request

from app.dependencies import Services
from app.exceptions import BadRequest, Problem, TooLarge, TooManyRequests, Unavailable
from app.inference.batching import BatchOutput, Images, ImageSource, Scores
from app.inference.cascade import CascadeBatcher
from app.inference.decoding import Charge, File, QuickImage
from app.inference.images.encoded import CostlyImage
from app.inference.pool import Model
from app.middleware.access import access_of, client_of
from app.observability.metrics import ImageOutcome, Metrics


class ScoredImages(NamedTuple):
    """The model that scored a request's images, their scores, and the warnings about each image.

    `errors` has the errors of images that have no scores, by their numbers in the request.
    """

    model: Model
    scores: Scores
    warnings: list[list[str]]
    errors: dict[int, Problem]


@dataclass(slots=True)
class ImageScorer:
    """Decodes the images of one request and computes their scores."""

    request: Request
    """The request, whose client is charged for the decoding."""
    services: Services
    """The objects of the service."""
    name: str | None
    """Name of the model. None for the default model."""
    version: int | None
    """Version of the model. None for the live version."""
    deadline: float
    """Time on the monotonic clock at which the request is refused if its computation has not started."""
    tolerate_errors: bool = False
    """True to return the errors of images that cannot be decoded, instead of raising the first one."""
    full_familiarity: bool = False
    """See `CascadeBatcher.run`."""
    _decoding_s: float = field(default=0.0, init=False)  # before the images joined a batch

    async def score(self, images: Sequence[File] | Images) -> ScoredImages:
        """Compute the scores of images, and count the request in the statistics of the model.

        Args:
            images: Encoded images, or uint8 [N, 3, 32, 32] with at most `max_batch` images.

        Raises:
            Problem: The model does not exist or has no full familiarity, an image cannot be decoded, or the service is
                overloaded.
        """
        started = time.perf_counter()
        metrics = self.services.metrics
        try:
            scored = await self._score(images)
        except BaseException as error:
            model = self.services.pool.peek(self.name, self.version)
            if model and isinstance(error, Exception):
                model.statistics.count_failure(time.perf_counter() - started)
            metrics.count_images(model.card.name if model else "unknown", _outcome(error), len(images))
            raise
        seconds = time.perf_counter() - started
        scored.model.statistics.count_success(len(scored.warnings), seconds, self._decoding_s)
        _count_predictions(metrics, scored)
        return scored

    async def _score(self, images: Sequence[File] | Images) -> ScoredImages:
        services = self.services
        if not isinstance(images, Sequence):
            return await self._run(images, [[] for _ in images])
        if not self.tolerate_errors and (decode := services.decoders.small_image_decoder(images)):
            with suppress(TooLarge, CostlyImage):  # a file with few bytes may have many pixels or scans
                return await self._run(decode, [[]])
        model = await services.pool.get(self.name, self.version)
        self._run_of(model)  # an unknown or unsuitable model is refused before images are decoded for it
        client, opened = client_of(self.request), None
        if len(images) == 1 and not self.tolerate_errors:
            image = QuickImage(services.decoders, images[0][1], client, self.deadline)
            try:
                scored = await self._run(image, [[]])
            except CostlyImage:
                opened = image.opened
            else:
                self._decoding_s = image.decoding_s
                return scored._replace(warnings=[image.warnings])
        started = time.perf_counter()
        charge = decoding_charge(self.request, services)
        pixels, warnings, errors = await services.decoders.decode(
            images, client, self.deadline, charge, opened, self.tolerate_errors
        )
        self._decoding_s = time.perf_counter() - started
        if not warnings:  # no image can be decoded
            no_scores = Scores(BatchOutput(np.empty((0, len(model.card.classes)), np.float32)))
            return ScoredImages(model, no_scores, [], errors)
        return (await self._run(pixels, warnings))._replace(errors=errors)

    async def _run(self, source: ImageSource, warnings: list[list[str]]) -> ScoredImages:
        model = await self.services.pool.get(self.name, self.version)
        # No other task runs between these two lines, so the model cannot be swapped in between.
        return ScoredImages(model, await self._run_of(model)(source, self.deadline), warnings, {})

    def _run_of(self, model: Model) -> Callable[[ImageSource, float], Awaitable[Scores]]:
        """Return the method that computes the scores of images until a deadline.

        Raises:
            BadRequest: The model has no full familiarity.
        """
        if not self.full_familiarity:
            return model.batcher.run
        if not isinstance(model.batcher, CascadeBatcher):
            raise BadRequest(
                f"familiarity=full compares both members of a cascade, and {model.card.name} is no cascade; leave "
                "familiarity out, or name a cascade as model"
            )
        return partial(model.batcher.run, full_familiarity=True)


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


def decoding_charge(request: Request, services: Services) -> Charge | None:
    """Return the function that charges the rate limit of predictions for decoding, or None without a limit."""
    return partial(access_of(request).charge_prediction, request) if services.settings.predict_rate_limit else None
