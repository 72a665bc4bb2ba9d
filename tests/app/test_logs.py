"""Tests of app.logs."""

import asyncio
import io
import logging
import sys
import threading
from collections.abc import Iterator

import pytest

from app import logs


class _Stream(io.StringIO):
    """A stream that keeps each write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        return len(text)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Stream]:
    stream = _Stream()
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setattr(sys, "stderr", stream)
    logs.configure("text", "INFO")
    root.handlers[0].setFormatter(logging.Formatter("%(message)s"))
    yield stream
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)


def test_the_lines_of_one_iteration_of_the_event_loop_are_one_write(stream: _Stream) -> None:
    async def log_two() -> None:
        logging.info("first")
        logging.info("second")
        assert not stream.writes
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        logging.info("third")
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    asyncio.run(log_two())
    assert stream.writes == ["first\nsecond\n", "third\n"]


def test_a_warning_is_written_at_once_and_in_order(stream: _Stream) -> None:
    async def warn() -> None:
        logging.info("before")
        logging.warning("fault")
        assert stream.writes == ["before\nfault\n"]

    asyncio.run(warn())


def test_a_line_of_another_thread_is_written_at_once(stream: _Stream) -> None:
    thread = threading.Thread(target=logging.info, args=("from a thread",))
    thread.start()
    thread.join()
    assert stream.writes == ["from a thread\n"]


def test_lines_of_a_loop_that_has_ended_are_not_lost(stream: _Stream) -> None:
    async def log(text: str) -> None:
        logging.info(text)

    loop = asyncio.new_event_loop()
    loop.call_soon(logging.info, "left")
    loop.call_soon(loop.stop)
    loop.run_forever()
    loop.close()
    asyncio.run(log("next"))
    logging.getLogger().handlers[0].flush()
    assert "".join(stream.writes) == "left\nnext\n"
