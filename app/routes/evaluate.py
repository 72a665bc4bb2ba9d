"""Serve /evaluate: the recorded accuracy of the live models, and new measurements."""

from http import HTTPStatus
from threading import Event
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel
from starlette.datastructures import UploadFile

from app.dependencies import Services, ServicesDependency
from app.exceptions import BadRequest, UnsupportedMediaType
from app.inference.pool import Model, Version
from app.jobs.evaluations import EvaluationJob, LabeledImages, read_split, read_zip
from app.middleware.access import OperatorOnly
from app.routes.uploads import media_type, read_form
from training.store import Evaluation
from training.text import quote

router = APIRouter(prefix="/evaluate", tags=["evaluate"])

_BODY: dict[str, Any] = {
    "requestBody": {
        "content": {
            "multipart/form-data": {
                "schema": {"type": "object", "properties": {"file": {"type": "string", "format": "binary"}}}
            }
        }
    }
}
_LINKS = {"evaluation": {"operationId": "evaluation", "parameters": {"evaluation_id": "$response.body#/id"}}}


class RecordedEvaluation(BaseModel):
    """The recorded test result of a live model."""

    model: str
    version: int
    recipe: str
    test: Evaluation


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
    model: Annotated[str | None, Query(description="Default: the same as for /predict.")] = None,
    version: Annotated[Version | None, Query(description="Default: the live version.")] = None,
    split: Annotated[Literal["test", "train"], Query(description="Split of the data set; ignored for a zip.")] = "test",
    limit: Annotated[int | None, Query(ge=1, description="Number of images to measure on. Default: all.")] = None,
) -> EvaluationJob:
    """Measure a model on the data set, or on a zip of images that the multipart field `file` contains.

    The folders of the zip are named by class, such as `apple/1.png`. A measurement that takes longer than a few seconds
    continues in the background: the response has status 202 and the URL of the result in `Location`.
    """
    chosen = await services.pool.get(model, version, patient=True)
    content_type = media_type(request)
    if content_type == "multipart/form-data":
        upload = (await read_form(request, max_files=1, max_fields=0)).get("file")
        if not isinstance(upload, UploadFile):
            raise BadRequest("the form has no field 'file' with a zip: curl -F file=@photos.zip")
        job = await _measured_on_zip(services, chosen, upload.file)
    elif content_type or request.headers.get("content-length", "0") != "0":
        raise UnsupportedMediaType(
            f"the content type {quote(content_type or '(none)')} is not supported; send a zip as multipart/form-data: "
            "curl -F file=@photos.zip"
        )
    else:
        job = await services.evaluations.start(
            chosen, lambda _: read_split(services.settings, split, limit, chosen.card.classes)
        )
    if job.state == "running":
        response.status_code = HTTPStatus.ACCEPTED
        response.headers["Location"] = f"/evaluate/{job.id}"
    return job


async def _measured_on_zip(services: Services, model: Model, file: BinaryIO) -> EvaluationJob:
    def read(stop_event: Event) -> LabeledImages:
        with file:
            return read_zip(services.settings, file, model.card.classes, stop_event)

    try:
        return await services.evaluations.start(model, read)
    except Exception:
        file.close()  # `read` does not run if too many evaluations are running
        raise


@router.get("/{evaluation_id}", summary="A measurement that was started earlier")
async def evaluation(evaluation_id: str, services: ServicesDependency) -> EvaluationJob:
    return await services.evaluations.get(evaluation_id)
