"""Decode costly images in a child process, because an image decoder in a thread cannot be interrupted.

    DecodeProcess (in the server)  --file-->  child process (`main`)  --pixels, warnings or error-->  DecodeProcess

The kernel kills the process if one image takes more than `MAX_CPU_S` of CPU time (ITIMER_PROF), and refuses it memory
beyond `encoded.MAX_COST` (RLIMIT_AS). The next costly image starts a new process. The process runs at low priority, so
that it takes little CPU time from smaller images. It ends with the server, because its standard input is then closed.
"""

import os
import signal
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, cast

import numpy as np
from numpy.typing import NDArray

from app.exceptions import IMAGE_ERRORS, DamagedImage, Problem, TooLarge
from app.inference.images import encoded
from app.machine import bound_malloc, limit_memory, set_niceness

MAX_CPU_S = 4.0
"""CPU time limit of one image. It is twice the largest accepted estimate, for slow machines."""

_MAX_WALL_S = 60.0  # wall time limit for a process that is stopped or starved
_NICENESS = 10
_MEMORY_MARGIN = 64 << 20
_REQUEST = struct.Struct("<Q")  # size of the file in bytes
_REPLY = struct.Struct("<dBQ")  # CPU time in seconds, kind of the result, its size in bytes
_PIXELS_BYTES = 3 * encoded.SIZE**2  # the warnings follow the pixels, a line for each
_PIXELS = 0  # the kinds 1, 2 and 3 are those of IMAGE_ERRORS
_PACKAGES = Path(__file__).parents[2]


class DecodeProcess:
    """A child process that decodes one image at a time. The first image starts it. One thread at a time may use it.

    Args:
        max_bytes: Largest size of a file.
        max_pixels: Largest product of width and height.
        max_cpu_s: CPU time limit of one image.
        max_memory_bytes: Memory limit of the decoder.
    """

    def __init__(
        self,
        max_bytes: int,
        max_pixels: int,
        max_cpu_s: float = MAX_CPU_S,
        max_memory_bytes: int = encoded.MAX_COST.memory_bytes + _MEMORY_MARGIN,
    ):
        self._max_cpu_s = max_cpu_s
        self._limits = [str(each) for each in (max_bytes, max_pixels, max_cpu_s, max_memory_bytes)]
        self._process: subprocess.Popen[bytes] | None = None
        self.cpu_s = 0.0
        """CPU time of all images so far, in seconds."""

    def decode(self, data: bytes) -> tuple[NDArray[np.uint8], list[str]]:
        """Decode an image as `encoded.decode` does, with the cost limit `encoded.MAX_COST`.

        Returns:
            uint8 [3, 32, 32], and the warnings about the image.

        Raises:
            TooLarge: Decoding costs too much, or took longer than `max_cpu_s`.
            Problem: The image cannot be decoded.
        """
        process = self._process = self._running() or self._start()
        assert process.stdin  # noqa: S101  both are pipes
        assert process.stdout  # noqa: S101
        watchdog = threading.Timer(_MAX_WALL_S, process.kill)
        watchdog.start()
        try:
            process.stdin.write(_REQUEST.pack(len(data)) + data)
            process.stdin.flush()
            cpu_s, kind, size = _REPLY.unpack(_read(process.stdout, _REPLY.size))
            result = _read(process.stdout, size)
        except (OSError, EOFError):
            self.cpu_s += self._max_cpu_s
            raise self._describe_end(self._end()) from None
        finally:
            watchdog.cancel()
        self.cpu_s += cpu_s
        if kind != _PIXELS:
            raise IMAGE_ERRORS[kind - 1](result.decode())
        pixels = np.frombuffer(result, np.uint8, _PIXELS_BYTES).reshape(3, encoded.SIZE, encoded.SIZE)
        return pixels, result[_PIXELS_BYTES:].decode().splitlines()

    def close(self) -> None:
        """Kill the process. A concurrent `decode` in another thread returns a problem."""
        self._end()

    def _running(self) -> "subprocess.Popen[bytes] | None":
        if self._process and self._process.poll() is not None:
            self._end()
        return self._process

    def _end(self) -> int:
        """Kill the process if it runs, close its pipes, and return its exit status."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.kill()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # a pipe may hold data that the process has not read
                cast(IO[bytes], pipe).close()
        return process.wait()

    def _start(self) -> "subprocess.Popen[bytes]":
        # -P and PYTHONPATH select this package, even if the current folder contains another `app`.
        command = [sys.executable, "-P", "-m", "app.inference.decode_process", *self._limits]
        # The decoder reads hostile files, so it gets no setting of the service, such as the API keys.
        environment = {name: value for name, value in os.environ.items() if not name.upper().startswith("CIFAR100_")}
        environment |= {"PYTHONPATH": str(_PACKAGES), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, start_new_session=True)

    def _describe_end(self, status: int) -> Problem:
        if status == -signal.SIGPROF:
            limit = f"{self._max_cpu_s:g} s of CPU time"
            return TooLarge(
                f"decoding the image took more than {limit}; send a smaller image, or a JPEG that is not progressive"
            )
        return DamagedImage("the image cannot be decoded: it crashes the decoder; save it again in another format")


def _read(pipe: IO[bytes], size: int) -> bytes:
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _serve(requests: IO[bytes], replies: IO[bytes], max_bytes: int, max_pixels: int, max_cpu_s: float) -> None:
    """Decode images until the server closes the pipe."""
    while header := requests.read(_REQUEST.size):
        data = _read(requests, *_REQUEST.unpack(header))
        started = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, max_cpu_s)
        try:
            image = encoded.EncodedImage(data, max_bytes, max_pixels)
            kind, result = _PIXELS, image.decode().tobytes() + "\n".join(image.warnings).encode()
        except IMAGE_ERRORS as error:
            kind, result = 1 + IMAGE_ERRORS.index(type(error)), error.detail.encode("utf-8", "replace")
        except MemoryError:
            kind, result = (
                1 + IMAGE_ERRORS.index(TooLarge),
                b"decoding the image takes too much memory; send a smaller one",
            )
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(_REPLY.pack(time.process_time() - started, kind, len(result)) + result)
        replies.flush()


def main(max_bytes: str, max_pixels: str, max_cpu_s: str, max_memory_bytes: str) -> None:
    """Run the child process until its standard input ends. The arguments are those of `DecodeProcess`."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    set_niceness(os.getpid(), min(os.getpriority(os.PRIO_PROCESS, 0) + _NICENESS, 19))
    bound_malloc()
    limit_memory(int(max_memory_bytes))
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library that prints must not write into the replies
    _serve(requests, replies, int(max_bytes), int(max_pixels), float(max_cpu_s))


if __name__ == "__main__":
    main(*sys.argv[1:])
