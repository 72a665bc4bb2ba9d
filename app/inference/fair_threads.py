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
from queue import SimpleQueue
from typing import Any, Generic, TypeVar, cast

from app.inference.fair_queue import FairQueue, Turn
from app.inference.images.cost import DecodeCost

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
        self._queue = FairQueue[Callable[[], float]](memory_bytes)
        self._lock = threading.Lock()
        # A thread waits for a ticket, then takes the next turn. There is one ticket per added turn. SimpleQueue wakes a
        # thread at a lower cost than threading.Condition: 0.34 instead of 0.38 ms of system time per photo.
        self._tickets = SimpleQueue[None]()
        self._is_closed = False
        self._unused_tickets = 0  # the next turn needed more memory than was free
        self._niceness = niceness if sys.platform == "linux" else 0
        self._count = count
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
        turn = self.submit(client, cost, task.run)
        timer = loop.call_later(timeout_s, self._expire, turn, task.result)
        try:
            return cast(Value, await task.result)
        except asyncio.CancelledError:
            self.discard(turn)
            raise
        finally:
            timer.cancel()

    def submit(self, client: str, cost: DecodeCost, work: Callable[[], float]) -> Turn[Callable[[], float]]:
        """Let a thread run work when it is the client's turn.

        Args:
            client: Client that the CPU time is charged to.
            cost: Estimated cost of the work.
            work: Function that never raises. It returns the CPU time that it took, in seconds.

        Returns:
            The turn, for `discard`.
        """
        with self._lock:
            turn = self._queue.add(client, cost, work)
        self._tickets.put(None)
        return turn

    def discard(self, turn: Turn[Callable[[], float]]) -> bool:
        """Remove a turn if it still waits. Returns False if it has started."""
        with self._lock:
            if not self._queue.discard(turn):
                return False
            self._reissue_tickets()  # the turn behind it may need less memory
            return True

    def close(self) -> None:
        """Let the threads end. Waiting work is dropped; running work is finished."""
        self._is_closed = True
        for _ in range(self._count):
            self._tickets.put(None)

    def _expire(self, turn: Turn[Callable[[], float]], result: asyncio.Future[Any]) -> None:
        if self.discard(turn) and not result.done():
            result.set_exception(TimeoutError())

    def _serve(self) -> None:
        if self._niceness:
            os.nice(self._niceness)
        while True:
            self._tickets.get()
            if self._is_closed:
                return
            with self._lock:
                turn = self._queue.next()
                if turn is None:
                    self._unused_tickets += 1
                    continue
            spent_s = turn.work()
            with self._lock:
                self._queue.finish(turn, spent_s)
                self._reissue_tickets()  # the finished turn has freed memory

    def _reissue_tickets(self) -> None:
        """Let threads look for a turn again. The caller holds the lock."""
        if not self._queue:
            self._unused_tickets = 0
        count = min(self._unused_tickets, self._count)
        self._unused_tickets -= count
        for _ in range(count):
            self._tickets.put(None)
