"""The signals that stop the service: SIGTERM, SIGINT (Ctrl-C) and SIGHUP (the terminal has closed).

Every process of the service takes them from its first moment on: at first they end it at once, as it serves nothing
yet. `app.server` and `app.workers` then replace the handler by one that lets requests finish. A service that was
stopped has ended well: the exit status is 0, or 130 after SIGINT as shells expect it.
"""

import os
import signal
from collections.abc import Callable, Iterable
from types import FrameType

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def on_stop(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> None:
    """Call a handler for each of the signals. `nohup` makes a process ignore SIGHUP, which it then goes on to do."""
    for number in STOP:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def exit_status(signals: Iterable[int]) -> int:
    """Of a process that these signals have stopped."""
    return 128 + signal.SIGINT if signal.SIGINT in signals else 0


def exit_at_once(number: int, _: FrameType | None = None) -> None:
    """A handler for a process that serves nothing. Threads that load models cannot be interrupted, so it waits for
    none."""
    os._exit(exit_status((number,)))
