"""Order the work of clients by the CPU time that each client has spent.

    add(client) -> next(), by the client that has spent the least -> work -> finish(spent)

A client with many or costly images delays only its own images. This is start-time fair queuing (Goyal et al. 1996). An
idle client does not accumulate credit: when it returns, it continues from the time that the last started client had
spent.
"""

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

from app.inference.images.cost import DecodeCost

_MAX_IDLE_CLIENTS = 1_000

Work = TypeVar("Work")


@dataclass(eq=False, slots=True)
class Turn(Generic[Work]):
    """A client's place in the queue."""

    client: str
    cost: DecodeCost
    """Estimated cost of the work. The estimate counts as spent until the actual CPU time is known."""
    work: Work


class FairQueue(Generic[Work]):
    """A queue that gives turns to clients. It is not thread-safe.

    Args:
        memory_bytes: Memory of all running turns. A turn that needs more than the free memory waits, and so do all
            turns behind it. One turn always runs, even if it needs more than `memory_bytes`.
    """

    def __init__(self, memory_bytes: int):
        self._free_bytes = memory_bytes
        self._running = 0
        self._waiting: dict[str, deque[Turn[Work]]] = {}
        self._spent_ms: dict[str, float] = {}
        self._clock_ms = 0.0  # time that the last started client had spent before its turn

    def __bool__(self) -> bool:
        """Return True if a turn waits."""
        return bool(self._waiting)

    def add(self, client: str, cost: DecodeCost, work: Work) -> Turn[Work]:
        """Append work to a client's turns and return its turn."""
        turn = Turn(client, cost, work)
        self._spent_ms[client] = max(self._spent_ms.get(client, 0.0), self._clock_ms)
        self._waiting.setdefault(client, deque()).append(turn)
        return turn

    def next(self) -> Turn[Work] | None:
        """Start the next turn and return it. Returns None if no turn waits or the next one needs more memory.

        The caller must pass the turn to `finish`.
        """
        if not self._waiting:
            return None
        client = min(self._waiting, key=self._spent_ms.__getitem__)
        turn = self._waiting[client][0]
        if self._running and turn.cost.memory_bytes > self._free_bytes:
            return None
        self.discard(turn)
        self._running += 1
        self._free_bytes -= turn.cost.memory_bytes
        self._clock_ms = max(self._clock_ms, self._spent_ms[client])
        self._spent_ms[client] += turn.cost.cpu_ms
        return turn

    def finish(self, turn: Turn[Work], spent_s: float) -> None:
        """End a turn that `next` returned.

        Args:
            turn: The turn.
            spent_s: CPU time of the work in seconds.
        """
        self._running -= 1
        self._free_bytes += turn.cost.memory_bytes
        spent_ms = self._spent_ms.get(turn.client, self._clock_ms)
        self._spent_ms[turn.client] = spent_ms + 1000 * spent_s - turn.cost.cpu_ms
        if not self._running and not self._waiting:
            self._spent_ms.clear()
            self._clock_ms = 0.0
        elif len(self._spent_ms) > len(self._waiting) + _MAX_IDLE_CLIENTS:
            self._forget_idle_clients()

    def discard(self, turn: Turn[Work]) -> bool:
        """Remove a turn if it still waits. Returns False if it has started."""
        turns = self._waiting.get(turn.client, deque())
        if turn not in turns:
            return False
        turns.remove(turn)
        if not turns:
            del self._waiting[turn.client]
        return True

    def _forget_idle_clients(self) -> None:
        """Drop idle clients that have spent no more than the clock. They would continue from the clock anyway."""
        self._spent_ms = {
            client: spent
            for client, spent in self._spent_ms.items()
            if client in self._waiting or spent > self._clock_ms
        }
