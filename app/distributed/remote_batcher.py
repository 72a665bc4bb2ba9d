"""Send the images of requests to the replicas of a model, in place of a `Batcher` in the HTTP process.

    run(images) -> pixels -> images in flight < max_queue -> Ray -> replica: queue -> engine -> logits
                                                              ^                |
                                                              +-- once more, if the replica dies

The HTTP process decodes the images and ranks the classes. The replica forms the batches. A deadline holds for the
answer of the replica, not for the start of the computation.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
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

_ATTEMPTS = 2  # a request is sent once more if its replica dies


class RemoteBatcher:
    """The replicas of one version of a model. It has the interface of `Batcher`.

    Args:
        handle: Handle of the deployment. It has called the deployment before, so that it is connected.
        application: Name of the deployment's application.
        engine_name: Name of the engine of the replicas.
        max_batch: Largest number of images in a request.
        max_queue: Largest number of images in flight: sent to the replicas and not answered.
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
        self._handle = handle
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
        sent = time.perf_counter()
        answer: Answer = await self._send("infer", pixels, deadline)
        times = _to_local_clock(answer, sent, time.perf_counter())
        if answer.is_first:
            self._observe(times)
        if self._trace:
            self._trace(sent, times)
        return Scores(BatchOutput(answer.logits, times=times))

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
