"""Serve /train: submit, list, follow and cancel training jobs."""

from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from app.dependencies import ServicesDependency
from app.jobs.training_queue import TrainingJob, TrainingJobSummary, TrainingRequest
from app.middleware.access import OperatorOnly
from app.routes.parameters import StrictRoute
from app.routes.responses import EventStream, json_response
from training.recipes import RECIPES

router = APIRouter(prefix="/train", tags=["train"], route_class=StrictRoute)

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
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
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
async def jobs(services: ServicesDependency, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> Response:
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
async def job(job_id: str, services: ServicesDependency) -> Response:
    """Return a job with its metrics so far."""
    jobs = services.training_jobs
    return await jobs.threads.read(lambda: json_response(jobs.get(job_id)))


@router.delete("/{job_id}", dependencies=[OperatorOnly], summary="Cancel a job")
async def cancel(job_id: str, services: ServicesDependency) -> TrainingJob:
    """Cancel a job at once. Its process, if there is one, ends within a few seconds."""
    jobs = services.training_jobs
    return await jobs.threads.run(jobs.cancel, job_id)


@router.get("/{job_id}/events", response_class=StreamingResponse, summary="A job's progress as server-sent events")
async def events(
    job_id: str, services: ServicesDependency, last_event_id: Annotated[int, Header(ge=0, lt=2**31)] = 0
) -> StreamingResponse:
    """Stream the job's metrics from the start, or after `Last-Event-ID`: one event per tick and per epoch.

    The last event, `end`, holds the job. The stream ends without it if the service stops first. The client can then
    reconnect to the next service.
    """
    jobs = services.training_jobs
    await jobs.threads.read(jobs.state, job_id)  # an unknown job gets 404 before the stream begins
    stream = jobs.events(job_id, last_event_id, lambda: services.draining)
    return EventStream(services.event_streams, stream)
