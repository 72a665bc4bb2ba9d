"""Serve /evaluate: the recorded accuracy of the live models, and evaluation jobs."""

from http import HTTPStatus
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from app.dependencies import ServicesDependency
from app.exceptions import BadRequest, UnsupportedMediaType
from app.inference.pool import Version
from app.jobs.evaluation_queue import EvaluationJob
from app.middleware.access import OperatorOnly
from app.routes.parameters import StrictRoute, parse_parameters
from app.routes.responses import EventStream, LastEventId, describe_events, json_response
from app.routes.uploads import MULTIPART, URLENCODED, form_schema, has_body, media_type, read_form
from training.store import Evaluation
from training.text import quote

router = APIRouter(prefix="/evaluate", tags=["evaluate"], route_class=StrictRoute)

_EXAMPLE = "curl -F file=@photos.zip"


class EvaluateQuery(BaseModel):
    """The parameters of an evaluation, in the query or as text fields of the form."""

    model: str | None = Field(default=None, description="Default: the same as for /predict.")
    version: Version | None = Field(default=None, description="Default: the live version.")
    split: Literal["test", "train"] = Field(
        default="test", description="Split of the data set; not for a zip.", examples=["test"]
    )
    limit: int | None = Field(
        default=None,
        ge=1,
        description="Number of images of the split to measure on; not for a zip. Default: all.",
        examples=[1000],
    )


EvaluationId = Annotated[str, Path(description="Id of an evaluation.")]
EvaluationLimit = Annotated[int, Query(ge=1, le=100, description="Largest number of evaluations.")]

_BODY: dict[str, Any] = {
    "requestBody": {
        "content": {MULTIPART: {"schema": form_schema({"type": "string", "format": "binary"}, EvaluateQuery)}}
    }
}
_LINKS = {"evaluation": {"operationId": "evaluation", "parameters": {"evaluation_id": "$response.body#/id"}}}


class RecordedEvaluation(BaseModel, use_attribute_docstrings=True):
    """The recorded test result of a live model."""

    model: str
    """Name of the model."""
    version: int
    """Live version of the model."""
    recipe: str
    """Name of the recipe that trained it."""
    test: Evaluation
    """Measures on the full test set."""


@router.get("", summary="Recorded accuracy of every live model")
async def recorded(services: ServicesDependency) -> list[RecordedEvaluation]:
    """Return the accuracy on the whole test set. It was measured when the model was published."""
    return [
        RecordedEvaluation(
            model=name,
            version=model.card.version,
            recipe=str(model.card.recipe.get("name", "unknown")),
            test=model.card.test,
        )
        for name, model in sorted(services.pool.live().items())
    ]


@router.post(
    "",
    dependencies=[OperatorOnly],
    openapi_extra=_BODY,
    responses={
        200: {"links": _LINKS},
        202: {"model": EvaluationJob, "description": "Still running; see Location.", "links": _LINKS},
    },
    summary="Measure a live model now",
)
async def evaluate(
    request: Request,
    response: Response,
    services: ServicesDependency,
    query: Annotated[EvaluateQuery, Query()],
) -> EvaluationJob:
    """Measure a model on the data set, or on a zip of images that the multipart field `file` contains.

    The folders of the zip are named by class, such as `apple/1.png`. A measurement that takes longer than a few seconds
    continues in the background: the response has status 202 and the URL of the result in `Location`.
    """
    content_type = media_type(request)
    if content_type == MULTIPART:
        form = await read_form(request, 1, _EXAMPLE)
        try:
            query = parse_parameters(EvaluateQuery, request.scope["query_string"], form.fields)
            if unused := query.model_fields_set & {"split", "limit"}:
                raise BadRequest(f"{' and '.join(sorted(unused))} apply to the data set only; a zip is measured whole")
            model = await services.pool.get(query.model, query.version, patient=True)
            job = await services.evaluations.submit(model, "zip", None, form.files[0].file)
        finally:
            await form.close()
    elif content_type not in ("", URLENCODED) or await has_body(request):
        raise UnsupportedMediaType(
            f"the content type {quote(content_type or '(none)')} is not supported; send a zip as multipart/form-data: "
            f"{_EXAMPLE}"
        )
    else:
        model = await services.pool.get(query.model, query.version, patient=True)
        job = await services.evaluations.submit(model, query.split, query.limit, None)
    if not job.state.finished:
        response.status_code = HTTPStatus.ACCEPTED
        response.headers["Location"] = f"{request.scope['root_path']}/evaluate/{job.id}"
    return job


@router.get("/jobs", response_model=list[EvaluationJob], summary="The latest evaluations, newest first")
async def evaluations(services: ServicesDependency, limit: EvaluationLimit = 100) -> Response:
    """List the unfinished evaluations and the last 100 finished ones."""
    jobs = services.evaluation_jobs
    return await jobs.threads.read(lambda: json_response(jobs.newest(limit)))


@router.get("/{evaluation_id}", response_model=EvaluationJob, summary="An evaluation's state, progress and result")
async def evaluation(evaluation_id: EvaluationId, services: ServicesDependency) -> Response:
    """Return one evaluation."""
    jobs = services.evaluation_jobs
    return await jobs.threads.read(lambda: json_response(jobs.get(evaluation_id)))


@router.delete("/{evaluation_id}", dependencies=[OperatorOnly], summary="Cancel an evaluation")
async def cancel_evaluation(evaluation_id: EvaluationId, services: ServicesDependency) -> EvaluationJob:
    """Cancel an evaluation. A finished one does not change."""
    return await services.evaluations.cancel(evaluation_id)


@router.get(
    "/{evaluation_id}/events",
    response_class=StreamingResponse,
    responses=describe_events("tick"),
    summary="An evaluation's progress as server-sent events",
)
async def evaluation_events(
    evaluation_id: EvaluationId, services: ServicesDependency, last_event_id: LastEventId = 0
) -> StreamingResponse:
    """Stream the evaluation's progress: `tick` has the images so far. The last event, `end`, holds the evaluation."""
    jobs = services.evaluation_jobs
    await jobs.threads.read(jobs.state, evaluation_id)  # an unknown evaluation gets 404 before the stream begins
    stream = jobs.events(evaluation_id, last_event_id, lambda: services.draining)
    return EventStream(services.event_streams, stream)
