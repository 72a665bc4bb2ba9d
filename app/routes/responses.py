"""Build responses: JSON that is serialized in a thread, and the events of a job as server-sent events."""

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import Header
from fastapi.responses import Response, StreamingResponse
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from app.clients import FairShares, client_network
from app.exceptions import Unavailable
from app.jobs.queue import JobEvent

LastEventId = Annotated[
    int, Header(ge=0, lt=2**31, description="Number of the last event that the client has received. Default: none.")
]
"""The header with which a client continues a stream of events."""

_STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx would buffer events


def describe_events(names: str) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI description of a stream whose events have these names, besides `end`."""
    description = (
        f"Server-sent events (HTML standard, section 9.2): {names}, and at last end. An event has its number as id, "
        "except end, and a JSON object as data. A comment keeps the connection open after 15 s without an event."
    )
    return {200: {"description": description, "content": {"text/event-stream": {"schema": {"type": "string"}}}}}


def json_response(value: Any) -> Response:
    """Serialize pydantic models to a JSON response. A long list blocks the event loop, so call this in a thread."""
    return Response(to_json(value, inf_nan_mode="null"), media_type="application/json")


class EventStream(StreamingResponse):
    """A response of server-sent events. The number of clients that receive one at a time is limited.

    Args:
        streams: Number of clients that receive events now, by network. The response counts its client while it is sent.
            The body could not do so, because a response that is dropped before it begins runs no code of its body.
        events: Events of a job. None is sent as a comment, because proxies close idle streams.
    """

    media_type = "text/event-stream"

    def __init__(self, streams: FairShares, events: AsyncIterator[JobEvent | None]):
        super().__init__((_encode_event(event) async for event in events), headers=_STREAM_HEADERS)
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response.

        Raises:
            Unavailable: Too many clients receive events, in total or from this network.
        """
        client = scope.get("client")
        network = client_network(client[0] if client else "")
        if not self._streams.allows(network, 1, self._streams.total + 1):
            raise Unavailable(f"{self._streams.total} clients follow jobs already; try again later", "jobs_full")
        self._streams.add(network, 1)
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._streams.remove(network, 1)


def _encode_event(event: JobEvent | None) -> str:
    """Encode an event as in the HTML standard, section 9.2."""
    if event is None:
        return ": nothing new\n\n"
    number = "" if event.number is None else f"id: {event.number}\n"
    return f"{number}event: {event.name}\ndata: {event.data}\n\n"
