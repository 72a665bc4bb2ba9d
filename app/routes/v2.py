"""Serve /v2, the Open Inference Protocol of KServe and Triton, so that their clients can predict.

A request passes the same access check, limits, queue and statistics as one to /predict. Errors have the member `error`,
which the protocol asks for.
"""

import gzip
import time
import zlib
from http import HTTPStatus
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray
from pydantic import BaseModel

from app.dependencies import Services, ServicesDependency, services_of
from app.errors import OPEN_INFERENCE_RESPONSES
from app.exceptions import BadRequest
from app.inference.pool import Model
from app.inference.statistics import Duration, ModelStatistics
from app.middleware.access import authorize_prediction
from app.routes import tensors
from app.routes.disconnects import run_until_disconnect
from app.routes.models import ModelName, VersionNumber, read_card
from app.routes.parameters import StrictRoute
from app.routes.scoring import ImageScorer, ScoredImages
from app.routes.tensors import InferenceRequest, OutputName, OutputTensor
from training.store import ModelCard
from training.text import quote

router = APIRouter(prefix="/v2", tags=["v2"], route_class=StrictRoute, responses=OPEN_INFERENCE_RESPONSES)

_JSON, _BINARY = "application/json", "application/octet-stream"
_ALL_OUTPUTS: tuple[OutputName, ...] = ("logits", "probabilities", "labels")
_MIN_COMPRESSED = 1024  # bytes; a smaller response fits into one packet
_FAST = 1  # level of compression
_NOT_MEASURED = Duration()


class ServerMetadata(BaseModel, use_attribute_docstrings=True):
    """The service and the extensions of the protocol that it supports."""

    name: str
    """Name of the service."""
    version: str
    """Version of the service."""
    extensions: list[str]
    """Supported extensions of the protocol."""


class ServerLive(BaseModel, use_attribute_docstrings=True):
    """The result of the liveness probe."""

    live: bool
    """True."""


class ServerReady(BaseModel, use_attribute_docstrings=True):
    """The result of the readiness probe. The status code has the same meaning."""

    ready: bool
    """Result of the probe."""


class ModelReady(ServerReady, use_attribute_docstrings=True):
    """The readiness of a model or version."""

    name: str
    """Name of the model."""


class TensorMetadata(BaseModel, use_attribute_docstrings=True):
    """A tensor. A dimension of -1 is the number of images."""

    name: str
    """Name of the tensor."""
    datatype: str
    """UINT8, FP32 or BYTES."""
    shape: list[int]
    """Dimensions."""


class ModelMetadata(BaseModel, use_attribute_docstrings=True):
    """A model with its versions, inputs and outputs. A request has exactly one of the inputs."""

    name: str
    """Name of the model."""
    versions: list[str]
    """Numbers of its versions."""
    platform: str
    """Format of the exported model."""
    inputs: list[TensorMetadata]
    """Inputs, of which a request has one."""
    outputs: list[TensorMetadata]
    """Outputs."""


class BatchStatistics(BaseModel, use_attribute_docstrings=True):
    """The computed batches of one size."""

    batch_size: int
    """Number of images."""
    compute_input: Duration
    """Decoding in the batch."""
    compute_infer: Duration
    """Computing the network and its outputs."""
    compute_output: Duration
    """Not measured; part of `compute_infer`."""


class VersionStatistics(BaseModel, use_attribute_docstrings=True):
    """The requests and batches of a version in memory, as counted by this process since it loaded the version."""

    name: str
    """Name of the model."""
    version: str
    """Number of the version."""
    last_inference: int
    """Time of the last successful request in milliseconds since 1970; 0 if there was none."""
    inference_count: int
    """Number of images of successful requests."""
    execution_count: int
    """Number of batches."""
    inference_stats: dict[str, Duration]
    """Requests and their times by outcome and by part of the work."""
    batch_stats: list[BatchStatistics]
    """Batches by size."""


class Statistics(BaseModel, use_attribute_docstrings=True):
    """The statistics of the versions in memory."""

    model_stats: list[VersionStatistics]
    """Statistics of each version."""


@router.get("", summary="The service and its extensions")
async def server_metadata(request: Request) -> ServerMetadata:
    """Return the name and version of the service, and the extensions of the protocol."""
    return ServerMetadata(name="cifar100", version=request.app.version, extensions=["binary_tensor_data", "statistics"])


@router.get("/health/live", summary="Liveness")
async def server_live() -> ServerLive:
    """Return 200 while the event loop runs."""
    return ServerLive(live=True)


