"""Decode the images of requests outside the event loop, and share the decoders among clients by CPU time.

    file -> quick lane: read the header, estimate the cost --up to 10 ms--> decoded there, in one of several threads
                                                           --up to 50 ms--> medium lane: a thread of lower priority
                                                           --more---------> costly lane: a process that can be ended

Each lane is a `FairQueue`: the client that has spent the least CPU time in the lane is next. The images of one request
are decoded one after the other, so that images of other requests get turns in between. While several clients wait, each
may have only its share of `max_queue` waiting images.
"""

import asyncio
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import BinaryIO, Generic, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from app.clients import FairShares
from app.decode_cost import MIB, DecodeCost
from app.decode_process import DecodeProcess
from app.exceptions import Problem, Unavailable
from app.fair_queue import FairQueue
from app.images import MAX_COST, EncodedImage
from app.settings import Settings
from app.workers import processors

_MAX_THREADS = 8
_MAX_PROCESSES = 2
_QUICK_SLOTS_PER_THREAD = 8  # a thread that has decoded one image takes the next without waiting for the event loop
_HEADER = DecodeCost(1, 32 * MIB)
_QUICK = DecodeCost(10, 32 * MIB)
MEDIUM = DecodeCost(50, 64 * MIB)
"""Largest cost that is decoded in a thread. A costlier image is decoded in a process, which can be killed."""

_MEDIUM_NICENESS = 5  # Linux gives each thread a nice value of its own
_RATE_UNIT_MS = 10  # estimated CPU time per unit of CIFAR100_PREDICT_RATE_LIMIT

File = tuple[str | None, BinaryIO]
"""Name and content of an uploaded image."""

Charge = Callable[[int], None]
"""Function that charges a client's rate limit a number of units, or raises TooManyRequests."""

Value = TypeVar("Value")


@dataclass
class _Lane:
    """A fair queue and the workers that serve it."""

    queue: FairQueue
    workers: Executor


@dataclass(eq=False)
class _Request:
    """The client, deadline and decoding progress of one request."""

    client: str
    deadline: float
    left: int
    """Number of images that are not decoded yet."""
    charge: Charge | None
    estimated_ms: float = 0.0
    charged_units: int = 1  # every request is charged one unit before its body is read

    def add_cost(self, cost: DecodeCost) -> None:
        """Charge the client for one more image.

        Raises:
            TooManyRequests: The client exceeds its rate limit.
        """
        self.estimated_ms += cost.cpu_ms
        units = max(1, math.ceil(self.estimated_ms / _RATE_UNIT_MS))
        if self.charge and units > self.charged_units:
            self.charge(units - self.charged_units)
            self.charged_units = units


