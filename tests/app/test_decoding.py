"""Decoding in threads: what does not wait for what, and what is refused."""

import asyncio
import io
import threading
import time

import numpy as np
import pytest
from numpy.typing import NDArray

from app import images
from app.decoding import Decoders, File
from app.errors import Unavailable
from app.settings import Settings


def files(*contents: bytes) -> list[File]:
    return [(content.decode(), io.BytesIO(content)) for content in contents]


def soon() -> float:
    return time.monotonic() + 60


class Gate:
    """Stands for `images.decode`: large and slow images are not done before the test opens the gate; others are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.begun: list[bytes] = []
        self.entered = threading.Event()
        self.open = threading.Event()
        monkeypatch.setattr(images, "decode", self.decode)

    def decode(self, data: bytes, max_bytes: int, max_pixels: int, large: bool) -> NDArray[np.uint8]:
        assert max_bytes < max_pixels
        if data.startswith(b"large") and not large:
            raise images.Large
        if data.startswith((b"large", b"slow")):
            self.begun.append(data)
            self.entered.set()
            assert self.open.wait(10)
        return np.full((3, 32, 32), data[-1], np.uint8)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def test_large_images_hold_up_each_other_only(gate: Gate) -> None:
    async def scenario() -> None:
        decoders = Decoders(Settings())
        large = [asyncio.create_task(decoders.run(files(b"large1", b"2"), soon())) for _ in range(10)]
        assert await asyncio.to_thread(gate.entered.wait, 10)
        pixels = await asyncio.wait_for(decoders.run(files(b"3", b"4"), soon()), 10)
        assert pixels[:, 0, 0, 0].tolist() == [ord("3"), ord("4")]
        assert (decoders.waiting, decoders.held_up) == (0, 20)
        assert len(gate.begun) == 1
        gate.open.set()
        for each in await asyncio.gather(*large):
            assert each[:, 0, 0, 0].tolist() == [ord("1"), ord("2")]
        assert (decoders.waiting, decoders.held_up) == (0, 0)

    asyncio.run(scenario())


@pytest.mark.parametrize(("kind", "what"), [(b"slow", "waiting"), (b"large", "held up")])
def test_what_would_wait_too_long_is_refused(
    gate: Gate, kind: bytes, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.decoding.processors", lambda: 1)

    async def scenario() -> None:
        decoders = Decoders(Settings(max_queue=3))
        first = asyncio.create_task(decoders.run(files(kind + b"1", b"2"), soon()))
        assert await asyncio.to_thread(gate.entered.wait, 10)
        late = asyncio.create_task(decoders.run(files(kind + b"3"), time.monotonic() + 0.05))
        while (decoders.held_up if kind == b"large" else decoders.waiting) < 3:  # noqa: ASYNC110  counters announce nothing
            await asyncio.sleep(0)
        with pytest.raises(Unavailable, match=f"3 images are {what}"):
            await decoders.run(files(kind + b"4"), soon())
        await asyncio.sleep(0.1)
        gate.open.set()
        with pytest.raises(Unavailable, match="deadline"):
            await late
        await first
        assert gate.begun == [kind + b"1"]
        assert (decoders.waiting, decoders.held_up) == (0, 0)

    asyncio.run(scenario())


def test_what_waits_for_a_client_that_leaves_is_not_decoded(gate: Gate) -> None:
    async def scenario() -> None:
        decoders = Decoders(Settings())
        first, gone = (asyncio.create_task(decoders.run(files(name), soon())) for name in (b"large1", b"large2"))
        assert await asyncio.to_thread(gate.entered.wait, 10)
        gone.cancel()
        await asyncio.wait([gone])
        assert decoders.waiting + decoders.held_up == 1
        gate.open.set()
        await first
        assert gate.begun == [b"large1"]
        assert (decoders.waiting, decoders.held_up) == (0, 0)

    asyncio.run(scenario())
