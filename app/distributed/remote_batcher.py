"""Send the images of requests to the replicas of a model, in place of a `Batcher` in the HTTP process.

    run(images) -> pixels -> images gather -> call < 2 per replica -> Ray -> replica: queue -> engine -> logits
                                                                       ^                |
                                                                       +-- once more, if the replica dies

A call through Ray costs milliseconds of CPU time, for one image as for many. So at most two calls per replica are in
progress, and images gather meanwhile for the next one. The HTTP process decodes the images and ranks the classes. A
deadline holds for the answer of the replica, not for the start of the computation.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from app.distributed.replica import Answer, Refusal
from app.exceptions import Unavailable
from app.inference.batching import BatchOutput, BatchTimes, Images, ImageSource, Probabilities, Scores
from app.inference.decoding import QuickImage

log = logging.getLogger(__name__)

_ATTEMPTS = 2  # a call is sent once more if its replica dies
_CALLS = 2  # calls in progress per replica: one is computed while the next one is on its way


@dataclass(eq=False, slots=True)
class _Request:
    images: Images
    deadline: float | None
    result: asyncio.Future[Scores]
    arrived: float = field(default_factory=time.perf_counter)
    call: "_Call | None" = None


@dataclass(eq=False, slots=True)
class _Call:
    """One call of a replica with the images of several requests."""

    requests: list[_Request]
    task: "asyncio.Task[None] | None" = None

    def cancel_if_unwanted(self) -> None:
        """Cancel the call if no request waits for it any more."""
        if self.task and all(request.result.done() for request in self.requests):
            self.task.cancel()


class RemoteBatcher:
    """The replicas of one version of a model. It has the interface of `Batcher`.

    Args:
        handle: Handle of the deployment. It has called the deployment before, so that it is connected.
        application: Name of the deployment's application.
        engine_name: Name of the engine of the replicas.
        max_batch: Largest number of images in a request, and in a call.
        max_queue: Largest number of images in flight: gathered, or sent to the replicas, and not answered.
        observe: Callback with the times of each batch whose first request this process has sent.
        observe_decoding: Callback with the times of `time.perf_counter` before and after a small image was decoded. It
            runs in the task of the request.
        trace: See `Batcher`.
    """

    def __init__(
        self,
        handle: "DeploymentHandle[Any]",
        application: str,
        engine_name: str,
        max_batch: int,
        max_queue: int,
        observe: Callable[[BatchTimes], None] = lambda _: None,
        observe_decoding: Callable[[float, float], None] = lambda *_: None,
        trace: Callable[[float, BatchTimes], None] | None = None,
    ):
        self.application = application
        self.engine_name = engine_name
        self.max_batch = max_batch
        self.max_queue = max_queue
        self.queued = 0
        """Number of images in flight, without those in the background."""
        self.queued_in_background = 0
        """Number of images in flight in the background."""
        self.replicas = 1
        """Number of replicas that are ready."""
        self._handle = handle
        self._gathered = deque[_Request]()
        self._calls = set[_Call]()  # in progress
        self._observe = observe
        self._observe_decoding = observe_decoding
        self._trace = trace
        self._thread = ThreadPoolExecutor(1, "small-decoder")

    @property
    def waiting(self) -> int:
        """Number of all images in flight."""
        return self.queued + self.queued_in_background

    async def run(self, images: ImageSource, deadline: float | None = None, accepted: bool = False) -> Scores:
        """Compute the scores of images, see `Batcher.run`.

        Raises:
            ValueError: There are more than `max_batch` images.
            Unavailable: Too many images are in flight, the deadline has passed, or two replicas died in succession.
            Exception: The error that decoding or the engine raised.
        """
        if isinstance(images, QuickImage):
            images = await _decode_quick(images)
        count = 1 if callable(images) else len(images)
        if count > self.max_batch:
            raise ValueError(f"{count} images at once, the limit is {self.max_batch}")
        if self.queued and self.queued + count > self.max_queue and not accepted:
            self._refuse(self.queued)
        self.queued += count
        try:
            pixels = await self._decode_small(images) if callable(images) else images
            return await self._infer(pixels, deadline)
        finally:
            self.queued -= count

    async def run_in_background(self, images: Images, deadline: float | None = None) -> Probabilities:
        """Compute the probabilities of images with low priority, see `Batcher.run_in_background`.

        One replica computes all of them.
        """
        if self.waiting and self.waiting + len(images) > self.max_queue:
            self._refuse(self.waiting)
        self.queued_in_background += len(images)
        try:
            probabilities: Probabilities = await self._send("infer_in_background", images, deadline)
        finally:
            self.queued_in_background -= len(images)
        return probabilities

    def _refuse(self, waiting: int) -> NoReturn:
        raise Unavailable(f"{waiting} images are waiting already; try again later", "queue_full")

    async def _decode_small(self, decode: Callable[[], NDArray[np.uint8]]) -> Images:
        started = time.perf_counter()
        image = await asyncio.get_running_loop().run_in_executor(self._thread, decode)
        self._observe_decoding(started, time.perf_counter())
        return image[None]

    async def _infer(self, pixels: Images, deadline: float | None) -> Scores:
        """Let a replica compute the scores of images.

        Raises:
            Unavailable: See `run`.
            RayTaskError: The error that the engine raised.
        """
        request = _Request(pixels, deadline, asyncio.get_running_loop().create_future())
        self._gathered.append(request)
        self._start_calls()
        try:
            with _limit_time(deadline) as timeout_s:
                async with asyncio.timeout(timeout_s):
                    scores = await request.result
        finally:
            if request.call:
                request.call.cancel_if_unwanted()
        if self._trace and scores.output.times:
            self._trace(request.arrived, scores.output.times)
        return scores

    def _start_calls(self) -> None:
        """Send the gathered images, unless enough calls are in progress."""
        while self._gathered and len(self._calls) < _CALLS * self.replicas:
            requests, count = list[_Request](), 0
            while self._gathered and count + len(self._gathered[0].images) <= self.max_batch:
                request = self._gathered.popleft()
                if not request.result.done():  # its client has left, or its deadline has passed
                    requests.append(request)
                    count += len(request.images)
            if requests:
                call = _Call(requests)
                self._calls.add(call)
                call.task = asyncio.create_task(self._call_replica(call))
                for request in requests:
                    request.call = call

    async def _call_replica(self, call: _Call) -> None:
        """Compute the requests of a call, and set their results."""
        requests = call.requests
        try:
            scores = await self._compute([request.images for request in requests], _find_latest_deadline(requests))
            for request, each in zip(requests, scores, strict=True):
                if not request.result.done():
                    request.result.set_result(each)
        except Exception as error:
            for request in requests:
                if not request.result.done():
                    request.result.set_exception(error)
        finally:
            self._calls.discard(call)
            self._start_calls()

    async def _compute(self, images: list[Images], deadline: float | None) -> list[Scores]:
        """Compute the scores of several requests in one call."""
        pixels = images[0] if len(images) == 1 else np.concatenate(images)
        sent = time.perf_counter()
        answer: Answer = await self._send("infer", pixels, deadline)
        times = _to_local_clock(answer, sent, time.perf_counter())
        if answer.is_first:
            self._observe(times)
        output = BatchOutput(answer.logits, times=times)
        ends = np.cumsum([len(each) for each in images]).tolist()
        return [Scores(output, slice(end - len(each), end)) for end, each in zip(ends, images, strict=True)]

    async def _send(self, method: str, pixels: Images, deadline: float | None) -> Any:
        """Call a method of a replica, and once more if the replica dies.

        Raises:
            Unavailable: The deadline has passed, or the replica of the second call has died as well.
            RayTaskError: The error that the engine raised.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                with _limit_time(deadline) as timeout_s:
                    async with asyncio.timeout(timeout_s):
                        answer = await self._call(method, pixels, timeout_s)
            except RayTaskError:
                raise
            except (RayError, RayServeException) as error:
                log.warning("%s: attempt %d of a request has failed: %s", self.application, attempt, error)
                continue
            if isinstance(answer, Refusal):
                raise Unavailable(answer.detail, "deadline")
            return answer
        raise Unavailable(f"{_ATTEMPTS} replicas that had the request are not available any more; try again later")

    async def _call(self, method: str, pixels: Images, timeout_s: float | None) -> Any:
        response = getattr(self._handle, method).remote(pixels, timeout_s)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()  # the replica drops the request if its batch has not started
            raise


