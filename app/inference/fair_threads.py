"""Run the work of clients in a few threads, and share the threads among clients by CPU time.

    run(client, work) -> FairQueue -> [thread: work] -> event loop

A thread that has finished takes the next turn from the queue itself. It does not wait for the event loop, which may be
busy with requests.
"""

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from app.inference.decode_cost import DecodeCost
from app.inference.fair_queue import FairQueue, Turn

Value = TypeVar("Value")


@dataclass(slots=True)
class Outcome(Generic[Value]):
    """The result or error of work, and its CPU time in seconds."""

    value: Value | None
    error: Exception | None
    cpu_s: float


def measure(work: Callable[[], Value], clock: Callable[[], float] = time.thread_time) -> Outcome[Value]:
    """Run work and measure its CPU time.

    Args:
        work: Function without arguments. Its exceptions become `Outcome.error`.
        clock: CPU time in seconds.
    """
    started = clock()
    value, error = None, None
    try:
        value = work()
    except Exception as raised:
        error = raised
    return Outcome(value, error, clock() - started)


@dataclass(eq=False, slots=True)
class _Task:
    """Work and the future that gets its result."""

    work: Callable[[], Outcome[Any]]
    result: asyncio.Future[Any]

    def run(self) -> float:
        """Run the work, pass its result to the event loop, and return the CPU time in seconds."""
        outcome = self.work()
        with suppress(RuntimeError):  # the event loop is closed, and no request waits
            self.result.get_loop().call_soon_threadsafe(self._set_result, outcome)
        return outcome.cpu_s

    def _set_result(self, outcome: Outcome[Any]) -> None:
        if self.result.done():  # the request was cancelled
            return
        if outcome.error:
            self.result.set_exception(outcome.error)
        else:
            self.result.set_result(outcome.value)


class FairThreads:
    """A thread pool that serves clients in fair turns.

    Args:
        count: Number of threads.
        memory_bytes: Memory of all concurrent work. Work that needs more than the free memory waits.
        name: Prefix of the threads' names.
        niceness: nice value of the threads relative to the process. Linux gives each thread a nice value of its own.
    """

    def __init__(self, count: int, memory_bytes: int, name: str, niceness: int = 0):
        self._queue = FairQueue[_Task](memory_bytes)
        self._changed = threading.Condition()
        self._is_closed = False
        self._niceness = niceness if sys.platform == "linux" else 0
        for number in range(count):
            threading.Thread(target=self._serve, name=f"{name}_{number}", daemon=True).start()

    async def run(self, client: str, cost: DecodeCost, work: Callable[[], Outcome[Value]], timeout_s: float) -> Value:
        """Run work in a thread when it is the client's turn. Work that has started cannot be interrupted.

        Args:
            client: Client that the CPU time is charged to.
            cost: Estimated cost of the work.
            work: Function that never raises; see `measure`.
            timeout_s: Seconds to wait for a turn.

        Raises:
            TimeoutError: The turn has not started in time.
            Exception: The error of the work.
        """
        if timeout_s <= 0:
            raise TimeoutError
        loop = asyncio.get_running_loop()
        task = _Task(work, loop.create_future())
        with self._changed:
            turn = self._queue.add(client, cost, task)
            self._changed.notify()
        timer = loop.call_later(timeout_s, self._expire, turn)
        try:
            return cast(Value, await task.result)
        except asyncio.CancelledError:
            self._discard(turn)
            raise
        finally:
            timer.cancel()

    def close(self) -> None:
        """Let the threads end. Waiting work is dropped; running work is finished."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _expire(self, turn: Turn[_Task]) -> None:
        if self._discard(turn) and not turn.work.result.done():
            turn.work.result.set_exception(TimeoutError())

    def _discard(self, turn: Turn[_Task]) -> bool:
        with self._changed:
            if self._queue.discard(turn):
                self._changed.notify()  # the turn behind it may need less memory
                return True
            return False

    def _serve(self) -> None:
        if self._niceness:
            os.nice(self._niceness)
        turn = self._next()
        while turn:
            spent_s = turn.work.run()
            turn = self._next(turn, spent_s)

    def _next(self, finished: Turn[_Task] | None = None, spent_s: float = 0.0) -> Turn[_Task] | None:
        """End a turn and wait for the next one. Returns None when the pool is closed."""
        with self._changed:
            if finished:
                self._queue.finish(finished, spent_s)
            while not self._is_closed:
                if turn := self._queue.next():
                    if finished and self._queue:
                        self._changed.notify()  # the finished turn has freed memory
                    return turn
                self._changed.wait()
            return None
