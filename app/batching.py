"""Dynamic batches: what has queued while the engine was busy is computed together.

    run(images) -> queue -> [engine thread: decode --> compute] -> scores

A batch starts at once when the engine is idle; there is no timer, so a lone request never waits. The engine's thread
takes the next batch itself, so it does not idle while the event loop answers the last one, which it wakes once per
batch. Where that thread has no processor of its own, a lone image that takes little time is computed in the event loop.
The queue is bounded; work whose deadline has passed or whose client has gone is dropped before it is computed.

What is done for a whole batch in a row, be it decoding or ranking classes, takes half the time of what is done for each
request by itself, which finds the processor's caches full of something else.
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
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from app.engines import Engine
from app.exceptions import Unavailable
from app.workers import processors

log = logging.getLogger(__name__)

_SHARED = processors() == 1  # by the engine's thread and the event loop

# Waking a thread, and then the loop again, would take a fifth as long as the computation itself. With a processor for
# the thread, though, the loop does better to receive what else arrives.
_BRIEF_S = 0.005 if _SHARED else 0.0

# How far the engine's thread gives way to the loop, which has little to do at a time; where more comes than can be
# computed, refusals would wait otherwise for tens of milliseconds. On Linux a thread has a niceness of its own.
_NICENESS = 5 if _SHARED and sys.platform == "linux" else 0

Images = NDArray[np.uint8]
Source = Images | Callable[[], NDArray[np.uint8]]
"""Images [N, 3, 32, 32], or what decodes a single one [3, 32, 32] in little time."""

Logits = NDArray[np.float32]
Ranking = tuple[NDArray[np.int64], NDArray[np.float64]]
"""Classes [N, classes], most probable first, and their probabilities."""


class Computed:
    """Logits [N, classes] of a batch, and what follows from them, once somebody asks."""

    def __init__(self, logits: Logits):
        self.logits = logits

    @cached_property
    def ranking(self) -> Ranking:
        exponentials = np.exp(self.logits.astype(np.float64) - self.logits.max(1, keepdims=True))
        order = np.argsort(-exponentials, axis=1, kind="stable")
        return order, np.take_along_axis(exponentials, order, 1) / exponentials.sum(1, keepdims=True)


class Scores(NamedTuple):
    """Those of one request's images: some rows of the batch that they were computed in, or all."""

    computed: Computed
    rows: slice = slice(None)

    @property
    def logits(self) -> Logits:
        """float32 [N, classes]."""
        return self.computed.logits[self.rows]

    @property
    def ranking(self) -> Ranking:
        order, probabilities = self.computed.ranking
        return order[self.rows], probabilities[self.rows]


@dataclass(eq=False, slots=True)
class _Work:
    images: Source
    count: int
    result: asyncio.Future[Scores]
    deadline: float | None


