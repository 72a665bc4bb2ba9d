"""The signals that stop the service: SIGTERM, SIGINT (Ctrl-C) and SIGHUP (the terminal has closed).

At first they end a process at once, as it serves nothing yet. `app.server` and `app.workers` replace this handler by
one that lets requests finish. The exit status of a stopped service is 0, or 130 after SIGINT as shells expect it.
"""

import os
import signal
from collections.abc import Callable, Iterable
from types import FrameType

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def on_stop(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> None:
    """Set the handler of these signals. A process that `nohup` has made ignore SIGHUP goes on to ignore it."""
    for number in STOP:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def exit_status(signals: Iterable[int]) -> int:
    """The exit status of a process that these signals have stopped."""
    return 128 + signal.SIGINT if signal.SIGINT in signals else 0


def exit_at_once(number: int, _: FrameType | None = None) -> None:
    """End a process that serves nothing. It waits for no thread, as one that loads a model cannot be interrupted."""
    os._exit(exit_status((number,)))
