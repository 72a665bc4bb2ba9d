"""Share a few slots among clients by the CPU time that each client has spent.

    enter(client) -> wait until a slot is free and the client is next -> work -> leave(spent)

The client that has spent the least is next, so that a client with many or costly images delays only its own images.
This is start-time fair queuing (Goyal et al. 1996). An idle client does not accumulate credit: when it returns, it
continues from the time that the last started client had spent.
"""

import asyncio
from collections import deque
from dataclasses import dataclass

from app.decode_cost import DecodeCost

_MAX_IDLE_CLIENTS = 1_000


@dataclass(eq=False, slots=True)
class Turn:
    """A client's place in the queue: it waits for a slot or holds one."""

    client: str
    cost: DecodeCost
    """Estimated cost of the work. The estimate counts as spent until the actual CPU time is known."""
    started: asyncio.Future[None] | None = None
    """Its result is set when a turn that had to wait starts."""


class FairQueue:
    """A queue that gives turns to clients within one event loop.

    Args:
        slots: Number of concurrent turns.
        memory_bytes: Memory of all concurrent turns. A turn that needs more than the free memory waits, and so do all
            turns behind it.
    """

    def __init__(self, slots: int, memory_bytes: int):
        self._slots = slots
        self._free_bytes = memory_bytes
        self._running = 0
        self._waiting: dict[str, deque[Turn]] = {}
        self._spent_ms: dict[str, float] = {}
        self._clock_ms = 0.0  # time that the last started client had spent before its turn

    async def enter(self, client: str, cost: DecodeCost, timeout_s: float) -> Turn:
        """Wait for a turn and return it. The caller must pass it to `leave`.

        Args:
            client: Client that the turn is charged to.
            cost: Estimated cost of the work.
            timeout_s: Seconds to wait for a turn.

        Raises:
            TimeoutError: The turn has not started in time.
        """
        if timeout_s <= 0:
            raise TimeoutError
        turn = Turn(client, cost)
        self._spent_ms[client] = max(self._spent_ms.get(client, 0.0), self._clock_ms)
        if not self._waiting and self._has_room(turn):
            self._start(turn)
            return turn
        started = turn.started = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        try:
            async with asyncio.timeout(timeout_s):
                await started
        except BaseException:
            if started.cancelled():
                self._remove(turn)
                self._start_turns()
            else:  # the turn started at the same moment
                self.leave(turn, 0.0)
            raise
        return turn

    def leave(self, turn: Turn, spent_s: float) -> None:
        """End a turn.

        Args:
            turn: Turn that `enter` returned.
            spent_s: CPU time of the work in seconds.
        """
        self._running -= 1
        self._free_bytes += turn.cost.memory_bytes
        spent_ms = self._spent_ms.get(turn.client, self._clock_ms)
        self._spent_ms[turn.client] = spent_ms + 1000 * spent_s - turn.cost.cpu_ms
        self._start_turns()
        if not self._running:
            self._spent_ms.clear()
            self._clock_ms = 0.0
        elif len(self._spent_ms) > len(self._waiting) + _MAX_IDLE_CLIENTS:
            self._forget_idle_clients()

    def _start_turns(self) -> None:
        """Start the next turns while slots and memory are free."""
        while self._waiting:
            client = min(self._waiting, key=self._spent_ms.__getitem__)
            turn = self._waiting[client][0]
            is_cancelled = turn.started is not None and turn.started.cancelled()
            if not (is_cancelled or self._has_room(turn)):
                return
            self._remove(turn)
            if not is_cancelled:
                self._start(turn)

    def _has_room(self, turn: Turn) -> bool:
        """Return True if a turn can start. One turn always runs, even if it needs more memory than there is."""
        return not self._running or (self._running < self._slots and turn.cost.memory_bytes <= self._free_bytes)

    def _start(self, turn: Turn) -> None:
        self._running += 1
        self._free_bytes -= turn.cost.memory_bytes
        self._clock_ms = max(self._clock_ms, self._spent_ms[turn.client])
        self._spent_ms[turn.client] += turn.cost.cpu_ms
        if turn.started:
            turn.started.set_result(None)

    def _remove(self, turn: Turn) -> None:
        """Remove a turn from its client's queue, if it still waits."""
        turns = self._waiting.get(turn.client, deque())
        if turn in turns:
            turns.remove(turn)
            if not turns:
                del self._waiting[turn.client]

    def _forget_idle_clients(self) -> None:
        """Drop idle clients that have spent no more than the clock. They would continue from the clock anyway."""
        self._spent_ms = {
            client: spent
            for client, spent in self._spent_ms.items()
            if client in self._waiting or spent > self._clock_ms
        }
