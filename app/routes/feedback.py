"""Serve /feedback: corrections of predictions, for later training."""

import time
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi import Path as Parameter
from pydantic import BaseModel, Field

from app.dependencies import ServicesDependency
from app.exceptions import BadRequest, Forbidden
from app.feedback import Answer, Correction
from app.inference import explanation
from app.middleware.access import OperatorOnly, authorize_prediction, client_of
from app.routes.images import ModelQuery, describe_body, read_images
from app.routes.parameters import StrictRoute, parse_parameters
from app.routes.responses import json_response
from app.routes.scoring import ImageScorer, decoding_charge

router = APIRouter(prefix="/feedback", tags=["feedback"], route_class=StrictRoute)

CorrectionId = Annotated[str, Parameter(description="Id of a correction.")]
CorrectionLimit = Annotated[int, Query(ge=1, le=1000, description="Largest number of corrections.")]


class KeptCorrections(BaseModel, use_attribute_docstrings=True):
    """The corrections that are left."""

    kept: int
    """Number of corrections."""


class FeedbackQuery(ModelQuery, frozen=True):
    """The parameters of a correction, in the query or as text fields of the form."""

    label: str | None = Field(default=None, alias="class", description="Label of the right class; required.")


@router.post(
    "",
    status_code=HTTPStatus.CREATED,
    openapi_extra=describe_body(FeedbackQuery, max_images=1),
    summary="Correct a prediction",
)
async def send_feedback(
    request: Request, services: ServicesDependency, query: Annotated[FeedbackQuery, Query()]
) -> Correction:
    """Keep an image and its right class, for later training. It is off unless CIFAR100_FEEDBACK is true.

    The service computes the answer of the model again, and keeps it with the 32x32 pixels that the network sees. It
    does not keep the photo, its metadata or the address of the client. A second correction of the same pixels replaces
    the first.
    """
    settings = services.settings
    if not settings.feedback:
        raise Forbidden("feedback is off; start the service with CIFAR100_FEEDBACK=true")
    authorize_prediction(request)
    await services.feedback.threads.read(services.feedback.require_room)
    async with read_images(request, settings.max_image_bytes, max_images=1) as (files, fields):
        if fields:
            query = parse_parameters(FeedbackQuery, request.scope["query_string"], fields)
        if query.label is None:
            raise BadRequest("the parameter class is missing; give the label of the right class, such as class=apple")
        deadline = time.monotonic() + settings.deadline_s
        charge = decoding_charge(request, services)
        images = await services.decoders.decode(files, client_of(request), deadline, charge)
    scored = await ImageScorer(request, services, query.model, query.version, deadline).score(images.pixels)
    card, (order, probabilities) = scored.model.card, scored.scores.ranking
    label = card.classes[explanation.find_class(query.label, card)]
    answer = Answer(
        model=card.name,
        version=card.version,
        predicted=card.classes[order[0, 0]],
        probability=float(probabilities[0, 0]),
    )
    return await services.feedback.threads.run(services.feedback.add, images.pixels[0], label, answer)


@router.get("", response_model=list[Correction], dependencies=[OperatorOnly], summary="The latest corrections")
async def corrections(services: ServicesDependency, limit: CorrectionLimit = 100) -> Response:
    """List the latest corrections, newest first."""
    feedback = services.feedback
    return await feedback.threads.read(lambda: json_response(feedback.newest(limit)))


@router.delete("/{correction_id}", dependencies=[OperatorOnly], summary="Delete a correction")
async def delete_correction(correction_id: CorrectionId, services: ServicesDependency) -> KeptCorrections:
    """Delete a correction and its image."""
    return KeptCorrections(kept=await services.feedback.threads.run(services.feedback.delete, correction_id))
