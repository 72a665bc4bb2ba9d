"""Test that the head and the body of a prediction are one write, in the order of all other writes."""

import asyncio
from typing import cast

import pytest

from app.server.joined_writes import JOINED_WRITES, JoinedWrites, join_writes


class Transport:
    """A transport that keeps the calls that it gets."""

    def __init__(self) -> None:
        self.calls: list[bytes | str] = []
        self.is_closed = False

    def write(self, data: bytes) -> None:
        self.calls.append(data)

    def close(self) -> None:
        self.calls.append("close")

    def is_closing(self) -> bool:
        return self.is_closed


@pytest.fixture
def transport() -> Transport:
    return Transport()


@pytest.fixture
def writes(transport: Transport) -> JoinedWrites:
    return JoinedWrites(cast(asyncio.Transport, transport))


def test_parts_within_the_context_are_one_write(transport: Transport, writes: JoinedWrites) -> None:
    writes.write(b"100 Continue")
    with join_writes({JOINED_WRITES: writes}):
        writes.write(b"head ")
        writes.write(b"body")
        assert transport.calls == [b"100 Continue"]
    writes.write(b"next head")
    assert transport.calls == [b"100 Continue", b"head body", b"next head"]


def test_a_connection_is_closed_after_the_response(transport: Transport, writes: JoinedWrites) -> None:
    with writes:
        writes.write(b"head ")
        writes.write(b"body")
        writes.close()
    assert transport.calls == [b"head body", "close"]


def test_a_response_that_fails_has_sent_its_head(transport: Transport, writes: JoinedWrites) -> None:
    def respond() -> None:
        with writes:
            writes.write(b"head")
            raise RuntimeError("the body is longer than its Content-Length")

    with pytest.raises(RuntimeError):
        respond()
    assert transport.calls == [b"head"]


def test_nothing_is_written_to_a_closed_connection(transport: Transport, writes: JoinedWrites) -> None:
    with writes:
        writes.write(b"head")
        transport.is_closed = True
    assert transport.calls == []


def test_other_servers_write_at_once() -> None:
    with join_writes({}):
        pass
