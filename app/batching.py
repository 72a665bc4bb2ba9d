"""Dynamic batches: what has queued while the engine was busy is computed together.

    run(images) -> queue -> [engine thread] -> logits

A batch starts at once when the engine is idle; there is no timer, so a lone request never waits. The engine's thread
takes the next batch itself, so it does not idle while the event loop answers the last one, which it wakes once per
batch. Where that thread has no processor of its own, a lone image that takes little time is computed in the event loop.
The queue is bounded; work whose deadline has passed or whose client has gone is dropped before it is computed.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.engines import Engine
from app.errors import Unavailable
from app.workers import processors

log = logging.getLogger(__name__)

# Waking a thread, and then the loop again, would take a fifth as long as the computation itself. With a processor for
# the thread, though, the loop does better to receive what else arrives.
_BRIEF_S = 0.005 if processors() == 1 else 0.0

Images = NDArray[np.uint8]
Logits = NDArray[np.float32]


@dataclass(eq=False, slots=True)
class _Work:
    images: Images
    result: asyncio.Future[Logits]
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
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=engine.name)

    async def run(self, images: Images, deadline: float | None = None) -> Logits:
        """Logits [N, classes] of uint8 images [N, 3, 32, 32].

        Args:
            images: at most `max_batch` of them.
            deadline: of the monotonic clock; what has not been begun by then is refused.

        Raises:
            Unavailable: the queue is full, or the deadline passed.
        """
        if len(images) > self.max_batch:
            raise ValueError(f"{len(images)} images at once, the limit is {self.max_batch}")
        loop = asyncio.get_running_loop()
        work = _Work(images, loop.create_future(), deadline)
        with self._lock:
            if self._queue and self.queued + len(images) > self.max_queue:
                raise Unavailable(f"{self.queued} images are waiting already; try again later")
            self._queue.append(work)
            self.queued += len(images)
            idle, self._busy = not self._busy, True
        if idle:
            loop.call_soon(self._begin, loop)  # with what else arrives in this turn of the loop
        return await work.result

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        if self.queued == 1 and self._lone_s < _BRIEF_S:
            self._drain(loop)
        else:
            self._thread.submit(self._drain, loop)

    def _drain(self, loop: asyncio.AbstractEventLoop) -> None:
        """Compute until nothing waits."""
        while batch := self._next_batch(loop):
            started = time.perf_counter()
            try:
                images = batch[0].images if len(batch) == 1 else np.concatenate([work.images for work in batch])
                logits = self.engine(images)
            except Exception as error:  # the engine's failure belongs to those who wait for it
                _tell(loop, _fail, batch, error)
                continue
            _tell(loop, _answer, batch, logits)
            seconds = time.perf_counter() - started
            if len(images) == 1:
                self._lone_s = seconds
            try:
                self._observe(len(images), seconds)
            except Exception:  # what is counted must not stop what is computed
                log.exception("a batch could not be counted")

    def _next_batch(self, loop: asyncio.AbstractEventLoop) -> list[_Work]:
        batch: list[_Work] = []
        late: list[_Work] = []
        room = self.max_batch
        now = time.monotonic()
        with self._lock:
            while self._queue and len(self._queue[0].images) <= room:
                work = self._queue.popleft()
                self.queued -= len(work.images)
                if work.result.done():  # the client has gone
                    continue
                if work.deadline is not None and now > work.deadline:
                    late.append(work)
                    continue
                batch.append(work)
                room -= len(work.images)
            self._busy = bool(batch)
        if late:
            _tell(loop, _refuse, late)
        return batch


def _tell(loop: asyncio.AbstractEventLoop, tell: Callable[..., None], *what: Any) -> None:
    with suppress(RuntimeError):  # the event loop has ended, and with it all who wait
        loop.call_soon_threadsafe(tell, *what)


def _answer(batch: list[_Work], logits: Logits) -> None:
    start = 0
    for work in batch:
        stop = start + len(work.images)
        if not work.result.done():
            work.result.set_result(logits[start:stop])
        start = stop


def _refuse(late: list[_Work]) -> None:
    for work in late:
        _fail([work], Unavailable("the request waited longer than its deadline; try again later"))


def _fail(batch: list[_Work], error: Exception) -> None:
    for work in batch:
        if not work.result.done():
            work.result.set_exception(error)
