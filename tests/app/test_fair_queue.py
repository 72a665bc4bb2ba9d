"""Test the fair queue: the order of turns, the accounting of time spent, and clients that stop waiting."""

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from app.decode_cost import DecodeCost
from app.fair_queue import FairQueue, Turn

MINUTE_S = 60.0


class Clients:
    """The clients of a queue, and their turns in the order in which they start."""

    def __init__(self, slots: int = 1, memory_bytes: int = 100):
        self.queue = FairQueue(slots, memory_bytes)
        self.started: list[str] = []
        self.running: list[Turn] = []

    def wait(self, client: str, cpu_ms: float = 10, memory_bytes: int = 1) -> "asyncio.Task[None]":
        return asyncio.create_task(self._wait(client, DecodeCost(cpu_ms, memory_bytes)))

    async def _wait(self, client: str, cost: DecodeCost) -> None:
        turn = await self.queue.enter(client, cost, MINUTE_S)
        self.started.append(client)
        self.running.append(turn)

    async def finish_all(self, spent_ms: Callable[[Turn], float] = lambda _: 10) -> list[str]:
        await settle()
        while self.running:
            turn = self.running.pop(0)
            self.queue.leave(turn, spent_ms(turn) / 1000)
            await settle()
        return self.started


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def scenario(run: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(run())  # type: ignore[arg-type]


def test_clients_take_turns_however_many_requests_one_has() -> None:
    async def run() -> None:
        clients = Clients()
        for client in "aaaaab":
            clients.wait(client)
        assert await clients.finish_all() == list("abaaaa")

    scenario(run)


def test_a_client_of_costly_work_gets_fewer_turns() -> None:
    async def run() -> None:
        clients = Clients()
        for client in "aaabbbbbb":
            clients.wait(client, cpu_ms=30 if client == "a" else 10)
        assert await clients.finish_all(lambda turn: turn.cost.cpu_ms) == list("abbbabbba")

    scenario(run)


def test_the_actual_time_counts_not_the_estimate() -> None:
    async def run() -> None:
        clients = Clients()
        for client in "aaabbb":
            clients.wait(client, cpu_ms=1)
        assert await clients.finish_all(lambda turn: 100 if turn.client == "a" else 1) == list("abbbaa")

    scenario(run)


def test_a_client_that_was_away_has_not_saved_up_time() -> None:
    async def run() -> None:
        clients = Clients()
        for client in "abaaaa":
            clients.wait(client)
        await settle()
        for _ in range(3):
            clients.queue.leave(clients.running.pop(0), 0.01)
            await settle()
        for client in "bbbb":  # b had one turn at the start
            clients.wait(client)
        assert await clients.finish_all() == list("abaa") + list("bababb")

    scenario(run)


def test_a_running_turn_counts_by_its_estimate_so_one_client_cannot_take_every_slot() -> None:
    async def run() -> None:
        clients = Clients(slots=2)
        clients.wait("x")
        clients.wait("x")
        await settle()
        for client in "aabb":
            clients.wait(client)
        await settle()
        clients.queue.leave(clients.running.pop(0), 0.01)
        clients.queue.leave(clients.running.pop(0), 0.01)
        await settle()
        assert sorted(turn.client for turn in clients.running) == ["a", "b"]

    scenario(run)


def test_turns_wait_for_memory_and_one_that_needs_more_than_all_runs_alone() -> None:
    async def run() -> None:
        clients = Clients(slots=3, memory_bytes=100)
        clients.wait("a", memory_bytes=60)
        clients.wait("b", memory_bytes=60)
        await settle()
        assert clients.started == ["a"]
        clients.queue.leave(clients.running.pop(), 0.01)
        await settle()
        clients.wait("c", memory_bytes=1000)
        await settle()
        assert clients.started == ["a", "b"]
        clients.queue.leave(clients.running.pop(), 0.01)
        await settle()
        assert clients.started == ["a", "b", "c"]

    scenario(run)


def test_a_turn_that_does_not_come_in_time_is_given_up() -> None:
    async def run() -> None:
        clients = Clients()
        held = await clients.queue.enter("a", DecodeCost(1, 1), MINUTE_S)
        with pytest.raises(TimeoutError):
            await clients.queue.enter("b", DecodeCost(1, 1), 0.01)
        with pytest.raises(TimeoutError):
            await clients.queue.enter("b", DecodeCost(1, 1), -1)
        clients.queue.leave(held, 0)
        clients.queue.leave(await clients.queue.enter("c", DecodeCost(1, 1), MINUTE_S), 0)

    scenario(run)


def test_a_client_that_leaves_makes_room_even_in_the_moment_of_its_turn() -> None:
    async def run() -> None:
        clients = Clients()
        clients.wait("a")
        await settle()
        gone, waits = clients.wait("b"), clients.wait("c")
        await settle()
        clients.queue.leave(clients.running.pop(), 0.01)  # the next turn now belongs to b
        gone.cancel()
        await settle()
        assert waits.done()
        assert clients.started == ["a", "c"]

    scenario(run)


def test_a_turn_may_come_between_the_cancellation_of_its_task_and_its_end() -> None:
    async def run() -> None:
        clients = Clients()
        clients.wait("a")
        await settle()
        gone, waits = clients.wait("b"), clients.wait("c")
        await settle()
        gone.cancel()  # the task has not run yet when its turn comes
        clients.queue.leave(clients.running.pop(), 0.01)
        await settle()
        assert waits.done()
        assert clients.started == ["a", "c"]

    scenario(run)


def test_no_turn_is_lost_whenever_clients_leave() -> None:
    async def run() -> None:
        chance = random.Random(0)  # noqa: S311
        queue = FairQueue(2, 100)

        async def work(client: str) -> None:
            turn = await queue.enter(client, DecodeCost(1, 40), chance.choice([0.001, MINUTE_S]))
            try:
                await asyncio.sleep(chance.random() / 1000)
            finally:
                queue.leave(turn, 0.001)

        tasks = [asyncio.create_task(work(chance.choice("abc"))) for _ in range(300)]
        while any(not task.done() for task in tasks):
            chance.choice(tasks).cancel()
            await asyncio.sleep(chance.random() / 1000)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (queue._running, queue._free_bytes) == (0, 100)
        assert not queue._waiting
        queue.leave(await queue.enter("a", DecodeCost(1, 1), MINUTE_S), 0)

    scenario(run)


def test_clients_that_came_once_are_forgotten() -> None:
    async def run() -> None:
        clients = Clients()
        clients.wait("holds", cpu_ms=1)
        await settle()
        for number in range(5_000):
            clients.wait(f"client {number}")
        for _ in range(4_999):
            await settle()
            clients.queue.leave(clients.running.pop(), 0)
        assert len(clients.queue._spent_ms) < 1_100
        await clients.finish_all()
        assert not clients.queue._spent_ms

    scenario(run)
