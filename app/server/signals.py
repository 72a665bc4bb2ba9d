"""Handles the signals that stop the service: SIGTERM, SIGINT (Ctrl-C) and SIGHUP (the terminal has closed).

At first they end a process at once, because it serves no requests yet. `app.server.serve` and `app.server.workers` then
install handlers that let requests finish. The exit status of a stopped service is 0, or 130 after SIGINT, as shells
expect.
"""

import atexit
import os
import signal
from collections.abc import Callable, Iterable
from types import FrameType
from typing import NoReturn

_cleanups: list[Callable[[], object]] = []

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def handle_stop_signals(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> None:
    """Set the handler of these signals. SIGHUP stays ignored if it already is, as under `nohup`."""
    for number in STOP:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def exit_status(signals: Iterable[int]) -> int:
    """Return the exit status of a process that these signals stopped."""
    return 128 + signal.SIGINT if signal.SIGINT in signals else 0


def call_at_exit(cleanup: Callable[[], object]) -> None:
    """Call a function when the process exits, also by `exit_process`. The function may be called twice."""
    atexit.register(cleanup)
    _cleanups.append(cleanup)


def exit_process(status: int) -> NoReturn:
    """Exit without waiting for threads. This calls the functions of `call_at_exit`, but no others of `atexit`."""
    for cleanup in _cleanups:
        cleanup()
    os._exit(status)


def exit_immediately(number: int, _: FrameType | None = None) -> NoReturn:
    """Exit after a signal without waiting for threads, because a thread that loads a model cannot be interrupted."""
    exit_process(exit_status((number,)))
