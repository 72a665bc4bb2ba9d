"""Serve /train: submit, list, follow and cancel training jobs."""

from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi import Path as Parameter
from fastapi.responses import PlainTextResponse, StreamingResponse
from pydantic import BaseModel

from app.dependencies import ServicesDependency
from app.jobs.training_queue import TrainingJob, TrainingJobSummary, TrainingRequest
from app.middleware.access import OperatorOnly
from app.routes.parameters import StrictRoute
from app.routes.responses import EventStream, LastEventId, describe_events, json_response
from training.recipes import RECIPES
from training.run import OUTPUT

router = APIRouter(prefix="/train", tags=["train"], route_class=StrictRoute)

JobId = Annotated[str, Parameter(description="Id of a training job.")]
FileName = Annotated[str, Parameter(description="One of the names in `files` of the job.")]
JobLimit = Annotated[int, Query(ge=1, le=1000, description="Largest number of jobs.")]
IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        description="A text of the client's choice. A repeated request with the same text returns the same job.",
    ),
]

_MEDIA_TYPES = {".png": "image/png", ".json": "application/json", ".jsonl": "application/x-ndjson"}
_FILES: dict[int | str, dict[str, Any]] = {200: {"content": {kind: {} for kind in _MEDIA_TYPES.values()}}}
_TO_JOB = {"parameters": {"job_id": "$response.body#/id"}}
_LINKS = {operation: {"operationId": operation, **_TO_JOB} for operation in ("job", "events", "cancel")}


class RecipeDetails(BaseModel, use_attribute_docstrings=True):
    """A recipe and the values of its fields."""

    name: str
    """Name of the recipe."""
    model: str
    """Name of the trained model in the store."""
    fields: dict[str, Any]
    """Values of the fields that apply to the network of the recipe."""


@router.post(
    "",
    status_code=HTTPStatus.ACCEPTED,
    dependencies=[OperatorOnly],
    responses={202: {"links": _LINKS}},
    summary="Start training",
)
async def submit(
    wanted: TrainingRequest,
    request: Request,
    response: Response,
    services: ServicesDependency,
    idempotency_key: IdempotencyKey = None,
) -> TrainingJob:
    """Queue a job and return it at once. The trained model is published to the model store.

    The field `promote` decides whether the model goes live. A repeated request with the same `Idempotency-Key` returns
    the same job.
    """
    jobs = services.training_jobs
    job = await jobs.threads.run(jobs.submit, wanted, idempotency_key)
    response.headers["Location"] = f"{request.scope['root_path']}/train/{job.id}"
    return job


@router.get("", response_model=list[TrainingJobSummary], summary="The latest jobs, newest first")
async def jobs(services: ServicesDependency, limit: JobLimit = 100) -> Response:
    """List the latest jobs without their metrics."""
    jobs = services.training_jobs
    return await jobs.threads.read(lambda: json_response(jobs.newest(limit)))


@router.get("/recipes", summary="The recipes")
async def recipes() -> list[RecipeDetails]:
    """List the recipes with the fields that apply to them. The schema of `overrides` describes the fields."""
    return [
        RecipeDetails(
            name=recipe.name,
            model=recipe.model,
            fields=recipe.model_dump(mode="json", include=set(recipe.applicable_fields)),
        )
        for recipe in RECIPES.values()
    ]


@router.get("/{job_id}", response_model=TrainingJob, summary="A job's state, progress and history")
async def job(job_id: JobId, services: ServicesDependency) -> Response:
    """Return a job with its metrics so far."""
    jobs = services.training_jobs
    return await jobs.threads.read(lambda: json_response(jobs.get(job_id)))


@router.delete("/{job_id}", dependencies=[OperatorOnly], summary="Cancel a job")
async def cancel(job_id: JobId, services: ServicesDependency) -> TrainingJob:
    """Cancel a job at once. Its process, if there is one, ends within a few seconds."""
    jobs = services.training_jobs
    return await jobs.threads.run(jobs.cancel, job_id)


@router.get(
    f"/{{job_id}}/files/{OUTPUT}",
    dependencies=[OperatorOnly],
    response_class=PlainTextResponse,
    summary="The output of a job's process",
)
async def output(job_id: JobId, services: ServicesDependency) -> Response:
    """Return the log of the process that trains. Only operators may read it, because it has paths and tracebacks."""
    jobs = services.training_jobs
    return PlainTextResponse(await jobs.threads.read(jobs.read_file, job_id, OUTPUT))


@router.get("/{job_id}/files/{name}", response_class=Response, responses=_FILES, summary="A file of a job's run")
async def file(job_id: JobId, name: FileName, services: ServicesDependency) -> Response:
    """Return a picture of the run, its recipe, its metrics or its publication. `files` of the job lists the names."""
    jobs = services.training_jobs
    content = await jobs.threads.read(jobs.read_file, job_id, name)
    return Response(content, media_type=_MEDIA_TYPES[Path(name).suffix])


@router.get(
    "/{job_id}/events",
    response_class=StreamingResponse,
    responses=describe_events("phase, tick, epoch"),
    summary="A job's progress as server-sent events",
)
async def events(job_id: JobId, services: ServicesDependency, last_event_id: LastEventId = 0) -> StreamingResponse:
    """Stream the job's reports from the start, or after `Last-Event-ID`.

    `phase` reports work outside the epochs, `tick` the progress within an epoch, and `epoch` the result of an epoch.
    The last event, `end`, holds the job. The stream ends without it if the service stops first. The client can then
    reconnect to the next service.
    """
    jobs = services.training_jobs
    await jobs.threads.read(jobs.state, job_id)  # an unknown job gets 404 before the stream begins
    stream = jobs.events(job_id, last_event_id, lambda: services.draining)
    return EventStream(services.event_streams, stream)
