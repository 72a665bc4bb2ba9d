"""/evaluate: how accurate the live models are, as recorded and as measured now."""

import asyncio
from functools import partial
from http import HTTPStatus
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel
from starlette.datastructures import UploadFile

from app.access import ForOperators
from app.errors import BadRequest
from app.evaluations import EvaluationJob, read_split, read_zip
from app.services import FromApp
from training.store import Evaluation

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


class Recorded(BaseModel):
    """What a live model's card says."""

    model: str
    version: int
    recipe: str
    test: Evaluation


@router.get("", summary="Recorded accuracy of every live model")
async def recorded(services: FromApp) -> list[Recorded]:
    """On the whole test set, measured once when the model was published."""
    return [
        Recorded(model=name, version=model.card.version, recipe=model.card.recipe["name"], test=model.card.test)
        for name, model in sorted(services.pool.live().items())
    ]


@router.post(
    "",
    dependencies=[ForOperators],
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
    services: FromApp,
    model: Annotated[str | None, Query(description="By default the most accurate live model.")] = None,
    version: Annotated[int | None, Query(ge=1, description="By default the live one.")] = None,
    split: Annotated[Literal["test", "train"], Query(description="Of the data set; ignored for a zip.")] = "test",
    limit: Annotated[int | None, Query(ge=1, description="Measure on this many images only.")] = None,
) -> EvaluationJob:
    """On the data set, or on a zip of images in folders named by class, sent as the multipart field `file`.

    What takes longer than a few seconds goes on in the background: 202 and where to look.
    """
    chosen = await services.pool.get(model, version)
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        async with request.form(max_files=1, max_fields=0) as form:
            upload = form.get("file")
            if not isinstance(upload, UploadFile):
                raise BadRequest("the form has no field 'file' with a zip: curl -F file=@photos.zip")
            # Read here, as the file is gone with the form while the measuring may go on.
            labelled = await asyncio.to_thread(read_zip, services.settings, upload.file, chosen.card.classes)
        job = await services.evaluations.start(chosen, lambda: labelled)
    else:
        job = await services.evaluations.start(
            chosen, partial(read_split, services.settings, split, limit, chosen.card.classes)
        )
    if job.state == "running":
        response.status_code = HTTPStatus.ACCEPTED
        response.headers["Location"] = f"/evaluate/{job.id}"
    return job


@router.get("/{evaluation_id}", summary="A measurement that was started earlier")
def evaluation(evaluation_id: str, services: FromApp) -> EvaluationJob:  # in a thread, as it may read a file
    return services.evaluations.get(evaluation_id)