@router.get("/health/ready", responses={503: {"model": ServerReady}}, summary="Readiness")
async def server_ready(services: ServicesDependency, response: Response) -> ServerReady:
    """Return 200 under the same condition as GET /health/ready, else 503."""
    if not services.ready:
        response.status_code = HTTPStatus.SERVICE_UNAVAILABLE
    return ServerReady(ready=services.ready)


@router.get("/models/stats", summary="Statistics of all versions in memory")
async def all_statistics(services: ServicesDependency) -> Statistics:
    """Return the statistics of all versions in memory."""
    return _statistics(services.pool.loaded())


@router.get("/models/{name}", summary="Inputs and outputs of a model")
async def model_metadata(name: ModelName, services: ServicesDependency) -> ModelMetadata:
    """Return the versions, inputs and outputs of a model."""
    return await _metadata(services, name, None)


@router.get("/models/{name}/versions/{version:int}", summary="Inputs and outputs of a version")
async def version_metadata(name: ModelName, version: VersionNumber, services: ServicesDependency) -> ModelMetadata:
    """Return the inputs and outputs of a version."""
    return await _metadata(services, name, version)


@router.get("/models/{name}/ready", summary="Readiness of a model")
async def model_ready(name: ModelName, services: ServicesDependency) -> ModelReady:
    """Return 200 if the model has a live version."""
    await _find_card(services, name, None)
    return ModelReady(name=name, ready=True)


@router.get("/models/{name}/versions/{version:int}/ready", summary="Readiness of a version")
async def version_ready(name: ModelName, version: VersionNumber, services: ServicesDependency) -> ModelReady:
    """Return 200 if the version exists. A version that is not live is loaded with its first request."""
    await _find_card(services, name, version)
    return ModelReady(name=name, ready=True)


@router.get("/models/{name}/stats", summary="Statistics of a model")
async def model_statistics(name: ModelName, services: ServicesDependency) -> Statistics:
    """Return the statistics of the versions of a model that are in memory."""
    await _find_card(services, name, None)
    return _statistics([model for model in services.pool.loaded() if model.card.name == name])


@router.get("/models/{name}/versions/{version:int}/stats", summary="Statistics of a version")
async def version_statistics(name: ModelName, version: VersionNumber, services: ServicesDependency) -> Statistics:
    """Return the statistics of a version. The list is empty if the version is not in memory."""
    await _find_card(services, name, version)
    model = services.pool.peek(name, version)
    return _statistics([model] if model else [])


_DESCRIPTION: dict[str, Any] = {
    "security": [{}, {"HTTPBearer": []}],  # the API key is required if one is configured
    "parameters": [
        {
            "name": tensors.JSON_LENGTH,
            "in": "header",
            "description": "Length of the JSON in bytes, if binary tensor data follow it.",
            "schema": {"type": "integer", "minimum": 0},
            "example": 180,
        }
    ],
    "requestBody": {
        "required": True,
        "content": {
            _JSON: {"schema": InferenceRequest.model_json_schema()},
            _BINARY: {"schema": {"type": "string", "format": "binary"}},
        },
    },
}
_INFERENCE: dict[str, Any] = {
    "openapi_extra": _DESCRIPTION,
    "response_class": Response,
    "responses": {
        200: {
            "description": "The outputs as JSON, or JSON followed by binary tensor data.",
            "content": {
                _JSON: {"schema": {"type": "object"}},
                _BINARY: {"schema": {"type": "string", "format": "binary"}},
            },
        }
    },
}


@router.post("/models/{name}/infer", summary="Predict with the live version", **_INFERENCE)
async def infer(name: ModelName, request: Request) -> Response:
    """Compute logits, probabilities and labels of `pixels` or of `image`."""
    return await run_until_disconnect(request, _infer(request, name, None))


@router.post("/models/{name}/versions/{version:int}/infer", summary="Predict with a version", **_INFERENCE)
async def infer_version(name: ModelName, version: VersionNumber, request: Request) -> Response:
    """Compute logits, probabilities and labels with a version."""
    return await run_until_disconnect(request, _infer(request, name, version))


