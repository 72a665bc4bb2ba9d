"""/train: training jobs."""

from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Header, Query, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from app.access import ForOperators
from app.clients import client_network
from app.jobs import Job, JobRequest, Jobs, JobSummary
from app.services import FromApp
from app.threads import json_response

router = APIRouter(prefix="/train", tags=["train"])

_TO_JOB = {"parameters": {"job_id": "$response.body#/id"}}
_LINKS = {operation: {"operationId": operation, **_TO_JOB} for operation in ("job", "events", "cancel")}

_STREAMED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx would hold events back


class EventStream(StreamingResponse):
    """Server-sent events for one of a limited number of clients.

    Args:
        jobs: count the client while it is served: from here, as a response that is dropped before it begins runs no
            code of its body.
        events: the body.
    """

    media_type = "text/event-stream"

    def __init__(self, jobs: Jobs, events: AsyncIterator[str]):
        super().__init__(events, headers=_STREAMED)
        self._jobs = jobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = scope.get("client")
        with self._jobs.follow(client_network(client[0] if client else "")):
            await super().__call__(scope, receive, send)


@router.post(
    "",
    status_code=HTTPStatus.ACCEPTED,
    dependencies=[ForOperators],
    responses={202: {"links": _LINKS}},
    summary="Start training",
)
async def submit(
    wanted: JobRequest,
    response: Response,
    services: FromApp,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> Job:
    """Queues a job and answers at once. The result goes into the model store, and live if it is good enough.

    A request that is sent again with the same `Idempotency-Key` gives the same job.
    """
    job = await services.jobs.threads.run(services.jobs.submit, wanted, idempotency_key)
    response.headers["Location"] = f"/train/{job.id}"
    return job


@router.get("", response_model=list[JobSummary], summary="The latest jobs, newest first")
async def jobs(services: FromApp, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> Response:
    return await services.jobs.threads.read(lambda: json_response(services.jobs.newest(limit)))


@router.get("/{job_id}", response_model=Job, summary="A job's state, progress and history")
async def job(job_id: str, services: FromApp) -> Response:
    return await services.jobs.threads.read(lambda: json_response(services.jobs.get(job_id)))


@router.delete("/{job_id}", dependencies=[ForOperators], summary="Cancel a job")
async def cancel(job_id: str, services: FromApp) -> Job:
    """The job is cancelled at once; its process, if it runs, ends within a few seconds."""
    return await services.jobs.threads.run(services.jobs.cancel, job_id)


@router.get("/{job_id}/events", response_class=StreamingResponse, summary="A job's progress as server-sent events")
async def events(
    job_id: str, services: FromApp, last_event_id: Annotated[int, Header(ge=0, lt=2**31)] = 0
) -> StreamingResponse:
    """Every tick and epoch from the start, or after `Last-Event-ID`; ends with an event `end` that holds the job.

    Where the service stops first there is no `end`: the client may follow the next service.
    """
    await services.jobs.threads.read(services.jobs.state, job_id)  # an unknown job is refused before the stream begins
    return EventStream(services.jobs, services.jobs.events(job_id, last_event_id, lambda: services.draining))
