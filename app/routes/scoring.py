"""Compute the scores of a request's images, for all routes that predict.

files  --small-->    decoded with their batch --+--> Batcher of the model --> Scores
       --others--> Decoders --> pixels ---------+
pixels -----------------------------------------+
"""

import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from fastapi import Request

from app.dependencies import Services
from app.exceptions import BadRequest, TooLarge
from app.inference.batching import Images, ImageSource, Scores
from app.inference.cascade import CascadeBatcher
from app.inference.decoding import File
from app.inference.images.encoded import CostlyImage
from app.inference.pool import Model
from app.middleware.access import access_of, client_of


class ScoredImages(NamedTuple):
    """The model that scored a request's images, their scores, and the warnings about each image."""

    model: Model
    scores: Scores
    warnings: list[list[str]]


async def compute_scores(
    request: Request,
    services: Services,
    name: str | None,
    version: int | None,
    images: Sequence[File] | Images,
    deadline: float,
    full_familiarity: bool = False,
) -> ScoredImages:
    """Decode images and compute their scores. Count the request in the statistics of the model.

    Args:
        request: The request, whose client is charged for the decoding.
        services: The objects of the service.
        name: Name of the model. None for the default model.
        version: Version of the model. None for the live version.
        images: Encoded images, or uint8 [N, 3, 32, 32] with at most `max_batch` images.
        deadline: Time on the monotonic clock at which the request is refused if its computation has not started.
        full_familiarity: See `CascadeBatcher.run`.

    Raises:
        Problem: The model does not exist or has no full familiarity, an image cannot be decoded, or the service is
            overloaded.
    """
    started = time.perf_counter()
    try:
        scored, decoding_s = await _compute(request, services, name, version, images, deadline, full_familiarity)
    except Exception:
        if model := services.pool.peek(name, version):
            model.statistics.count_failure(time.perf_counter() - started)
        raise
    scored.model.statistics.count_success(len(scored.warnings), time.perf_counter() - started, decoding_s)
    return scored


async def _compute(
    request: Request,
    services: Services,
    name: str | None,
    version: int | None,
    images: Sequence[File] | Images,
    deadline: float,
    full_familiarity: bool,
) -> tuple[ScoredImages, float]:
    """Return the scores, and the seconds in which images were decoded before they joined a batch."""

    async def compute(source: ImageSource, warnings: list[list[str]]) -> ScoredImages:
        model = await services.pool.get(name, version)
        # No other task runs between these two lines, so the model cannot be swapped in between.
        return ScoredImages(model, await _find_run(model, full_familiarity)(source, deadline), warnings)

    if not isinstance(images, Sequence):
        return await compute(images, [[] for _ in images]), 0.0
    if decode := services.decoders.small_image_decoder(images):
        with suppress(TooLarge, CostlyImage):  # a file with few bytes may have many pixels or scans
            return await compute(decode, [[]]), 0.0
    model = await services.pool.get(name, version)
    _find_run(model, full_familiarity)  # an unsuitable model is refused before images are decoded for it
    charge = partial(access_of(request).charge_prediction, request) if services.settings.predict_rate_limit else None
    started = time.perf_counter()
    decoded = await services.decoders.decode(images, client_of(request), deadline, charge)
    decoding_s = time.perf_counter() - started
    return await compute(decoded.pixels, decoded.warnings), decoding_s


def _find_run(model: Model, full_familiarity: bool) -> Callable[[ImageSource, float], Awaitable[Scores]]:
    """Return the method that computes the scores of images until a deadline.

    Raises:
        BadRequest: The model has no full familiarity.
    """
    if not full_familiarity:
        return model.batcher.run
    if not isinstance(model.batcher, CascadeBatcher):
        raise BadRequest(
            f"familiarity=full compares both members of a cascade, and {model.card.name} is no cascade; leave "
            "familiarity out, or name a cascade as model"
        )
    return partial(model.batcher.run, full_familiarity=True)
