"""Test the fair threads: errors, deadlines, and clients that leave before, at, and after the start of their work."""

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from app.inference.fair_threads import FairThreads, Outcome, measure
from app.inference.images.cost import DecodeCost

MINUTE_S = 60.0
COST = DecodeCost(1, 40)


class Gate:
    """Work that waits until the gate is open."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.opened = threading.Event()

    def work(self, name: str) -> Outcome[str]:
        self.begun.append(name)
        assert self.opened.wait(30)
        return Outcome(name, None, 0.001)


@pytest.fixture
def threads() -> Iterator[FairThreads]:
    pool = FairThreads(1, 100, "test")
    yield pool
    pool.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  threads signal no event
            await asyncio.sleep(0.001)


def run(threads: FairThreads, gate: Gate, name: str, timeout_s: float = MINUTE_S) -> "asyncio.Task[str]":
    return asyncio.create_task(threads.run(name, COST, partial(gate.work, name), timeout_s))


def test_the_caller_gets_the_result_or_the_error_of_the_work(threads: FairThreads) -> None:
    async def scenario() -> None:
        assert await threads.run("a", COST, partial(measure, lambda: 3), MINUTE_S) == 3
        with pytest.raises(ZeroDivisionError):
            await threads.run("a", COST, partial(measure, lambda: 1 / 0), MINUTE_S)

    asyncio.run(scenario())


def test_work_is_measured_in_cpu_time() -> None:
    assert measure(partial(time.sleep, 0.2)).cpu_s < 0.1
    times = iter([1.0, 3.5])
    assert measure(lambda: None, clock=lambda: next(times)).cpu_s == 2.5


def test_work_whose_turn_does_not_come_in_time_is_dropped(threads: FairThreads) -> None:
    async def scenario() -> None:
        gate = Gate()
        running = run(threads, gate, "a")
        await until(lambda: gate.begun == ["a"])
        for timeout_s in (0.01, -1):
            with pytest.raises(TimeoutError):
                await run(threads, gate, "late", timeout_s)
        gate.opened.set()
        assert await running == "a"
        assert await run(threads, gate, "b") == "b"
        assert gate.begun == ["a", "b"]

    asyncio.run(scenario())


def test_work_that_has_started_is_not_late(threads: FairThreads) -> None:
    async def scenario() -> None:
        gate = Gate()
        slow = run(threads, gate, "a", timeout_s=0.2)
        await until(lambda: gate.begun == ["a"])
        await asyncio.sleep(0.3)
        gate.opened.set()
        assert await slow == "a"

    asyncio.run(scenario())


def test_the_work_of_a_client_that_leaves_is_dropped_if_it_waits(threads: FairThreads) -> None:
    async def scenario() -> None:
        gate = Gate()
        running, waiting, last = (run(threads, gate, name) for name in "abc")
        await until(lambda: gate.begun == ["a"])
        running.cancel()
        waiting.cancel()
        await asyncio.wait([running, waiting])
        gate.opened.set()
        assert await last == "c"
        assert gate.begun == ["a", "c"]

    asyncio.run(scenario())


def test_work_that_needs_less_memory_starts_when_the_work_before_it_is_dropped() -> None:
    async def scenario() -> None:
        threads, gate = FairThreads(2, 100, "test"), Gate()
        running = run(threads, gate, "a")
        await until(lambda: gate.begun == ["a"])
        large = asyncio.create_task(threads.run("b", DecodeCost(1, 90), partial(gate.work, "b"), MINUTE_S))
        await asyncio.sleep(0)
        small = run(threads, gate, "c")
        await asyncio.sleep(0.05)
        assert gate.begun == ["a"]
        large.cancel()
        await until(lambda: gate.begun == ["a", "c"])
        gate.opened.set()
        assert (await running, await small) == ("a", "c")
        threads.close()

    asyncio.run(scenario())


def test_no_turn_is_lost_whenever_clients_leave() -> None:
    async def scenario() -> None:
        chance = random.Random(0)  # noqa: S311
        threads = FairThreads(2, 100, "test")

        async def work(client: str) -> None:
            seconds = chance.random() / 1000
            await threads.run(client, COST, partial(measure, partial(time.sleep, seconds)), chance.choice([0.001, 60]))

        tasks = [asyncio.create_task(work(chance.choice("abc"))) for _ in range(300)]
        while any(not task.done() for task in tasks):
            chance.choice(tasks).cancel()
            await asyncio.sleep(chance.random() / 1000)
        await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: not threads._queue._running)
        assert threads._queue._free_bytes == 100
        assert not threads._queue
        assert await threads.run("a", COST, partial(measure, lambda: 3), MINUTE_S) == 3
        threads.close()

    asyncio.run(scenario())


def test_the_threads_end_when_the_pool_is_closed_even_after_the_event_loop() -> None:
    gate = Gate()
    threads = FairThreads(2, 100, "ending")

    async def scenario() -> None:
        task = run(threads, gate, "a")
        await until(lambda: gate.begun == ["a"])
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(scenario())
    threads.close()
    gate.opened.set()
    deadline = time.monotonic() + 30
    while any(thread.name.startswith("ending") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