def _find_latest_deadline(requests: list[_Request]) -> float | None:
    """Return the time until which at least one request waits; None if one has no deadline."""
    latest = 0.0
    for request in requests:
        if request.deadline is None:
            return None
        latest = max(latest, request.deadline)
    return latest


@contextmanager
def _limit_time(deadline: float | None) -> Iterator[float | None]:
    """Yield the seconds until a time on the monotonic clock, or None, and translate a TimeoutError.

    Raises:
        Unavailable: The deadline has passed.
    """
    try:
        yield None if deadline is None else max(0.0, deadline - time.monotonic())
    except TimeoutError as error:
        if isinstance(error, RayError):
            raise
        raise Unavailable("the request waited longer than its deadline; try again later", "deadline") from None


def _to_local_clock(answer: Answer, sent: float, answered: float) -> BatchTimes:
    """Return the times of a batch, with a start on the clock of this process.

    The way to the replica is assumed to take as long as the way back.

    Args:
        answer: Answer of the replica.
        sent: Time of `time.perf_counter` at which the request was sent.
        answered: Time of `time.perf_counter` at which the answer arrived.
    """
    times = answer.times
    way_s = max(0.0, answered - sent - answer.queue_s - times.decoding_s - times.computing_s) / 2
    return times._replace(started=sent + way_s + answer.queue_s)


async def _decode_quick(image: QuickImage) -> Images:
    """Let a decoder thread decode an image.

    Returns:
        uint8 [1, 3, 32, 32].

    Raises:
        Unavailable: Too many images of the client are waiting, or the deadline has passed.
        Problem: The image cannot be decoded, or the quick lane does not decode it.
    """
    loop = asyncio.get_running_loop()
    decoded: asyncio.Future[Images] = loop.create_future()

    def deliver(result: Images | Exception) -> None:
        with suppress(RuntimeError):  # the event loop is closed, and no request waits
            loop.call_soon_threadsafe(_resolve, decoded, result)

    image.start(deliver)
    try:
        return await decoded
    finally:
        image.stop()


def _resolve(future: "asyncio.Future[Images]", result: Images | Exception) -> None:
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
