"""Send the head and the body of a response in one write, which saves a system call and a packet.

uvicorn writes each of them by itself. The route encloses the response:

    with join_writes(scope):
        await response(scope, receive, send)
"""

import asyncio
from collections.abc import MutableMapping
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, cast

JOINED_WRITES = "cifar100.joined_writes"
"""Key in a request's scope: the `JoinedWrites` of the response."""


class JoinedWrites:
    """A transport that joins all data of its context into one write. Outside the context, it writes at once.

    Args:
        transport: Transport of the connection, to which all other calls go.
    """

    def __init__(self, transport: asyncio.Transport):
        self._transport = transport
        self._parts: list[bytes] | None = None

    def __enter__(self) -> None:
        self._parts = []

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._flush()
        self._parts = None

    def write(self, data: bytes) -> None:
        """Write data at once, or at the end of the context."""
        if self._parts is None:
            self._transport.write(data)
        else:
            self._parts.append(data)

    def close(self) -> None:
        """Close the connection after everything is written."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._parts and not self._transport.is_closing():
            self._transport.write(b"".join(self._parts))
            self._parts = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def join_writes(scope: MutableMapping[str, Any]) -> AbstractContextManager[None]:
    """Return the context in which the parts of a response are joined. Other servers than ours write them at once.

    The response must not wait for anything but the network, because nothing is sent meanwhile.
    """
    return cast("AbstractContextManager[None]", scope.get(JOINED_WRITES) or nullcontext())
