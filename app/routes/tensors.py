"""Read and write the tensors of the Open Inference Protocol: JSON, and its extension for binary tensor data.

body --parse_request--> InferenceRequest, binary data --read_images--> images
output tensors --encode_response--> body

With the extension a body is a JSON object followed by the binary data of its tensors, in the order of the JSON. A
header names the length of the JSON. Numbers are little-endian. An element of type BYTES has its length, 4 bytes, before
it. In JSON, an element of type BYTES is text: base64 for an image, and a label is plain text.
"""

import base64
import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
from fastapi.exceptions import RequestValidationError
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError
from pydantic_core import from_json, to_json

from app.exceptions import BadRequest, MalformedBody, TooLarge
from app.inference.batching import Images
from app.inference.decoding import File
from app.machine import MIB
from training.text import quote

JSON_LENGTH = "Inference-Header-Content-Length"
"""Header that names the length of the JSON in front of binary tensor data."""

MAX_JSON_BYTES = MIB
IMAGE_SHAPE = [3, 32, 32]
_MAX_FAULTS = 100
_KINDS = {int: "integers", str: "base64 texts"}
_LENGTH = struct.Struct("<I")

InputName = Literal["pixels", "image"]
OutputName = Literal["logits", "probabilities", "labels"]


class InputParameters(BaseModel, extra="forbid"):
    """The parameters of an input tensor."""

    binary_data_size: int | None = Field(default=None, ge=0, description="Bytes of the tensor after the JSON.")


class InputTensor(BaseModel, extra="forbid"):
    """An input: `pixels`, UINT8 [N, 3, 32, 32], or `image`, BYTES [N] or [N, 1] with one image file per element."""

    name: InputName = Field(description="Name of the input.")
    shape: list[int] = Field(max_length=4, fail_fast=True, description="Dimensions.")
    datatype: str = Field(description="UINT8 for `pixels`, BYTES for `image`.")
    parameters: InputParameters = Field(default=InputParameters(), description="Parameters of the input.")
    data: Any = Field(default=None, description="Integers, flat or nested, for `pixels`; base64 text for `image`.")


class OutputParameters(BaseModel, extra="forbid"):
    """The parameters of an output."""

    binary_data: bool | None = Field(default=None, description="Default: `binary_data_output` of the request.")


class RequestedOutput(BaseModel, extra="forbid"):
    """An output to return."""

    name: OutputName = Field(description="Name of the output.")
    parameters: OutputParameters = Field(default=OutputParameters(), description="Parameters of the output.")


class RequestParameters(BaseModel, extra="forbid"):
    """The parameters of a request."""

    binary_data_output: bool = Field(default=False, description="Return all outputs as binary data.")
    timeout: int | None = Field(default=None, gt=0, description="Microseconds that the computation may wait to start.")


class InferenceRequest(BaseModel, extra="forbid"):
    """A request of the Open Inference Protocol with exactly one input."""

    id: str | None = Field(default=None, description="Returned with the response.")
    model_name: str | None = Field(default=None, description="Name of the model, which the URL has as well.")
    parameters: RequestParameters = Field(default=RequestParameters(), description="Parameters of the request.")
    inputs: list[InputTensor] = Field(min_length=1, max_length=1, fail_fast=True, description="The input.")
    outputs: list[RequestedOutput] = Field(
        default=[], max_length=3, fail_fast=True, description="Default: all outputs."
    )


@dataclass(frozen=True)
class OutputTensor:
    """A computed output: float32 [N, classes], or N labels."""

    name: OutputName
    values: NDArray[np.float32] | list[str]
    is_binary: bool

    @property
    def description(self) -> dict[str, Any]:
        """Name, datatype and shape."""
        if isinstance(self.values, list):
            return {"name": self.name, "datatype": "BYTES", "shape": [len(self.values)]}
        return {"name": self.name, "datatype": "FP32", "shape": list(self.values.shape)}


