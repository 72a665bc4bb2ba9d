"""/train: training jobs."""

from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Header, Response
from fastapi.responses import StreamingResponse

from app.jobs import Job, JobRequest, event_stream
from app.services import FromApp

router = APIRouter(prefix="/train", tags=["train"])


@router.post("", status_code=HTTPStatus.ACCEPTED, summary="Start training")
async def submit(wanted: JobRequest, response: Response, services: FromApp) -> Job:
    """Queues a job and answers at once. The result goes into the model store, and live if it is good enough."""
    job = services.jobs.submit(wanted)
    response.headers["Location"] = f"/train/{job.id}"
    return job


@router.get("", summary="All jobs, newest first")
async def jobs(services: FromApp) -> list[Job]:
    return services.jobs.all()


@router.get("/{job_id}", summary="A job's state, progress and history")
async def job(job_id: str, services: FromApp) -> Job:
    return services.jobs.get(job_id)


@router.delete("/{job_id}", summary="Cancel a job")
async def cancel(job_id: str, services: FromApp) -> Job:
    return await services.jobs.cancel(job_id)


@router.get("/{job_id}/events", response_class=StreamingResponse, summary="A job's progress as server-sent events")
async def events(job_id: str, services: FromApp, last_event_id: Annotated[int, Header(ge=0)] = 0) -> StreamingResponse:
    """Every tick and epoch from the start, or after `Last-Event-ID`; ends with an event `end` that holds the job."""
    services.jobs.get(job_id)  # 404 before the stream begins

    async def stream() -> AsyncIterator[str]:
        async for number, metrics in services.jobs.events(job_id, last_event_id):
            yield event_stream(number, metrics)
        yield f"event: end\ndata: {services.jobs.get(job_id).model_dump_json()}\n\n"

    return StreamingResponse(stream(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