class Batcher:
    """Feeds one engine. Lives as long as somebody holds it; there is nothing to close.

    Args:
        engine: called with up to `max_batch` images, by one thread at a time.
        max_batch: images computed together.
        max_queue: images that may wait.
        observe: told of every batch, where it was computed: how many images, and how many seconds they took.
    """

    def __init__(
        self, engine: Engine, max_batch: int, max_queue: int, observe: Callable[[int, float], None] = lambda *_: None
    ):
        self.engine = engine
        self._observe = observe
        self.max_batch = max_batch
        self.max_queue = max_queue
        self.queued = 0
        """Images waiting."""
        self._queue: deque[_Work] = deque()
        self._busy = False  # whether the queue will be looked into again
        self._lone_s = math.inf  # what the last image that was computed alone took
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, engine.name, initializer=os.nice, initargs=(_NICENESS,))

    async def run(self, images: Source, deadline: float | None = None) -> Scores:
        """What the engine makes of images.

        Args:
            images: at most `max_batch` of them; what decodes one is called with the others of its batch.
            deadline: of the monotonic clock; what has not been begun by then is refused.

        Raises:
            Unavailable: the queue is full, or the deadline passed.
            Exception: what decoding raised.
        """
        count = 1 if callable(images) else len(images)
        if count > self.max_batch:
            raise ValueError(f"{count} images at once, the limit is {self.max_batch}")
        loop = asyncio.get_running_loop()
        work = _Work(images, count, loop.create_future(), deadline)
        with self._lock:
            if self._queue and self.queued + count > self.max_queue:
                raise Unavailable(f"{self.queued} images are waiting already; try again later")
            self._queue.append(work)
            self.queued += count
            idle, self._busy = not self._busy, True
        if idle:
            loop.call_soon(self._begin, loop)  # with what else arrives in this turn of the loop
        try:
            return await work.result
        except asyncio.CancelledError:
            self._forget(work)
            raise

    def _forget(self, work: _Work) -> None:
        """Others may have its place in the queue, if it is still there."""
        with self._lock, suppress(ValueError):
            self._queue.remove(work)
            self.queued -= work.count

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        if self.queued == 1 and self._lone_s < _BRIEF_S:
            self._drain(loop)
        else:
            self._thread.submit(self._drain, loop)

    def _drain(self, loop: asyncio.AbstractEventLoop) -> None:
        """Compute until nothing waits."""
        while batch := self._next_batch(loop):
            started = time.perf_counter()
            pixels, batch = _decoded(loop, batch)
            if not batch:
                continue
            self._compute(loop, pixels, batch)
            if len(pixels) == len(pixels[0]) == 1:
                self._lone_s = time.perf_counter() - started

    def _compute(self, loop: asyncio.AbstractEventLoop, pixels: list[Images], batch: list[_Work]) -> None:
        started = time.perf_counter()
        try:
            images = pixels[0] if len(pixels) == 1 else np.concatenate(pixels)
            computed = Computed(self.engine(images))
        except Exception as error:  # the engine's failure belongs to those who wait for it
            _tell(loop, _fail, batch, error)
            return
        _tell(loop, _answer, batch, computed)
        try:
            self._observe(len(images), time.perf_counter() - started)
        except Exception:  # what is counted must not stop what is computed
            log.exception("a batch could not be counted")

    def _next_batch(self, loop: asyncio.AbstractEventLoop) -> list[_Work]:
        batch: list[_Work] = []
        late: list[_Work] = []
        room = self.max_batch
        now = time.monotonic()
        with self._lock:
            while self._queue and self._queue[0].count <= room:
                work = self._queue.popleft()
                self.queued -= work.count
                if work.result.done():  # the client has gone
                    continue
                if work.deadline is not None and now > work.deadline:
                    late.append(work)
                    continue
                batch.append(work)
                room -= work.count
            self._busy = bool(batch)
        if late:
            _tell(loop, _refuse, late)
        return batch


def _tell(loop: asyncio.AbstractEventLoop, tell: Callable[..., None], *what: Any) -> None:
    with suppress(RuntimeError):  # the event loop has ended, and with it all who wait
        loop.call_soon_threadsafe(tell, *what)


def _decoded(loop: asyncio.AbstractEventLoop, batch: list[_Work]) -> tuple[list[Images], list[_Work]]:
    """Images, and those whose they are: without those that cannot be decoded, which are told why."""
    pixels: list[Images] = []
    left: list[_Work] = []
    for work in batch:
        try:
            pixels.append(work.images()[None] if callable(work.images) else work.images)
        except Exception as error:
            _tell(loop, _fail, [work], error)
        else:
            left.append(work)
    return pixels, left


def _answer(batch: list[_Work], computed: Computed) -> None:
    start = 0
    for work in batch:
        rows = slice(start, start + work.count)
        if not work.result.done():
            work.result.set_result(Scores(computed, rows))
        start = rows.stop


def _refuse(late: list[_Work]) -> None:
    for work in late:
        _fail([work], Unavailable("the request waited longer than its deadline; try again later"))


def _fail(batch: list[_Work], error: Exception) -> None:
    for work in batch:
        if not work.result.done():
            work.result.set_exception(error)
