"""Decode the images of requests outside the event loop, and share the decoders among clients by CPU time.

    file -> quick lane: read the header, estimate the cost --up to 10 ms--> decoded there, in one of several threads
                                                           --up to 50 ms--> medium lane: a thread of lower priority
                                             --more, AVIF and HEIC--------> costly lane: a process that can be ended

A thread of the quick lane passes the pixels of a lone image on to the model's batcher itself. Otherwise the event loop
gets the pixels.

Each lane is a `FairThreads` pool: the client that has spent the least CPU time in the lane is next. The images of one
request are decoded one after the other, so that images of other requests get turns in between. While several clients
wait, each may have only its share of `max_queue` waiting images.
"""

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import BinaryIO, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from app.clients import FairShares
from app.exceptions import IMAGE_ERRORS, Problem, Unavailable
from app.inference.decode_process import DecodeProcess
from app.inference.fair_threads import FairThreads, Outcome, measure
from app.inference.images import encoded, jpeg
from app.inference.images.cost import DecodeCost
from app.inference.images.encoded import CostlyImage, EncodedImage
from app.machine import MIB, cpu_count
from app.settings import Settings

MAX_THREADS = 8
"""Largest number of threads of the quick lane."""
_MAX_PROCESSES = 2
_COSTLY_BYTES = 256 * MIB  # estimated memory of concurrent costly images; a larger one, up to MAX_COST, runs alone
_HEADER = DecodeCost(1, 32 * MIB)
_QUICK = DecodeCost(10, 32 * MIB)
MEDIUM = DecodeCost(50, 64 * MIB)
"""Largest cost that is decoded in a thread. A costlier image is decoded in a process, which can be killed."""

_SMALL = DecodeCost(5, 16 * MIB)
_PNG, _JPEG, _BMP, _WEBP = b"\x89PNG", b"\xff\xd8", b"BM", b"RIFF"
# Compressed chunks of a PNG. They may decompress to a thousand times their size, independent of the image size.
_ZTXT, _ITXT, _ICCP = b"zTXt", b"iTXt", b"iCCP"
_MAX_SMALL_SEGMENTS = 64  # Pillow reads each segment of a JPEG in Python
_MEDIUM_NICENESS = 5
_RATE_UNIT_MS = 10  # estimated CPU time per unit of CIFAR100_PREDICT_RATE_LIMIT

File = tuple[str | None, BinaryIO]
"""Name and content of an uploaded image."""

Charge = Callable[[int], None]
"""Function that charges a client's rate limit a number of units, or raises TooManyRequests."""

Lane = Literal["quick", "medium", "costly"]

Value = TypeVar("Value")


_Decoded = tuple[NDArray[np.uint8], list[str]]  # pixels and warnings of one image


class DecodedImages(NamedTuple):
    """The decoded images of a request, uint8 [N, 3, 32, 32], the warnings about each of them, and the errors.

    `errors` has the error of each image that cannot be decoded, by its number in the request.
    """

    pixels: NDArray[np.uint8]
    warnings: list[list[str]]
    errors: dict[int, Problem]


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


class QuickImage:
    """A lone image that a thread of the quick lane decodes and passes on to a batcher. Use it once.

    Args:
        decoders: The decoders.
        file: The image file. It must stay open until `stop`.
        client: Client whose share of the decoders the image uses.
        deadline: Time on the monotonic clock. The image is refused if its decoding has not begun by then.
    """

    def __init__(self, decoders: "Decoders", file: BinaryIO, client: str, deadline: float):
        self.pixels = np.empty((0, 3, 32, 32), np.uint8)
        """The decoded image, uint8 [1, 3, 32, 32]."""
        self.warnings = list[str]()
        """Warnings about the decoded image."""
        self.opened: EncodedImage | None = None
        """The image whose header has been read, if the quick lane does not decode it."""
        self.decoding_s = 0.0
        """Seconds from `start` until the image was decoded."""
        self._decoders = decoders
        self._file = file
        self._client = client
        self._deadline = deadline

    def start(self, deliver: Callable[[NDArray[np.uint8] | Exception], None]) -> None:
        """Start to decode the image.

        Args:
            deliver: Function that the thread calls with `pixels` or an error. The error is `CostlyImage` if the quick
                lane does not decode the image.

        Raises:
            Unavailable: Too many images of the client are waiting.
        """
        self._deliver = deliver
        self._started = time.perf_counter()
        self._decoders.add_waiting(self._client, 1)
        self._turn = self._decoders.quick.submit(self._client, _HEADER, self._decode)
        self._timer = asyncio.get_running_loop().call_later(self._deadline - time.monotonic(), self._expire)

    def stop(self) -> bool:
        """Do not decode the image if its turn has not come. Returns True if `deliver` will not be called any more."""
        self._timer.cancel()
        if not self.decoding_s:
            return self._discard()
        if len(self.pixels):
            self._decoders.observe("quick", self._started, self._started + self.decoding_s)
        return False

    def _decode(self) -> float:
        outcome = measure(partial(self._decoders.decode_if_quick, self._file, self._deadline))
        self._decoders.remove_waiting(self._client, 1)
        self.decoding_s = time.perf_counter() - self._started
        if outcome.value is None:
            self._deliver(outcome.error or _late())
            return outcome.cpu_s
        image, pixels = outcome.value
        if pixels is None:
            self.opened = image
            self._deliver(CostlyImage(image.cost))
        else:
            self.pixels, self.warnings = pixels[None], image.warnings
            self._deliver(self.pixels)
        return outcome.cpu_s

    def _expire(self) -> None:
        if self._discard():
            self._deliver(_late())

    def _discard(self) -> bool:
        if not self._decoders.quick.discard(self._turn):
            return False
        self._decoders.remove_waiting(self._client, 1)
        return True


