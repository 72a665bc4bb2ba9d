"""Dynamic batching: the engine computes all images together that were queued while it was busy.

    run(images) -----------------------> queue -> [engine thread: decode --> compute] -> scores
    run(image) -> [decoder thread] --------^

A batch starts at once when the engine is idle, so a lone request never waits. The engine thread takes the next batch
itself, so it does not idle while the event loop answers the previous batch. It wakes the event loop once per batch. On
a single processor the event loop computes a lone image itself if that takes little time.
While photos keep all processors busy with decoding, a small batch waits up to 20 ms for more of them. No processor
idles meanwhile, and an image takes less CPU time in a large batch.
The queue is bounded. Work whose deadline has passed or whose client has disconnected is dropped before it is computed.
Work in the background, such as masked images of an explanation, waits until no prediction does.

Decoding images or ranking classes for a whole batch in one loop takes half the time of the same work done request by
request, because other code evicts the processor's caches between two requests.
"""

import asyncio
import logging
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from app.exceptions import Unavailable
from app.inference.decoding import QuickImage
from training.runtimes.engine import Engine

log = logging.getLogger(__name__)

# On a single CPU, a lone image that takes less time than this is computed in the event loop. Waking the engine thread
# and then the loop would take a fifth of the computation time. An engine thread with a CPU of its own computes while
# the loop receives requests.
_BRIEF_S = 0.005

# On a single CPU, the nice value of the engine thread, so that the event loop sends 503 responses promptly under
# overload. Without it they would wait tens of milliseconds. Linux gives each thread its own nice value.
_NICENESS = 5

# While photos keep all processors busy, a batch waits for more of them until it has so many images or so much time has
# passed.
_ENOUGH_IMAGES = 16
_MAX_GATHERING_S = 0.02

_NO_IMAGES = np.empty((0, 3, 32, 32), np.uint8)
_BACKGROUND_BATCH = 16  # images in a batch of background work; a prediction may wait for one such batch

Images = NDArray[np.uint8]
ImageSource = Images | Callable[[], NDArray[np.uint8]] | QuickImage
"""Images, uint8 [N, 3, 32, 32], a fast function that decodes one image to uint8 [3, 32, 32], or an image that a decoder
thread decodes."""

Logits = NDArray[np.float32]
Probabilities = NDArray[np.float64]
Ranking = tuple[NDArray[np.int64], Probabilities]
"""Class ids [N, classes], most probable first, and their probabilities [N, classes]."""


class BatchOutput:
    """Logits of a batch, float32 [N, classes], and values of all its rows, which are computed on first use.

    Args:
        logits: The logits.
        familiarity: Scores of the rows, if another output than these logits gives them.
        times: Times of the batch, if an engine has computed all of it.
    """

    def __init__(
        self, logits: Logits, familiarity: NDArray[np.float64] | None = None, times: "BatchTimes | None" = None
    ):
        self.logits = logits
        self.times = times
        self._familiarity = familiarity

    @cached_property
    def _softmax(self) -> tuple[Probabilities, NDArray[np.float64]]:
        """Probabilities of all rows, and the logarithm of the sum of the exponentials of their logits, [N, 1]."""
        highest = self.logits.max(1, keepdims=True)
        exponentials = np.exp(self.logits.astype(np.float64) - highest)
        sums = exponentials.sum(1, keepdims=True)
        return exponentials / sums, highest + np.log(sums)

    @property
    def probabilities(self) -> Probabilities:
        """Probabilities of all rows, float64 [N, classes], in the order of the class ids."""
        return self._softmax[0]

    @property
    def familiarity(self) -> NDArray[np.float64]:
        """Score of all rows, float64 [N], see `training.store.FamiliarityThreshold`."""
        return self._softmax[1][:, 0] if self._familiarity is None else self._familiarity

    @cached_property
    def ranking(self) -> Ranking:
        """Class ids and probabilities of all rows, most probable class first."""
        order = np.argsort(-self.probabilities, axis=1, kind="stable")
        rows = np.arange(len(order))[:, None]
        return order, self.probabilities[rows, order]

    @cached_property
    def confidence(self) -> NDArray[np.float64]:
        """Probability of the most probable class of each row, float64 [N]."""
        confidence: NDArray[np.float64] = self.probabilities.max(1)
        return confidence


