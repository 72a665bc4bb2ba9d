"""Images of requests to pixels, in threads, and no more of them than can be decoded in time.

files --> [a few threads] --> uint8 [N, 3, 32, 32]
   large --> [one thread], where a request with a large image waits apart from the others
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from app import images
from app.errors import Problem, Unavailable
from app.settings import Settings
from app.workers import processors

_MAX_THREADS = 8  # each may need memory for an image of up to ten million pixels

File = tuple[str | None, BinaryIO]
"""Name and content of an image that was sent."""


class Decoders:
    """The threads that decode images.

    Args:
        settings: limits of an image, and how many may wait.
    """

    def __init__(self, settings: Settings):
        self._settings = settings
        self._common = ThreadPoolExecutor(min(processors(), _MAX_THREADS), "decoder")
        self._large = ThreadPoolExecutor(1, "decoder-of-large-images")
        self.waiting = 0
        """Images of requests under way that are not decoded yet, but for those held up."""
        self.held_up = 0
        """Large images, and what comes after them in their requests."""

    async def run(self, files: Sequence[File], deadline: float) -> NDArray[np.uint8]:
        """The pixels of a request's images: uint8 [N, 3, 32, 32].

        Args:
            files: open until this returns.
            deadline: of the monotonic clock; what has not been begun by then is refused.

        Raises:
            Unavailable: too many images are waiting, or the deadline passed.
            Problem: an image that cannot be decoded; where there are several, with its name.
        """
        if self.waiting and self.waiting + len(files) > self._settings.max_queue:
            raise Unavailable(f"{self.waiting} images are waiting to be decoded already; try again later")
        pixels = list[NDArray[np.uint8]]()
        self.waiting += len(files)
        try:
            for name, file in files:  # one after the other, so that those of other requests come in between
                try:
                    pixels.append(await self._decoded(file, deadline, len(files) - len(pixels)))
                except Problem as error:
                    if len(files) > 1:
                        error.detail = f"{name}: {error.detail}"
                    raise
                self.waiting -= 1
        finally:
            self.waiting -= len(files) - len(pixels)
        return np.stack(pixels)

    async def _decoded(self, file: BinaryIO, deadline: float, left: int) -> NDArray[np.uint8]:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._common, self._decode, file, deadline, False)
        except images.Large:
            with self._apart(left):
                return await loop.run_in_executor(self._large, self._decode, file, deadline, True)

    @contextmanager
    def _apart(self, left: int) -> Iterator[None]:
        """While the images left of a request wait for a large one among them, they keep no other request waiting."""
        if self.held_up and self.held_up + left > self._settings.max_queue:
            raise Unavailable(f"{self.held_up} images are held up by large ones already; try again later")
        self.waiting -= left
        self.held_up += left
        try:
            yield
        finally:
            self.held_up -= left
            self.waiting += left

    def _decode(self, file: BinaryIO, deadline: float, large: bool) -> NDArray[np.uint8]:
        if time.monotonic() > deadline:
            raise Unavailable("the image waited longer than the deadline to be decoded; try again later")
        file.seek(0)
        content = file.read(self._settings.max_image_bytes + 1)
        return images.decode(content, self._settings.max_image_bytes, self._settings.max_image_pixels, large)

    def close(self) -> None:
        for threads in (self._common, self._large):
            threads.shutdown(wait=False)
