"""Serve /train: submit, list, follow and cancel training jobs."""

from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Header, Query, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from app.clients import client_network
from app.dependencies import ServicesDependency
from app.jobs.queue import Job, JobEvent, JobQueue, JobRequest, JobSummary
from app.middleware.access import OperatorOnly
from app.threads import json_response

router = APIRouter(prefix="/train", tags=["train"])

_TO_JOB = {"parameters": {"job_id": "$response.body#/id"}}
_LINKS = {operation: {"operationId": operation, **_TO_JOB} for operation in ("job", "events", "cancel")}

_STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx would buffer events


class EventStream(StreamingResponse):
    """A response of server-sent events. The number of clients that receive one at a time is limited.

    Args:
        jobs: The queue, which counts the client while the response is sent. The response counts it, not the body,
            because a response that is dropped before it begins runs no code of its body.
        events: Events of a job. None is sent as a comment, because proxies close idle streams.
    """

    media_type = "text/event-stream"

    def __init__(self, jobs: JobQueue, events: AsyncIterator[JobEvent | None]):
        super().__init__((_encode_event(event) async for event in events), headers=_STREAM_HEADERS)
        self._jobs = jobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = scope.get("client")
        with self._jobs.follow(client_network(client[0] if client else "")):
            await super().__call__(scope, receive, send)


def _encode_event(event: JobEvent | None) -> str:
    """Encode an event as in the HTML standard, section 9.2."""
    if event is None:
        return ": nothing new\n\n"
    number = "" if event.number is None else f"id: {event.number}\n"
    return f"{number}event: {event.name}\ndata: {event.data}\n\n"


@router.post(
    "",
    status_code=HTTPStatus.ACCEPTED,
    dependencies=[OperatorOnly],
    responses={202: {"links": _LINKS}},
    summary="Start training",
)
async def submit(
    wanted: JobRequest,
    response: Response,
    services: ServicesDependency,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> Job:
    """Queue a job and return it at once. The trained model is published to the model store.

    The field `promote` decides whether the model goes live. A repeated request with the same `Idempotency-Key` returns
    the same job.
    """
    job = await services.jobs.threads.run(services.jobs.submit, wanted, idempotency_key)
    response.headers["Location"] = f"/train/{job.id}"
    return job


@router.get("", response_model=list[JobSummary], summary="The latest jobs, newest first")
async def jobs(services: ServicesDependency, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> Response:
    return await services.jobs.threads.read(lambda: json_response(services.jobs.newest(limit)))


@router.get("/{job_id}", response_model=Job, summary="A job's state, progress and history")
async def job(job_id: str, services: ServicesDependency) -> Response:
    return await services.jobs.threads.read(lambda: json_response(services.jobs.get(job_id)))


@router.delete("/{job_id}", dependencies=[OperatorOnly], summary="Cancel a job")
async def cancel(job_id: str, services: ServicesDependency) -> Job:
    """Cancel a job at once. Its process, if there is one, ends within a few seconds."""
    return await services.jobs.threads.run(services.jobs.cancel, job_id)


@router.get("/{job_id}/events", response_class=StreamingResponse, summary="A job's progress as server-sent events")
async def events(
    job_id: str, services: ServicesDependency, last_event_id: Annotated[int, Header(ge=0, lt=2**31)] = 0
) -> StreamingResponse:
    """Stream the job's metrics from the start, or after `Last-Event-ID`: one event per tick and per epoch.

    The last event, `end`, holds the job. The stream ends without it if the service stops first. The client can then
    reconnect to the next service.
    """
    await services.jobs.threads.read(services.jobs.state, job_id)  # an unknown job gets 404 before the stream begins
    return EventStream(services.jobs, services.jobs.events(job_id, last_event_id, lambda: services.draining))
