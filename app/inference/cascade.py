"""Serve a cascade: two batchers, and the images that the first one sends on to the second.

    run(images) -> batcher of the first member --confident--> scores
                                               --else-------> batcher of the second member -> mean -> scores

Each request waits for its own images only. An image that is sent on joins the queue of the second member, and the rest
of its batch is answered meanwhile. The batchers also serve the members on their own, so both kinds of requests share
queues and batches.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
from numpy.typing import NDArray

from app.exceptions import Unavailable
from app.inference.batching import BatchOutput, EngineBatcher, Images, ImageSource, Logits, Probabilities, Scores
from training.runtimes.cascade import answer, average, join_names
from training.store import Cascade


class CascadeBatcher:
    """The batchers of both members of a cascade. It has the interface of `Batcher`.

    Args:
        cascade: Threshold, weights and temperature.
        first: Batcher of the first member, which computes every image.
        second: Batcher of the second member, which computes the images that are sent on.
        observe: Callback with the number of images of a request and the number of these that are sent on.
        trace: Function that returns a span of the images that are sent on, given their number.
    """

    def __init__(
        self,
        cascade: Cascade,
        first: EngineBatcher,
        second: EngineBatcher,
        observe: Callable[[int, int], None],
        trace: Callable[[int], AbstractContextManager[object]] = nullcontext,
    ):
        self.engine_name = join_names(first.engine_name, second.engine_name)
        self.max_batch = min(first.max_batch, second.max_batch)
        self.max_queue = first.max_queue
        self._cascade = cascade
        self._first = first
        self._second = second
        self._observe = observe
        self._trace = trace

    @property
    def queued(self) -> int:
        """Number of images that wait for either member, including those of requests for a member alone."""
        return self._first.queued + self._second.queued

    @property
    def waiting(self) -> int:
        """Number of images that wait for either member, including those in the background."""
        return self._first.waiting + self._second.waiting

    async def run(self, images: ImageSource, deadline: float | None = None, full_familiarity: bool = False) -> Scores:
        """Compute the scores of images, see `Batcher.run`.

        A request is refused if both queues together are full. An image that is sent on is never refused for a full
        queue, because its request was accepted. The queue of the second member may thus exceed `max_queue` by one
        batch. The deadline holds for the start of both parts.

        Args:
            images: See `Batcher.run`.
            deadline: See `Batcher.run`.
            full_familiarity: True if both members compute all images, and the familiarity is their agreement. False if
                it is the energy of the first member. The probabilities are the same.
        """
        source = _KeptImage(images) if callable(images) else images
        count = len(source) if isinstance(source, np.ndarray) else 1
        if self.queued and self.queued + count > self.max_queue:
            raise Unavailable(f"{self.queued} images are waiting already; try again later", "queue_full")
        scores = await self._first.run(source, deadline)
        unsure = scores.confidence < self._cascade.threshold
        sent_on = np.ones_like(unsure) if full_familiarity else unsure
        self._observe(count, int(sent_on.sum()))
        if not sent_on.any():
            return scores
        pixels = source[sent_on] if isinstance(source, np.ndarray) else source.pixels
        with self._trace(int(sent_on.sum())):
            second = (await self._second.run(pixels, deadline, accepted=True)).logits
        logits = answer(self._cascade, scores.logits, np.flatnonzero(unsure), second[unsure[sent_on]])
        if full_familiarity:
            return Scores(BatchOutput(logits, BatchOutput(average(scores.logits, second)).familiarity))
        return Scores(BatchOutput(logits, scores.familiarity))

    async def run_in_background(self, images: Images, deadline: float | None = None) -> Probabilities:
        """Compute the probabilities of images in the background, see `Batcher.run_in_background`."""
        first = await self._first.run_in_background(images, deadline)
        rows = np.flatnonzero(first.max(1) < self._cascade.threshold)
        if not len(rows):
            return first
        second = await self._second.run_in_background(images[rows], deadline)
        return BatchOutput(answer(self._cascade, _log(first), rows, _log(second))).probabilities


def _log(probabilities: Probabilities) -> Logits:
    return np.log(np.maximum(probabilities, np.finfo(np.float32).tiny)).astype(np.float32)


class _KeptImage:
    """A function that decodes an image as another one does, and keeps its pixels for the second member."""

    def __init__(self, decode: Callable[[], NDArray[np.uint8]]):
        self._decode = decode
        self.pixels: Images = np.empty((0, 3, 32, 32), np.uint8)
        """uint8 [1, 3, 32, 32] after the call."""

    def __call__(self) -> NDArray[np.uint8]:
        image = self._decode()
        self.pixels = image[None]
        return image