class Scores(NamedTuple):
    """The scores of one request's images: some or all rows of the batch that contained them."""

    output: BatchOutput
    rows: slice = slice(None)

    @property
    def logits(self) -> Logits:
        """Logits of the request's images, float32 [N, classes]."""
        return self.output.logits[self.rows]

    @property
    def ranking(self) -> Ranking:
        """Class ids and probabilities of the request's images, most probable class first."""
        order, probabilities = self.output.ranking
        return order[self.rows], probabilities[self.rows]

    @property
    def confidence(self) -> NDArray[np.float64]:
        """Probability of the most probable class of each of the request's images, float64 [N]."""
        return self.output.confidence[self.rows]

    @property
    def probabilities(self) -> Probabilities:
        """Probabilities of the request's images, float64 [N, classes], in the order of the class ids."""
        return self.output.probabilities[self.rows]

    @property
    def familiarity(self) -> NDArray[np.float64]:
        """Score of the request's images, float64 [N], see `training.store.FamiliarityThreshold`."""
        return self.output.familiarity[self.rows]


class BatchTimes(NamedTuple):
    """The size of a computed batch and the seconds that its parts took."""

    started: float
    """Time of `time.perf_counter` at which the batch left the queue."""
    images: int
    waiting_s: list[float]
    """Time in the queue of each request."""
    has_decoded: bool
    """True if images were decoded with the batch."""
    decoding_s: float
    computing_s: float


class EngineBatcher(Protocol):
    """The queue of one engine: a `Batcher`, or an `app.distributed.remote_batcher.RemoteBatcher`."""

    max_batch: int
    """Largest number of images in a request."""
    max_queue: int
    """Largest number of waiting images."""

    @property
    def engine_name(self) -> str:
        """Name of the engine, such as openvino-int8."""
        ...

    @property
    def queued(self) -> int:
        """Number of waiting images, without those in the background."""
        ...

    @property
    def waiting(self) -> int:
        """Number of all waiting images."""
        ...

    async def run(self, images: ImageSource, deadline: float | None = None, accepted: bool = False) -> Scores:
        """Compute the scores of images, see `Batcher.run`."""
        ...

    async def run_in_background(self, images: Images, deadline: float | None = None) -> Probabilities:
        """Compute the probabilities of images with low priority, see `Batcher.run_in_background`."""
        ...


@dataclass(eq=False, slots=True)
class _BatchItem:
    images: Images | Callable[[], NDArray[np.uint8]]
    count: int
    result: asyncio.Future[Scores]
    deadline: float | None
    arrived: float = field(default_factory=time.perf_counter)


