"""Test threads with a bounded queue: they refuse calls that are late or too many, and no others."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator

import pytest

from app.exceptions import Unavailable
from app.threads import Threads


class Gate:
    """A callable that blocks the calling thread until the gate is opened."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self._open = threading.Event()
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        self.entered.set()
        self._open.wait(30)
        return "done"

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  the threads signal no event
            await asyncio.sleep(0.01)


def scenario(run: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await run()

    asyncio.run(bounded())


def test_call_that_finds_the_queue_full_is_refused_at_once(gate: Gate) -> None:
    async def run() -> None:
        threads = Threads("the archive", 1, max_waiting=1, patience_s=30)
        calls = [asyncio.create_task(threads.run(gate)) for _ in range(2)]
        await until(gate.entered.is_set)
        with pytest.raises(Unavailable, match="the archive is busy: 1 calls are waiting"):
            await threads.run(gate)
        gate.open()
        assert await asyncio.gather(*calls) == ["done", "done"]
        assert await threads.run(gate) == "done"

    scenario(run)


def test_call_that_waits_for_too_long_is_refused_and_never_made(gate: Gate) -> None:
    async def run() -> None:
        threads = Threads("the archive", 1, patience_s=0.05)
        first = asyncio.create_task(threads.run(gate))
        await until(gate.entered.is_set)
        with pytest.raises(Unavailable, match=r"does not answer within 0.05 s"):
            await threads.run(gate)
        gate.open()
        assert await first == "done"  # a call that has begun may have changed data, so it is awaited
        assert await threads.run(lambda: gate.calls) == 1

    scenario(run)


def test_reader_that_takes_too_long_is_refused_and_its_error_is_not_logged(
    gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        threads = Threads("the archive", 1, patience_s=0.05)

        def fail() -> None:
            gate()
            raise OSError("too late for anybody to hear")

        with pytest.raises(Unavailable, match="does not answer"):
            await threads.read(fail)
        gate.open()
        assert await threads.read(lambda: gate.calls) == 1

    scenario(run)
    assert not caplog.records


def test_call_whose_client_has_left_is_never_made(gate: Gate) -> None:
    async def run() -> None:
        threads = Threads("the archive", 1, max_waiting=1, patience_s=30)
        first = asyncio.create_task(threads.run(gate))
        await until(gate.entered.is_set)
        second = asyncio.create_task(threads.run(gate))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.wait([second])
        third = asyncio.create_task(threads.run(lambda: gate.calls))  # the cancelled call leaves room in the queue
        gate.open()
        assert (await first, await third) == ("done", 1)

    scenario(run)