class Decoders:
    """The threads and processes that decode images.

    Args:
        settings: Limits of an image, and the number of images that may wait.
    """

    def __init__(self, settings: Settings):
        self._settings = settings
        count = min(processors(), _MAX_THREADS)
        slots = _QUICK_SLOTS_PER_THREAD * count
        self._quick = _Lane(FairQueue(slots, slots * _QUICK.memory_bytes), ThreadPoolExecutor(count, "decoder"))
        count = max(1, count - 1)
        self._medium = _Lane(
            FairQueue(count, count * MEDIUM.memory_bytes),
            ThreadPoolExecutor(count, "medium-decoder", initializer=_lower_priority),
        )
        count = min(processors(), _MAX_PROCESSES)
        self._costly = _Lane(FairQueue(count, MAX_COST.memory_bytes), ThreadPoolExecutor(count, "costly-decoder"))
        self._idle_processes = SimpleQueue[DecodeProcess]()
        limits = settings.max_image_bytes, settings.max_image_pixels
        self._processes = [DecodeProcess(*limits) for _ in range(count)]
        for process in self._processes:
            self._idle_processes.put(process)
        self._waiting = FairShares(settings.max_queue)
        self._held_up = FairShares(settings.max_queue)

    @property
    def waiting(self) -> int:
        """Number of images of current requests that are not decoded yet, without those that `held_up` counts."""
        return self._waiting.total

    @property
    def held_up(self) -> int:
        """Number of costly images that wait, and of the images that follow them in their requests."""
        return self._held_up.total

    def is_full_for(self, client: str) -> bool:
        """Return True if another request of this client should be refused before its body is read.

        A client with a full share of waiting costly images counts as full, because such requests are cheap to send and
        expensive to parse.
        """
        return self._waiting.exceeds_share(client, 1) or self._held_up.exceeds_share(client, 1)

    async def decode(
        self, files: Sequence[File], client: str, deadline: float, charge: Charge | None = None
    ) -> NDArray[np.uint8]:
        """Decode the images of a request.

        Args:
            files: Names and open files. They must stay open until this returns.
            client: Client whose share of the decoders the images use.
            deadline: Time on the monotonic clock. An image whose decoding has not begun by then is refused.
            charge: Function that is called with the rate units of the estimated cost beyond the first unit.

        Returns:
            uint8 [N, 3, 32, 32].

        Raises:
            Unavailable: Too many images are waiting, or the deadline has passed.
            TooManyRequests: The error that `charge` raises.
            Problem: An image cannot be decoded. If the request has several images, the message names the file.
        """
        if self._waiting.exceeds_share(client, len(files)):
            raise Unavailable(f"{self.waiting} images are waiting to be decoded already; try again later")
        request = _Request(client, deadline, len(files), charge)
        pixels = list[NDArray[np.uint8]]()
        self._waiting.add(client, len(files))
        try:
            for name, file in files:
                try:
                    pixels.append(await self._decode(request, file))
                except Problem as error:
                    if len(files) > 1:
                        error.detail = f"{name}: {error.detail}"
                    raise
                request.left -= 1
                self._waiting.remove(client, 1)
        finally:
            self._waiting.remove(client, request.left)
        return np.stack(pixels)

    async def _decode(self, request: _Request, file: BinaryIO) -> NDArray[np.uint8]:
        limits = self._settings.max_image_bytes, self._settings.max_image_pixels

        def decode_if_quick() -> tuple[DecodeCost, NDArray[np.uint8] | EncodedImage]:
            if time.monotonic() > request.deadline:  # the image has waited for a thread
                raise _late()
            file.seek(0)
            image = EncodedImage(file.read(limits[0] + 1), *limits)
            return image.cost, image if image.cost.exceeds(_QUICK) else image.decode()

        cost, result = await self._run(self._quick, request, _HEADER, partial(_measure, decode_if_quick))
        request.add_cost(cost)
        if not isinstance(result, EncodedImage):
            return result
        if not cost.exceeds(MEDIUM):
            return await self._run(self._medium, request, cost, partial(_measure, result.decode))
        del result  # the process reads the file again
        with self._hold_up(request):
            return await self._run(self._costly, request, cost, partial(self._decode_apart, file))

    def _decode_apart(self, file: BinaryIO) -> "_Outcome[NDArray[np.uint8]]":
        file.seek(0)
        process = self._idle_processes.get()
        try:
            result, cpu_s = process.decode(file.read(self._settings.max_image_bytes + 1))
        finally:
            self._idle_processes.put(process)
        return _Outcome(None, result, cpu_s) if isinstance(result, Problem) else _Outcome(result, None, cpu_s)

    @contextmanager
    def _hold_up(self, request: _Request) -> Iterator[None]:
        """Count a request's remaining images in `held_up` while one of them is costly. They delay no other request."""
        count = request.left
        if self._held_up.exceeds_share(request.client, count):
            raise Unavailable(f"{self.held_up} images wait for costly ones already; try again later")
        self._waiting.remove(request.client, count)
        self._held_up.add(request.client, count)
        try:
            yield
        finally:
            self._held_up.remove(request.client, count)
            self._waiting.add(request.client, count)

    async def _run(
        self, lane: _Lane, request: _Request, cost: DecodeCost, work: "Callable[[], _Outcome[Value]]"
    ) -> Value:
        """Run work in a lane when it is the client's turn.

        Raises:
            Unavailable: The deadline has passed before the turn.
        """
        try:
            turn = await lane.queue.enter(request.client, cost, request.deadline - time.monotonic())
        except TimeoutError:
            raise _late() from None
        running = lane.workers.submit(work)
        loop = asyncio.get_running_loop()
        try:
            outcome = await asyncio.wrap_future(running)
        except asyncio.CancelledError:
            # The turn lasts until the thread has finished, because a thread cannot be cancelled.
            def leave(_: object) -> None:
                with suppress(RuntimeError):  # the event loop is closed
                    loop.call_soon_threadsafe(lane.queue.leave, turn, cost.cpu_ms / 1000)

            running.add_done_callback(leave)
            raise
        lane.queue.leave(turn, outcome.cpu_s)
        return outcome.get()

    def close(self) -> None:
        """Shut down the threads and kill the processes."""
        for lane in (self._quick, self._medium, self._costly):
            lane.workers.shutdown(wait=False)
        for process in self._processes:
            process.close()


@dataclass(slots=True)
class _Outcome(Generic[Value]):
    """The result or error of work, and its CPU time in seconds."""

    value: Value | None
    error: Exception | None
    cpu_s: float

    def get(self) -> Value:
        if self.error:
            raise self.error
        return cast(Value, self.value)


def _measure(work: Callable[[], Value]) -> _Outcome[Value]:
    started = time.thread_time()
    try:
        value, error = work(), None
    except Exception as raised:
        value, error = None, raised
    return _Outcome(value, error, time.thread_time() - started)


def _late() -> Unavailable:
    return Unavailable("the image waited longer than the deadline to be decoded; try again later")


def _lower_priority() -> None:
    if sys.platform == "linux":
        os.nice(_MEDIUM_NICENESS)