class Batcher:
    """The queue of one engine and the thread that computes its batches. It needs no closing; dropping it is enough.

    Args:
        engine: The engine. It is called with up to `max_batch` images, by one thread at a time.
        max_batch: Largest number of images in a batch.
        max_queue: Largest number of waiting images.
        observe: Callback with the times of each batch. It runs in the thread that computed the batch.
        shares_cpu: True if the engine thread and the event loop share a single CPU.
        busy_photos: Number of photos in decoding that keeps all CPUs busy. While there are more, a small batch waits.
        trace: Callback with the time of `time.perf_counter` at which a request joined the queue, and the times of its
            batch. It runs in the task of the request.
    """

    def __init__(
        self,
        engine: Engine,
        max_batch: int,
        max_queue: int,
        observe: Callable[[BatchTimes], None] = lambda _: None,
        shares_cpu: bool = False,
        busy_photos: float = math.inf,
        trace: Callable[[float, BatchTimes], None] | None = None,
    ):
        self.engine = engine
        self._trace = trace
        self._observe = observe
        self.max_batch = max_batch
        self.max_queue = max_queue
        self.queued = 0
        """Number of waiting images, without those in the background."""
        self.queued_in_background = 0
        """Number of images that wait in the background."""
        self._queue: deque[_BatchItem] = deque()
        self._background: deque[_BatchItem] = deque()
        self._busy = False  # a thread or the event loop will look into the queue again
        self._decoding = 0  # photos that decoder threads will add to the queue
        self._busy_photos = busy_photos
        self._gathered = threading.Event()  # cleared while the engine thread waits for more photos
        self._gathered.set()
        self._brief_s = _BRIEF_S if shares_cpu else 0.0
        self._lone_s = math.inf  # duration of the last batch of one image
        self._lock = threading.Lock()
        niceness = _NICENESS if shares_cpu and sys.platform == "linux" else 0
        self._thread = ThreadPoolExecutor(1, engine.name, initializer=os.nice, initargs=(niceness,))

    @property
    def engine_name(self) -> str:
        """Name of the engine, such as openvino-int8."""
        return self.engine.name

    @property
    def waiting(self) -> int:
        """Number of all waiting images."""
        return self.queued + self.queued_in_background

    async def run(self, images: ImageSource, deadline: float | None = None, accepted: bool = False) -> Scores:
        """Compute the scores of images.

        Args:
            images: At most `max_batch` images, uint8 [N, 3, 32, 32], a function that decodes one image, which is called
                when its batch starts, or an image that a decoder thread decodes.
            deadline: Time on the monotonic clock. Work that has not started by then is refused.
            accepted: True for images of a request that another batcher has accepted. A full queue takes them as well.

        Raises:
            ValueError: There are more than `max_batch` images.
            Unavailable: The queue is full, or the deadline has passed.
            Exception: The error that decoding or the engine raised.
        """
        if isinstance(images, QuickImage):
            return await self._run_decoding(images, deadline)
        count = 1 if callable(images) else len(images)
        if count > self.max_batch:
            raise ValueError(f"{count} images at once, the limit is {self.max_batch}")
        loop = asyncio.get_running_loop()
        work = _BatchItem(images, count, loop.create_future(), deadline)
        if self._enqueue(work, accepted):
            loop.call_soon(self._start, loop)  # requests that arrive in this turn of the loop join the batch
        return await self._await(work)

    async def _run_decoding(self, image: QuickImage, deadline: float | None) -> Scores:
        """Compute the scores of an image that a decoder thread decodes, see `run`.

        The event loop is not woken between decoding and computing.
        """
        loop = asyncio.get_running_loop()
        work = _BatchItem(_NO_IMAGES, 1, loop.create_future(), deadline)
        with self._lock:
            self._decoding += 1
        try:
            image.start(partial(self._add_decoded, loop, work))
        except Unavailable:
            self._end_decoding()
            raise
        try:
            return await self._await(work)
        finally:
            if image.stop():
                self._end_decoding()

    async def _await(self, work: _BatchItem) -> Scores:
        try:
            scores = await work.result
        except asyncio.CancelledError:
            self._forget(work)
            raise
        if self._trace and scores.output.times:
            self._trace(work.arrived, scores.output.times)
        return scores

    def _add_decoded(self, loop: asyncio.AbstractEventLoop, work: _BatchItem, decoded: Images | Exception) -> None:
        """Add an image to the queue, in the thread that has decoded it."""
        try:
            if isinstance(decoded, Exception):
                raise decoded
            work.images, work.arrived = decoded, time.perf_counter()
            idle = self._enqueue(work)
        except Exception as error:
            _call_in_loop(loop, _set_error, [work], error)
        else:
            if idle and self._brief_s:
                _call_in_loop(loop, self._start, loop)
            elif idle:
                self._thread.submit(self._run_batches, loop)
        self._end_decoding()

    def _end_decoding(self) -> None:
        """Count a photo as decoded, and let the engine thread go on if it need not wait for more of them."""
        with self._lock:
            self._decoding -= 1
            goes_on = not (self._gathered.is_set() or self._expects_photos())
        if goes_on:
            self._gathered.set()

    def _expects_photos(self) -> bool:
        """Return True if a batch should wait for photos that are being decoded. The caller holds the lock."""
        return self._decoding > self._busy_photos and 0 < self.queued < min(_ENOUGH_IMAGES, self.max_batch)

    def _gather(self) -> None:
        """Wait for more photos, in the engine thread."""
        with self._lock:
            if not self._expects_photos():
                return
            self._gathered.clear()
        self._gathered.wait(_MAX_GATHERING_S)

    def _enqueue(self, work: _BatchItem, accepted: bool = False) -> bool:
        """Append work to the queue. Returns True if the caller must start the engine, because it is idle.

        Raises:
            Unavailable: The queue is full.
        """
        with self._lock:
            if self._queue and self.queued + work.count > self.max_queue and not accepted:
                raise Unavailable(f"{self.queued} images are waiting already; try again later", "queue_full")
            self._queue.append(work)
            self.queued += work.count
            idle, self._busy = not self._busy, True
        return idle

    async def run_in_background(self, images: Images, deadline: float | None = None) -> Probabilities:
        """Compute the probabilities of images in small batches, each of them when no prediction waits.

        Args:
            images: uint8 [N, 3, 32, 32].
            deadline: Time on the monotonic clock. Batches that have not started by then are refused.

        Returns:
            float64 [N, classes], in the order of the class ids.

        Raises:
            Unavailable: The queue is full, or the deadline has passed.
            Exception: The error that the engine raised.
        """
        loop, size = asyncio.get_running_loop(), min(_BACKGROUND_BATCH, self.max_batch)
        chunks = (images[start : start + size] for start in range(0, len(images), size))
        works = [_BatchItem(chunk, len(chunk), loop.create_future(), deadline) for chunk in chunks]
        with self._lock:
            if self.waiting and self.waiting + len(images) > self.max_queue:
                raise Unavailable(f"{self.waiting} images are waiting already; try again later", "queue_full")
            self._background.extend(works)
            self.queued_in_background += len(images)
            idle, self._busy = not self._busy, True
        if idle:
            loop.call_soon(self._start, loop)
        try:
            scores = await asyncio.gather(*(work.result for work in works))
        except BaseException:
            self._forget_background(works)
            raise
        return np.concatenate([each.probabilities for each in scores])

    def _forget(self, work: _BatchItem) -> None:
        """Remove work from the queue, if it still waits, to free its place."""
        with self._lock, suppress(ValueError):
            self._queue.remove(work)
            self.queued -= work.count

    def _forget_background(self, works: list[_BatchItem]) -> None:
        with self._lock:
            for work in works:
                work.result.cancel()
                with suppress(ValueError):
                    self._background.remove(work)
                    self.queued_in_background -= work.count

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        if self.queued == 1 and not self._background and self._lone_s < self._brief_s:
            self._run_batches(loop)
        else:
            self._thread.submit(self._run_batches, loop)

    def _run_batches(self, loop: asyncio.AbstractEventLoop) -> None:
        """Compute batches until the queue is empty."""
        while True:
            self._gather()
            if not (batch := self._next_batch(loop)):
                return
            started = time.perf_counter()
            pixels, batch = _decode_batch(loop, batch)
            if not batch:
                continue
            self._compute(loop, pixels, batch, started)
            if len(pixels) == len(pixels[0]) == 1:
                self._lone_s = time.perf_counter() - started

    def _compute(
        self, loop: asyncio.AbstractEventLoop, pixels: list[Images], batch: list[_BatchItem], started: float
    ) -> None:
        decoded = time.perf_counter()
        try:
            images = pixels[0] if len(pixels) == 1 else np.concatenate(pixels)
            logits = self.engine(images)
        except Exception as error:  # every request of the batch gets the engine's error
            _call_in_loop(loop, _set_error, batch, error)
            return
        computing_s = time.perf_counter() - decoded
        waiting_s = [started - work.arrived for work in batch]
        has_decoded = any(callable(work.images) for work in batch)
        times = BatchTimes(started, len(images), waiting_s, has_decoded, decoded - started, computing_s)
        _call_in_loop(loop, _set_results, batch, BatchOutput(logits, times=times))
        try:
            self._observe(times)
        except Exception:  # a failing metric must not stop the engine
            log.exception("the metrics of a batch could not be recorded")

    def _next_batch(self, loop: asyncio.AbstractEventLoop) -> list[_BatchItem]:
        batch: list[_BatchItem] = []
        late: list[_BatchItem] = []
        room = self.max_batch
        now = time.monotonic()
        with self._lock:
            while self._queue and self._queue[0].count <= room:
                work = self._queue.popleft()
                self.queued -= work.count
                if work.result.done():  # the client has disconnected
                    continue
                if work.deadline is not None and now > work.deadline:
                    late.append(work)
                    continue
                batch.append(work)
                room -= work.count
            while self._background and not batch:
                work = self._background.popleft()
                self.queued_in_background -= work.count
                if work.result.done():
                    continue
                (late if work.deadline is not None and now > work.deadline else batch).append(work)
            self._busy = bool(batch)
        if late:
            _call_in_loop(loop, _set_late, late)
        return batch