async def _infer(request: Request, name: str, version: int | None) -> Response:
    authorize_prediction(request)
    services, settings = services_of(request), services_of(request).settings
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
    arrived = time.monotonic()
    wanted, binary = tensors.parse_request(body, request.headers.get(tensors.JSON_LENGTH))
    if wanted.model_name not in (None, name):
        raise BadRequest(f"model_name is {quote(str(wanted.model_name))}, but the URL names the model {quote(name)}")
    images = tensors.read_images(wanted.inputs[0], binary, min(settings.max_images, settings.max_batch))
    wait_s = settings.deadline_s
    if wanted.parameters.timeout is not None:
        wait_s = min(wait_s, wanted.parameters.timeout / 1e6)
    scored = await ImageScorer(request, services, name, version, arrived + wait_s).score(images)
    card = scored.model.card
    response = {"model_name": card.name, "model_version": str(card.version)}
    if wanted.id is not None:
        response["id"] = wanted.id
    content, json_length = tensors.encode_response(response, _outputs(wanted, scored))
    headers = {} if json_length is None else {tensors.JSON_LENGTH: str(json_length)}
    content, coding = _compress(content, request.headers.get("accept-encoding", ""))
    headers |= {"Content-Encoding": coding} if coding else {}
    return Response(
        content, headers=headers | {"Vary": "Accept-Encoding"}, media_type=_JSON if json_length is None else _BINARY
    )


def _outputs(wanted: InferenceRequest, scored: ScoredImages) -> list[OutputTensor]:
    """Return the requested outputs in the order of the request."""
    scores, classes = scored.scores, scored.model.card.classes

    def compute(name: OutputName) -> NDArray[np.float32] | list[str]:
        match name:
            case "logits":
                return scores.logits
            case "probabilities":
                return scores.probabilities.astype(np.float32)
            case "labels":
                return [classes[best] for best in scores.ranking[0][:, 0]]

    by_default = wanted.parameters.binary_data_output
    if not wanted.outputs:
        return [OutputTensor(name, compute(name), by_default) for name in _ALL_OUTPUTS]
    return [
        OutputTensor(
            output.name,
            compute(output.name),
            by_default if output.parameters.binary_data is None else output.parameters.binary_data,
        )
        for output in wanted.outputs
    ]


def _compress(content: bytes, accepted: str) -> tuple[bytes, str | None]:
    """Compress a response with the first supported coding that the client accepts. Return it and the coding."""
    if len(content) < _MIN_COMPRESSED:
        return content, None
    for entry in accepted.lower().split(","):
        coding, _, quality = entry.replace(" ", "").partition(";q=")
        if quality.strip("0.") == "" and quality:
            continue
        if coding == "gzip":
            return gzip.compress(content, _FAST, mtime=0), coding
        if coding == "deflate":
            return zlib.compress(content, _FAST), coding
    return content, None


async def _find_card(services: Services, name: str, version: int | None) -> ModelCard:
    """Return the card of a version, or of the live version.

    Raises:
        NotFound: The model has no such version, or none is live.
        Unavailable: The live version cannot be served, or the store does not answer.
    """
    if model := services.pool.peek(name, version):
        return model.card
    if version is None:
        return (await services.pool.get(name)).card  # raises the reason why the model is not live
    return await services.store_threads.read(read_card, services, name, version)


async def _metadata(services: Services, name: str, version: int | None) -> ModelMetadata:
    card = await _find_card(services, name, version)
    versions = await services.store_threads.read(services.store.versions, name)
    shape = [-1, len(card.classes)]
    return ModelMetadata(
        name=name,
        versions=[str(each) for each in versions],
        platform="pytorch_torchscript",
        inputs=[
            TensorMetadata(name="pixels", datatype="UINT8", shape=[-1, *tensors.IMAGE_SHAPE]),
            TensorMetadata(name="image", datatype="BYTES", shape=[-1]),
        ],
        outputs=[
            TensorMetadata(name="logits", datatype="FP32", shape=shape),
            TensorMetadata(name="probabilities", datatype="FP32", shape=shape),
            TensorMetadata(name="labels", datatype="BYTES", shape=[-1]),
        ],
    )


def _statistics(models: list[Model]) -> Statistics:
    return Statistics(model_stats=[_version_statistics(model.card, model.statistics) for model in models])


def _version_statistics(card: ModelCard, counts: ModelStatistics) -> VersionStatistics:
    return VersionStatistics(
        name=card.name,
        version=str(card.version),
        last_inference=counts.last_inference_ms,
        inference_count=counts.images,
        execution_count=counts.batches,
        inference_stats={
            "success": counts.success,
            "fail": counts.fail,
            "queue": counts.queue,
            "compute_input": counts.compute_input,
            "compute_infer": counts.compute_infer,
            "compute_output": _NOT_MEASURED,  # part of compute_infer
            "cache_hit": _NOT_MEASURED,
            "cache_miss": _NOT_MEASURED,
        },
        batch_stats=[
            BatchStatistics(
                batch_size=size,
                compute_input=batches.compute_input,
                compute_infer=batches.compute_infer,
                compute_output=_NOT_MEASURED,
            )
            for size, batches in sorted(counts.by_size.copy().items())
        ],
    )
