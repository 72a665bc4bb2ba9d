"""End a training process when the service that started it dies, stalls or loses the job.

    service: Lifeline.extend --pipe--> training process: watch

The service sends the time until which it owns the job. The process ends itself at this time, or at once when the pipe
closes, because another machine may then train the job. Times are those of `time.monotonic`, which all processes of a
machine share.
"""

import os
import select
import struct
import sys
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Self

from training.console import STOPPED

_DEADLINE = struct.Struct("d")


class Lifeline:
    """The pipe in the service. As a context manager, it closes the pipe at exit."""

    def __init__(self) -> None:
        self.child_end, self._own_end = os.pipe()  # the training process inherits the first one
        os.set_blocking(self._own_end, False)
        self._deadline = 0.0

    def extend(self, deadline: float) -> None:
        """Send the time until which the service owns the job, if it is later than the last one."""
        if deadline > self._deadline:
            self._deadline = deadline
            with suppress(BlockingIOError, BrokenPipeError):  # the process does not read, or has ended
                os.write(self._own_end, _DEADLINE.pack(deadline))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        os.close(self.child_end)
        os.close(self._own_end)


def watch(descriptor: int) -> None:
    """Start a thread that ends this process when the service no longer owns its job.

    Args:
        descriptor: `Lifeline.child_end`, inherited.
    """
    os.set_inheritable(descriptor, False)
    threading.Thread(target=_watch, args=(descriptor,), name="lifeline", daemon=True).start()


def _watch(descriptor: int) -> None:
    deadline = time.monotonic()  # the service has sent the first deadline before it started this process
    while select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
        received = os.read(descriptor, _DEADLINE.size)
        if len(received) < _DEADLINE.size:
            break
        (deadline,) = _DEADLINE.unpack(received)
    print("error: the service that started this run no longer owns its job", file=sys.stderr, flush=True)
    os._exit(STOPPED)