def _call_in_loop(loop: asyncio.AbstractEventLoop, tell: Callable[..., None], *what: Any) -> None:
    with suppress(RuntimeError):  # the event loop is closed, and no request waits
        loop.call_soon_threadsafe(tell, *what)


def _decode_batch(loop: asyncio.AbstractEventLoop, batch: list[_BatchItem]) -> tuple[list[Images], list[_BatchItem]]:
    """Decode a batch.

    Returns:
        The images and the work items that they belong to. A work item whose image fails gets the exception.
    """
    pixels: list[Images] = []
    left: list[_BatchItem] = []
    for work in batch:
        try:
            pixels.append(work.images()[None] if callable(work.images) else work.images)
        except Exception as error:
            _call_in_loop(loop, _set_error, [work], error)
        else:
            left.append(work)
    return pixels, left


def _set_results(batch: list[_BatchItem], output: BatchOutput) -> None:
    start = 0
    for work in batch:
        rows = slice(start, start + work.count)
        if not work.result.done():
            work.result.set_result(Scores(output, rows))
        start = rows.stop


def _set_late(late: list[_BatchItem]) -> None:
    for work in late:
        _set_error([work], Unavailable("the request waited longer than its deadline; try again later", "deadline"))


def _set_error(batch: list[_BatchItem], error: Exception) -> None:
    for work in batch:
        if not work.result.done():
            work.result.set_exception(error)
