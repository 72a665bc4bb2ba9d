"""Test the fair queue: the order of turns, the accounting of time spent, and turns that are discarded."""

from collections.abc import Callable

from app.inference.fair_queue import FairQueue, Turn
from app.inference.images.cost import DecodeCost


class Clients:
    """The clients of a queue. Each work item is the name of its client."""

    def __init__(self, memory_bytes: int = 100):
        self.queue = FairQueue[str](memory_bytes)

    def add(self, clients: str, cpu_ms: float = 10, memory_bytes: int = 1) -> list[Turn[str]]:
        return [self.queue.add(client, DecodeCost(cpu_ms, memory_bytes), client) for client in clients]

    def start(self) -> Turn[str]:
        turn = self.queue.next()
        assert turn
        return turn

    def run_all(self, spent_ms: Callable[[Turn[str]], float] = lambda _: 10) -> str:
        """Run all turns one after the other and return their clients."""
        order = ""
        while turn := self.queue.next():
            order += turn.work
            self.queue.finish(turn, spent_ms(turn) / 1000)
        return order


def test_clients_take_turns_however_many_requests_one_has() -> None:
    clients = Clients()
    clients.add("aaaaab")
    assert clients.run_all() == "abaaaa"


def test_a_client_of_costly_work_gets_fewer_turns() -> None:
    clients = Clients()
    clients.add("aaa", cpu_ms=30)
    clients.add("bbbbbb")
    assert clients.run_all(lambda turn: turn.cost.cpu_ms) == "abbbabbba"


def test_the_actual_time_counts_not_the_estimate() -> None:
    clients = Clients()
    clients.add("aaabbb", cpu_ms=1)
    assert clients.run_all(lambda turn: 100 if turn.client == "a" else 1) == "abbbaa"


def test_a_client_that_was_away_has_not_saved_up_time() -> None:
    clients = Clients()
    clients.add("baaaaaaaa")
    for _ in range(6):
        clients.queue.finish(clients.start(), 0.01)
    clients.add("bbb")
    assert clients.run_all() == "bababa"


def test_a_running_turn_counts_by_its_estimate_so_one_client_cannot_take_every_thread() -> None:
    clients = Clients()
    clients.add("aabb")
    assert {clients.start().client, clients.start().client} == {"a", "b"}


def test_turns_wait_for_memory_and_one_that_needs_more_than_all_runs_alone() -> None:
    clients = Clients(memory_bytes=100)
    clients.add("ab", memory_bytes=60)
    first = clients.start()
    assert not clients.queue.next()
    clients.queue.finish(first, 0.01)
    clients.add("c", memory_bytes=1000)
    second = clients.start()
    assert not clients.queue.next()
    clients.queue.finish(second, 0.01)
    assert clients.start().client == "c"


def test_a_discarded_turn_never_starts() -> None:
    clients = Clients()
    _, discarded, _ = clients.add("aab")
    assert clients.queue.discard(discarded)
    assert not clients.queue.discard(discarded)
    assert clients.run_all() == "ab"
    assert not clients.queue


def test_a_running_turn_cannot_be_discarded() -> None:
    clients = Clients()
    clients.add("a")
    assert not clients.queue.discard(clients.start())


def test_clients_that_came_once_are_forgotten() -> None:
    clients = Clients()
    clients.queue.add("holds", DecodeCost(1, 1), "holds")
    held = clients.start()
    for number in range(5_000):
        clients.queue.add(f"client {number}", DecodeCost(10, 1), "")
        clients.queue.finish(clients.start(), 0)
    assert len(clients.queue._spent_ms) < 1_100
    clients.queue.finish(held, 0)
    assert not clients.queue._spent_ms