def parse_request(body: bytes | bytearray, json_length: str | None) -> tuple[InferenceRequest, memoryview]:
    """Parse the JSON of a body.

    Args:
        body: The whole body.
        json_length: Value of the header `JSON_LENGTH`. None if the body is JSON only.

    Returns:
        The request, and the binary data after its JSON.

    Raises:
        MalformedBody: The header is not a number of bytes of the body.
        TooLarge: The JSON has more than `MAX_JSON_BYTES`.
        RequestValidationError: The JSON is invalid, or is not a request with one input.
    """
    length = len(body)
    if json_length is not None:
        if not json_length.isdecimal() or int(json_length) > length:
            raise MalformedBody(
                f"{JSON_LENGTH} is {quote(json_length)}; give the length of the JSON in a body of {length:,} bytes"
            )
        length = int(json_length)
    if length > MAX_JSON_BYTES:  # the event loop parses it
        raise TooLarge(f"the JSON has more than {MAX_JSON_BYTES:,} bytes; send large tensors as binary data after it")
    view = memoryview(body)
    try:
        # Errors of pydantic copy their input if it is JSON text, and would take seconds.
        request = InferenceRequest.model_validate(from_json(bytes(view[:length])))
    except ValidationError as error:
        if error.error_count() > _MAX_FAULTS:
            raise BadRequest(f"the JSON has {error.error_count():,} faults; it is not an inference request") from None
        faults = [{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors(include_url=False)]
        raise RequestValidationError(faults) from None
    except ValueError as error:
        raise BadRequest(f"the body is not JSON, or {JSON_LENGTH} is wrong: {error}") from None
    return request, view[length:]


def read_images(tensor: InputTensor, binary: memoryview, max_images: int) -> Images | list[File]:
    """Return the images of an input tensor: uint8 [N, 3, 32, 32] for `pixels`, and N files for `image`.

    Args:
        tensor: The input.
        binary: The binary data after the JSON.
        max_images: Largest N.

    Raises:
        MalformedBody: The binary data do not have the size that the tensor declares, or there are too many images.
        BadRequest: The datatype, the shape or an element is invalid.
    """
    is_pixels = tensor.name == "pixels"
    datatype, shapes = ("UINT8", [IMAGE_SHAPE]) if is_pixels else ("BYTES", [[], [1]])
    if tensor.datatype != datatype:
        raise BadRequest(f"the datatype of {tensor.name} is {quote(tensor.datatype)}; it must be {datatype}")
    if not tensor.shape or tensor.shape[0] < 1 or tensor.shape[1:] not in shapes:
        needed = "[N, 3, 32, 32]" if is_pixels else "[N] or [N, 1]"
        raise BadRequest(
            f"the shape of {tensor.name} is {quote(str(tensor.shape))}; it must be {needed} with N above 0"
        )
    count = tensor.shape[0]
    if count > max_images:
        raise MalformedBody(f"{tensor.name} has {count} images; the limit is {max_images} per request")
    declared = tensor.parameters.binary_data_size
    if (declared is None) is (tensor.data is None):
        raise BadRequest(f"{tensor.name} needs either data or the parameter binary_data_size")
    if len(binary) != (declared or 0):
        raise MalformedBody(f"{len(binary):,} bytes follow the JSON, but {tensor.name} declares {declared or 0:,}")
    if is_pixels:
        return _read_pixels(tensor, binary, count)
    contents = _split_bytes(binary, count) if tensor.data is None else _decode_base64(_flatten(tensor, str), count)
    return [(f"image[{number}]", io.BytesIO(content)) for number, content in enumerate(contents)]


def _read_pixels(tensor: InputTensor, binary: memoryview, count: int) -> Images:
    if tensor.data is None:
        values = np.frombuffer(binary, np.uint8)
    else:
        try:
            values = np.array(_flatten(tensor, int), np.uint8)
        except OverflowError:
            raise BadRequest("an element of pixels is not in 0 to 255") from None
    if len(values) != count * 3 * 32 * 32:
        raise BadRequest(f"pixels has {len(values):,} elements; its shape needs {count * 3 * 32 * 32:,}")
    return values.reshape(count, 3, 32, 32)


def _flatten(tensor: InputTensor, kind: type) -> list[Any]:
    """Return the elements of JSON data, which are flat or nested.

    Raises:
        BadRequest: An element is not of the type `kind`.
    """
    data = tensor.data
    if isinstance(data, list):
        while data and isinstance(data[0], list) and all(isinstance(each, list) for each in data):
            data = list(chain.from_iterable(data))
        if set(map(type, data)) <= {kind}:
            return data
    raise BadRequest(f"the data of {tensor.name} must be a list of {_KINDS[kind]}, flat or nested as its shape")


def _split_bytes(binary: memoryview, count: int) -> Iterator[bytes]:
    """Split binary data into elements of type BYTES."""
    place = 0
    for number in range(count):
        start = place + _LENGTH.size
        if start <= len(binary):
            place = start + _LENGTH.unpack_from(binary, place)[0]
        if not start <= place <= len(binary):
            raise MalformedBody(f"the binary data end within element {number} of {count}; each begins with its length")
        yield bytes(binary[start:place])
    if place != len(binary):
        raise MalformedBody(f"{len(binary) - place:,} bytes follow the last element of the binary data")


def _decode_base64(texts: list[Any], count: int) -> Iterator[bytes]:
    if len(texts) != count:
        raise BadRequest(f"image has {len(texts)} elements; its shape needs {count}")
    for number, text in enumerate(texts):
        try:
            yield base64.b64decode(text, validate=True)
        except ValueError:
            raise BadRequest(
                f"element {number} of image is not base64; send base64 text in JSON, or the file as binary data"
            ) from None


def encode_response(response: dict[str, Any], outputs: list[OutputTensor]) -> tuple[bytes, int | None]:
    """Encode a response.

    Args:
        response: Members of the response except `outputs`.
        outputs: The outputs in the order of the response.

    Returns:
        The body, and the length of its JSON if binary data follow it.
    """
    described, binary = [], []
    for output in outputs:
        if output.is_binary:
            binary.append(_to_bytes(output.values))
            described.append({**output.description, "parameters": {"binary_data_size": len(binary[-1])}})
        else:
            data = output.values if isinstance(output.values, list) else output.values.ravel().tolist()
            described.append({**output.description, "data": data})
    content = to_json({**response, "outputs": described})
    return b"".join([content, *binary]), len(content) if binary else None


def _to_bytes(values: NDArray[np.float32] | list[str]) -> bytes:
    if not isinstance(values, list):
        return values.astype("<f4", copy=False).tobytes()
    return b"".join(_LENGTH.pack(len(label)) + label for label in map(str.encode, values))
