"""/train: training jobs."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Header, Query, Response
from fastapi.responses import StreamingResponse

from app.access import ForOperators
from app.jobs import Job, JobRequest, JobSummary, event_stream
from app.services import FromApp

router = APIRouter(prefix="/train", tags=["train"])

_TO_JOB = {"parameters": {"job_id": "$response.body#/id"}}
_LINKS = {operation: {"operationId": operation, **_TO_JOB} for operation in ("job", "events", "cancel")}

_STREAMED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx would hold events back

# Routes that are no coroutines run in threads: the database may have to wait for a disk.


@router.post(
    "",
    status_code=HTTPStatus.ACCEPTED,
    dependencies=[ForOperators],
    responses={202: {"links": _LINKS}},
    summary="Start training",
)
def submit(
    wanted: JobRequest,
    response: Response,
    services: FromApp,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> Job:
    """Queues a job and answers at once. The result goes into the model store, and live if it is good enough.

    A request that is sent again with the same `Idempotency-Key` gives the same job.
    """
    job = services.jobs.submit(wanted, idempotency_key)
    response.headers["Location"] = f"/train/{job.id}"
    return job


@router.get("", summary="The latest jobs, newest first")
def jobs(services: FromApp, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> list[JobSummary]:
    return services.jobs.newest(limit)


@router.get("/{job_id}", summary="A job's state, progress and history")
def job(job_id: str, services: FromApp) -> Job:
    return services.jobs.get(job_id)


@router.delete("/{job_id}", dependencies=[ForOperators], summary="Cancel a job")
def cancel(job_id: str, services: FromApp) -> Job:
    """The job is cancelled at once; its process, if it runs, ends within a few seconds."""
    return services.jobs.cancel(job_id)


@router.get("/{job_id}/events", response_class=StreamingResponse, summary="A job's progress as server-sent events")
def events(
    job_id: str, services: FromApp, last_event_id: Annotated[int, Header(ge=0, lt=2**31)] = 0
) -> StreamingResponse:
    """Every tick and epoch from the start, or after `Last-Event-ID`; ends with an event `end` that holds the job."""
    # What can be refused is refused before the stream begins.
    services.jobs.get(job_id)
    services.jobs.require_room()

    async def stream() -> AsyncIterator[str]:
        async with aclosing(services.jobs.events(job_id, last_event_id, lambda: services.draining)) as events:
            async for event in events:
                yield event_stream(*event) if event else ": nothing new\n\n"
        ended = await asyncio.to_thread(services.jobs.get, job_id)
        if ended.state.finished:  # otherwise the service stops, and the client may follow the next one
            yield f"event: end\ndata: {ended.model_dump_json()}\n\n"

    return StreamingResponse(stream(), media_type="text/event-stream", headers=_STREAMED)