class Decoders:
    """The threads and processes that decode images.

    Args:
        settings: Limits of an image, and the number of images that may wait.
        observe: Callback with the lane of each decoded image, and the times of `time.perf_counter` before and after. It
            runs in the task of the request.
    """

    def __init__(self, settings: Settings, observe: Callable[[Lane, float, float], None] = lambda *_: None):
        self._settings = settings
        self.observe = observe
        count = min(cpu_count(), MAX_THREADS)
        self.quick = FairThreads(count, count * _QUICK.memory_bytes, "decoder")
        """The threads of the quick lane."""
        count = max(1, count - 1)
        self._medium = FairThreads(count, count * MEDIUM.memory_bytes, "medium-decoder", _MEDIUM_NICENESS)
        count = min(cpu_count(), _MAX_PROCESSES)
        self._costly = FairThreads(count, _COSTLY_BYTES, "costly-decoder")
        self._idle_processes = SimpleQueue[DecodeProcess]()
        limits = settings.max_image_bytes, settings.max_image_pixels
        self._processes = [DecodeProcess(*limits) for _ in range(count)]
        for process in self._processes:
            self._idle_processes.put(process)
        # Images up to this size are decoded with their batch, in less time than a decoder thread needs to start. On a
        # single CPU this includes images that take a few milliseconds, because a thread would share that CPU.
        max_bytes, max_pixels = (128 << 10, 512 * 512) if cpu_count() == 1 else (8 << 10, 64 * 64)
        self.small_bytes, self.small_pixels = min(max_bytes, limits[0]), min(max_pixels, limits[1])
        self._waiting = FairShares(settings.max_queue)
        self._waiting_lock = threading.Lock()  # threads of the quick lane change `_waiting` as well
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

    def small_image_decoder(self, files: Sequence[File]) -> Callable[[], NDArray[np.uint8]] | None:
        """Return a function that decodes a small image in the thread that computes its batch.

        Returns:
            A function that returns uint8 [3, 32, 32]. It raises `TooLarge` or `CostlyImage` if the image has too many
            pixels, costs more than 5 ms or may have warnings. None for several images, for a larger file, and for a
            file with a header that may take long to read.
        """
        if len(files) != 1:
            return None
        _, file = files[0]
        content = file.read(self.small_bytes + 1)
        if len(content) > self.small_bytes or not _has_short_header(content):
            return None
        return partial(encoded.decode, content, self.small_bytes, self.small_pixels, _SMALL)

    async def decode(
        self,
        files: Sequence[File],
        client: str,
        deadline: float,
        charge: Charge | None = None,
        opened: EncodedImage | None = None,
        tolerate_errors: bool = False,
    ) -> DecodedImages:
        """Decode the images of a request.

        Args:
            files: Names and open files. They must stay open until this returns.
            client: Client whose share of the decoders the images use.
            deadline: Time on the monotonic clock. An image whose decoding has not begun by then is refused.
            charge: Function that is called with the rate units of the estimated cost beyond the first unit.
            opened: The first image, if its header has been read, but the quick lane does not decode it.
            tolerate_errors: True to leave out images that cannot be decoded, instead of raising the first error.

        Raises:
            Unavailable: Too many images are waiting, or the deadline has passed.
            TooManyRequests: The error that `charge` raises.
            Problem: An image cannot be decoded. If the request has several images, the message names the file.
        """
        request = _Request(client, deadline, len(files), charge)
        decoded: list[_Decoded] = []
        errors: dict[int, Problem] = {}
        self.add_waiting(client, len(files))
        try:
            for number, (name, file) in enumerate(files):
                try:
                    decoded.append(await self._decode(request, file, opened))
                    opened = None
                except Problem as error:
                    if tolerate_errors and isinstance(error, IMAGE_ERRORS):
                        errors[number] = error
                    else:
                        if len(files) > 1:
                            error.detail = f"{name}: {error.detail}"
                        raise
                request.left -= 1
                self.remove_waiting(client, 1)
        finally:
            self.remove_waiting(client, request.left)
        pixels = np.array([pixels for pixels, _ in decoded])
        return DecodedImages(pixels, [warnings for _, warnings in decoded], errors)

    def add_waiting(self, client: str, count: int) -> None:
        """Count images that a client waits for.

        Raises:
            Unavailable: The client would exceed its share of waiting images.
        """
        with self._waiting_lock:
            if self._waiting.exceeds_share(client, count):
                raise Unavailable(
                    f"{self.waiting} images are waiting to be decoded already; try again later", "decoders_full"
                )
            self._waiting.add(client, count)

    def remove_waiting(self, client: str, count: int) -> None:
        """Stop counting images that `add_waiting` counted."""
        with self._waiting_lock:
            self._waiting.remove(client, count)

    def decode_if_quick(self, file: BinaryIO, deadline: float) -> tuple[EncodedImage, NDArray[np.uint8] | None]:
        """Read the header of an image in the calling thread, and decode the image if it belongs to the quick lane.

        Returns:
            The image, and its pixels, uint8 [3, 32, 32], or None for a costlier image.

        Raises:
            Unavailable: The deadline has passed.
            Problem: The image cannot be decoded.
        """
        if time.monotonic() > deadline:  # the image has waited for a thread
            raise _late()
        limits = self._settings.max_image_bytes, self._settings.max_image_pixels
        file.seek(0)
        image = EncodedImage(file.read(limits[0] + 1), *limits)
        return image, None if image.needs_process or image.cost.exceeds(_QUICK) else image.decode()

    async def _decode(self, request: _Request, file: BinaryIO, opened: EncodedImage | None) -> _Decoded:
        started = time.perf_counter()
        lane, decoded = await self._decode_in_lane(request, file, opened)
        self.observe(lane, started, time.perf_counter())
        return decoded

    async def _decode_in_lane(
        self, request: _Request, file: BinaryIO, opened: EncodedImage | None
    ) -> tuple[Lane, _Decoded]:
        if opened:
            image, pixels = opened, None
        else:
            decode = partial(self.decode_if_quick, file, request.deadline)
            image, pixels = await self._run(self.quick, request, _HEADER, partial(measure, decode))
        cost, needs_process = image.cost, image.needs_process
        request.add_cost(cost)
        if pixels is not None:
            return "quick", (pixels, image.warnings)
        if not (needs_process or cost.exceeds(MEDIUM)):
            pixels = await self._run(self._medium, request, cost, partial(measure, image.decode))
            return "medium", (pixels, image.warnings)
        del image, opened  # the process reads the file again
        with self._hold_up(request):
            return "costly", await self._run(self._costly, request, cost, partial(self._decode_apart, file))

    def _decode_apart(self, file: BinaryIO) -> Outcome[_Decoded]:
        process = self._idle_processes.get()

        def decode() -> _Decoded:
            file.seek(0)
            return process.decode(file.read(self._settings.max_image_bytes + 1))

        try:
            return measure(decode, clock=lambda: process.cpu_s)
        finally:
            self._idle_processes.put(process)

    @contextmanager
    def _hold_up(self, request: _Request) -> Iterator[None]:
        """Count a request's remaining images in `held_up` while one of them is costly. They delay no other request."""
        count = request.left
        if self._held_up.exceeds_share(request.client, count):
            raise Unavailable(f"{self.held_up} images wait for costly ones already; try again later", "decoders_full")
        self.remove_waiting(request.client, count)
        self._held_up.add(request.client, count)
        try:
            yield
        finally:
            self._held_up.remove(request.client, count)
            with self._waiting_lock:
                self._waiting.add(request.client, count)

    async def _run(
        self, threads: FairThreads, request: _Request, cost: DecodeCost, work: Callable[[], Outcome[Value]]
    ) -> Value:
        """Run work when it is the client's turn.

        Raises:
            Unavailable: The deadline has passed before the turn.
        """
        try:
            return await threads.run(request.client, cost, work, request.deadline - time.monotonic())
        except TimeoutError:
            raise _late() from None

    def close(self) -> None:
        """Let the threads end and kill the processes."""
        for threads in (self.quick, self._medium, self._costly):
            threads.close()
        for process in self._processes:
            process.close()


def _has_short_header(content: bytes) -> bool:
    """Return True if the header of a small file takes little time to read. It is False for GIF and TIFF."""
    if content.startswith(_PNG):
        return not (_ZTXT in content or _ITXT in content or _ICCP in content)  # faster than a loop or a pattern
    if content.startswith(_JPEG):
        return jpeg.count_markers(content) <= _MAX_SMALL_SEGMENTS
    return content.startswith((_BMP, _WEBP))


def _late() -> Unavailable:
    return Unavailable("the image waited longer than the deadline to be decoded; try again later", "deadline")
