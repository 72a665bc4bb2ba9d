"""A client of the service, synchronous and asynchronous. It imports only httpx and the standard library.

Copy this file into your project, or import it from the package:

    with Client("http://127.0.0.1:8000") as client:
        print(client.predict("photo.jpg").label)

`_Calls` has the logic of all calls without input and output: each of its methods is a generator that yields requests
and pauses, and receives responses. `Client` and `AsyncClient` send the requests and wait.
"""

import asyncio
import json
import os
import random
import struct
import time
import uuid
import zlib
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from email.utils import parsedate_to_datetime
from functools import partial
from io import BytesIO
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar, cast, overload

import httpx

URL = "http://127.0.0.1:8000"
FINISHED = ("succeeded", "failed", "cancelled")
"""States of a job that do not change any more."""

_MAX_IMAGES = 32  # per request, the default limit of the service
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0
_JITTER = 0.5  # largest additional part of a pause, so that clients that were refused together come back apart
_CHECK_TIMEOUT_S = 660.0  # the service takes at most 600 s to check an uploaded version
_STREAM_TIMEOUT_S = 45.0  # the service sends a comment after 15 s without an event
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
_PNG_COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # by number of channels

Value = TypeVar("Value")


class PillowImage(Protocol):
    """An image of Pillow."""

    @property
    def mode(self) -> str:
        """Type of the pixels, such as RGB."""

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:  # noqa: A002  the name is Pillow's
        """Write the image to a file."""


class Array(Protocol):
    """A uint8 array of NumPy: [H, W], or [H, W, channels] with 1 to 4 channels."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis."""

    @property
    def dtype(self) -> Any:
        """Type of the elements."""

    def tobytes(self) -> bytes:
        """Return the elements in row-major order."""


Image = str | os.PathLike[str] | bytes | bytearray | PillowImage | Array
"""One image: a path, the bytes of an image file, an image of Pillow, or an array of NumPy."""

Archive = str | os.PathLike[str] | bytes
"""A zip: its path or its bytes."""


class ServiceError(Exception):
    """The service refused a call, or cannot be reached.

    Attributes:
        status: HTTP status. None if there was no response.
        type: Type of the problem (RFC 9457).
        title: Short name of the problem.
        detail: The problem, and its remedy.
        errors: Invalid parameters, each with `field` and `message`.
        request_id: Id of the request in the log of the service.
    """

    def __init__(
        self,
        status: int | None,
        detail: str,
        type: str = "about:blank",  # noqa: A002  the name of RFC 9457
        title: str = "",
        errors: Sequence[dict[str, str]] = (),
        request_id: str | None = None,
    ):
        super().__init__(detail if status is None else f"{status} {title}: {detail}")
        self.status = status
        self.type = type
        self.title = title
        self.detail = detail
        self.errors = tuple(errors)
        self.request_id = request_id


@dataclass(frozen=True, slots=True)
class PredictedClass:
    """One class and its calibrated probability."""

    class_id: int
    label: str
    superclass: str
    probability: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """The most probable classes of one image, best first, and the model version that found them."""

    classes: tuple[PredictedClass, ...]
    model: str
    version: int
    file: str | None = None
    familiar: bool | None = None
    """False if the image is probably none of the classes; None if the card of the model has no threshold."""
    familiarity: float | None = None
    """Score of the image, which the card of the model describes."""
    warnings: tuple[str, ...] = ()
    """Missing parts of a damaged image that was classified nevertheless."""

    @property
    def label(self) -> str:
        """Label of the most probable class."""
        return self.classes[0].label

    @property
    def probability(self) -> float:
        """Probability of the most probable class."""
        return self.classes[0].probability


@dataclass(frozen=True, slots=True)
class Correction:
    """A correction that the service keeps: the right class `label`, and the answer of the model."""

    id: str
    label: str
    answer: dict[str, Any]
    """The model, its version, and the class that it predicted with its probability."""


@dataclass(frozen=True)
class Explanation:
    """A map of how much each region of an image speaks for a class."""

    model: str
    version: int
    class_id: int
    label: str
    superclass: str
    probability: float
    map: tuple[tuple[float, ...], ...]
    """8 rows of 8 cells of the square that the network sees, from the top left. A cell has the fall of the logarithm of
    the probability in nats if it is hidden; it is negative if the probability rises."""
    file: str | None = None
    warnings: tuple[str, ...] = ()
    """Missing parts of a damaged image that was explained nevertheless."""


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """A model and its versions. `error` is the reason why its live version is not served."""

    name: str
    live: int | None
    versions: tuple[int, ...]
    error: str | None = None


@dataclass(frozen=True, slots=True)
class UploadedVersion:
    """A version that was uploaded. `live` says whether it is live now."""

    name: str
    version: int
    live: bool
    check: dict[str, Any] | None = None
    """The engine that computed the version and the accuracy on some test images. None if the service had it already."""


@dataclass(frozen=True, slots=True)
class Measures:
    """Measures of an evaluation. Rates are in 0 to 1, and `loss` is in nats."""

    images: int
    top1: float
    top5: float
    loss: float
    ece: float
    classes: tuple[str, ...] = ()
    per_class: tuple[float | None, ...] = ()
    images_per_class: tuple[int, ...] = ()
    confusion: tuple[tuple[int, ...], ...] | None = None
    """Number of images by true class (row) and predicted class (column)."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An evaluation of a model version. `result` is None until it has succeeded."""

    id: str
    state: str
    model: str
    version: int
    engine: str
    split: str | None = None
    done: int = 0
    result: Measures | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """A training job as the service described it last."""

    id: str
    state: str
    request: dict[str, Any]
    phase: str | None = None
    """Work that the job does now; None unless it is running."""
    created: str | None = None
    """Time of the request in ISO 8601, as `started` and `finished`."""
    started: str | None = None
    finished: str | None = None
    error: str | None = None
    published: dict[str, Any] | None = None
    """The published version: its name, number, test accuracy, and whether it went live."""
    epochs: int | None = None
    progress: dict[str, Any] | None = None
    history: tuple[dict[str, Any], ...] = ()

    @property
    def is_finished(self) -> bool:
        """True if the state does not change any more."""
        return self.state in FINISHED


@dataclass(frozen=True, slots=True)
class Event:
    """An event of a job. The last one is `end`, with the job as its data and without a number."""

    name: str
    number: int | None
    data: dict[str, Any]


def encode_image(image: Image) -> tuple[str | None, bytes]:
    """Return the file name and the bytes of an image. Images of Pillow and arrays are encoded without loss.

    Raises:
        TypeError: The object is no image.
        ValueError: An array has an unsupported type or shape.
        OSError: The file cannot be read.
    """
    if isinstance(image, bytes | bytearray):
        return None, bytes(image)
    if isinstance(image, str | os.PathLike):
        with open(image, "rb") as file:  # noqa: PTH123  pathlib would be one more import
            return os.path.basename(os.fspath(image)), file.read()  # noqa: PTH119
    if hasattr(image, "save"):
        return None, _encode_pillow(cast("PillowImage", image))
    if hasattr(image, "tobytes") and hasattr(image, "shape"):
        return None, _encode_png(image)
    raise TypeError(f"{type(image).__name__} is no image; give a path, bytes, an image of Pillow or an array of NumPy")


def _encode_pillow(image: PillowImage) -> bytes:
    """Encode an image of Pillow with its orientation and color profile. TIFF has the modes that PNG lacks."""
    buffer = BytesIO()
    exif = image.getexif() if hasattr(image, "getexif") else None
    with_exif = {"exif": exif.tobytes()} if exif else {}
    image.save(buffer, "PNG" if image.mode in _PNG_MODES else "TIFF", **with_exif)
    return buffer.getvalue()


def _encode_png(array: Array) -> bytes:
    """Encode a uint8 array as a PNG, fast rather than small."""
    height, width, channels = (*array.shape, 1) if len(array.shape) == 2 else (*array.shape, 0, 0, 0)[:3]
    if str(array.dtype) != "uint8" or len(array.shape) not in (2, 3) or channels not in _PNG_COLOR_TYPES:
        raise ValueError(
            f"the array is {array.dtype} {list(array.shape)}; give uint8 [height, width, channels] with up to 4 "
            "channels, or [height, width]"
        )
    pixels, stride = array.tobytes(), width * channels
    rows = b"".join(b"\0" + pixels[at : at + stride] for at in range(0, height * stride, stride))
    header = struct.pack(">LLBBBBB", width, height, 8, _PNG_COLOR_TYPES[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data)) for kind, data in chunks
    )


def _parse(kind: type[Value], data: dict[str, Any], **more: Any) -> Value:
    """Create a result from JSON. Members that this client does not know are ignored, so it reads later releases."""
    values = {}
    for field in fields(cast(Any, kind)):
        if field.name in data:
            value = data[field.name]
            values[field.name] = tuple(value) if isinstance(value, list) else value
        elif field.name not in more and field.default is MISSING:
            raise ServiceError(None, f"the response is not one of this service: it lacks {field.name!r}")
    return kind(**values | more)


def _parse_predictions(answer: dict[str, Any], names: list[str | None]) -> list[Prediction | ServiceError]:
    return [
        ServiceError(**{member: each["error"][member] for member in ("status", "detail", "type", "title")})
        if "error" in each
        else _parse(
            Prediction,
            each,
            classes=tuple(_parse(PredictedClass, one) for one in each["classes"]),
            model=answer["model"],
            version=answer["version"],
            file=name,
        )
        for name, each in zip(names, answer["predictions"], strict=True)
    ]


def _parse_evaluation(answer: dict[str, Any]) -> Evaluation:
    result = answer.get("result")
    if result:
        rows = result.get("confusion")
        result = _parse(Measures, result, confusion=tuple(map(tuple, rows)) if rows else None)
    return _parse(Evaluation, answer, result=result)


def _error(response: httpx.Response) -> ServiceError:
    """Return the error of a response that has been read."""
    try:
        problem = response.json()
    except ValueError:
        problem = None
    if not isinstance(problem, dict):  # the response of a proxy
        problem = {"detail": response.text[:200] or "the response is empty"}
    return ServiceError(
        response.status_code,
        problem.get("detail", ""),
        problem.get("type", "about:blank"),
        problem.get("title", response.reason_phrase),
        problem.get("errors", ()),
        response.headers.get("x-request-id"),
    )


class _Retries:
    """The decision whether and when a call is sent again.

    Args:
        budget_s: Seconds after the first attempt in which further attempts may begin.
        is_repeatable: True if the service may receive the call twice. A call that is not repeatable is sent again only
            if the service has refused it or was not reached.
    """

    def __init__(self, budget_s: float, is_repeatable: bool):
        self._end = time.monotonic() + budget_s
        self._is_repeatable = is_repeatable
        self._pause_s = _FIRST_PAUSE_S

    def pause_after(self, outcome: httpx.Response | httpx.TransportError) -> float:
        """Return the seconds to wait before the next attempt.

        Raises:
            ServiceError: There is no further attempt.
        """
        if isinstance(outcome, httpx.Response):
            error, asked_s = _error(outcome), _retry_after_s(outcome)
            may_retry = outcome.status_code in (429, 503)
        else:
            error, asked_s = ServiceError(None, f"{type(outcome).__name__}: {outcome}"), 0.0
            error.__cause__ = outcome
            is_unsent = isinstance(outcome, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
            # A service that takes too long does not get the same work again.
            may_retry = is_unsent or (self._is_repeatable and not isinstance(outcome, httpx.TimeoutException))
        pause_s = max(asked_s, self._pause_s) * random.uniform(1, 1 + _JITTER)  # noqa: S311  no secret
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        if not may_retry or time.monotonic() + pause_s > self._end:
            raise error
        return pause_s


def _retry_after_s(response: httpx.Response) -> float:
    """Return the seconds of the header Retry-After, 0 without a valid one."""
    value = response.headers.get("retry-after", "")
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


@dataclass(frozen=True)
class _Request:
    """A request to send."""

    method: str
    path: str
    options: dict[str, Any]


_Step = _Request | float | Callable[[], Any]
"""A request to send, seconds to wait, or blocking work. Its outcome is a response or an error, None, or the result."""

_Steps = Generator[_Step, Any, Value]


class _Calls:
    """The calls of the service as generators of steps.

    Args:
        budget_s: Seconds for all attempts of one call.
    """

    def __init__(self, budget_s: float):
        self.budget_s = budget_s

    def send(self, method: str, path: str, is_repeatable: bool = True, **options: Any) -> _Steps[Any]:
        """Send a request until it succeeds. Return the JSON of the response. Raises the errors of `fetch`."""
        return (yield from self.fetch(method, path, is_repeatable, **options)).json()

    def fetch(self, method: str, path: str, is_repeatable: bool = True, **options: Any) -> _Steps[httpx.Response]:
        """Send a request until it succeeds. Return the response.

        Raises:
            ServiceError: The service refuses the request, or cannot be reached within the budget.
        """
        retries = _Retries(self.budget_s, is_repeatable)
        while True:
            outcome = yield _Request(method, path, options)
            if isinstance(outcome, httpx.Response) and outcome.is_success:
                return outcome
            yield retries.pause_after(outcome)

    def predict(
        self, images: Image | list[Image] | tuple[Image, ...], model: str | None, version: int | None, top_k: int
    ) -> _Steps[Prediction | list[Prediction]]:
        several = isinstance(images, list | tuple)
        params = _without_none(model=model, version=version, top_k=top_k)
        parts = self._predict_in_parts(images if isinstance(images, list | tuple) else [images], params)
        predictions = cast("list[Prediction]", (yield from parts))  # without `partial` there are no errors
        return predictions if several else predictions[0]

    def _predict_in_parts(
        self, images: Sequence[Image], params: dict[str, Any]
    ) -> _Steps[list[Prediction | ServiceError]]:
        """Send images in requests of at most `_MAX_IMAGES`."""
        predictions: list[Prediction | ServiceError] = []
        for start in range(0, len(images), _MAX_IMAGES):
            encoded = yield partial(_encode_images, images[start : start + _MAX_IMAGES])
            # A field without a file name is no file.
            files = [("file", (name or f"image {number}", each)) for number, (name, each) in enumerate(encoded, start)]
            answer = yield from self.send("POST", "/predict", params=params, files=files)
            predictions += _parse_predictions(answer, [name for name, _ in encoded])
        return predictions

    def predict_each(
        self, images: Sequence[Image], model: str | None, version: int | None, top_k: int
    ) -> _Steps[list[Prediction | ServiceError]]:
        params = _without_none(model=model, version=version, top_k=top_k, partial=True)
        return (yield from self._predict_in_parts(images, params))

    def send_feedback(self, image: Image, label: str, model: str | None, version: int | None) -> _Steps[Correction]:
        ((name, content),) = yield partial(_encode_images, [image])
        params = {"class": label, **_without_none(model=model, version=version)}
        answer = yield from self.send("POST", "/feedback", params=params, files={"file": (name or "image", content)})
        return _parse(Correction, answer)

    def explain(self, image: Image, model: str | None, version: int | None, label: str | None) -> _Steps[Explanation]:
        (encoded,) = yield partial(_encode_images, [image])
        name, content = encoded
        params = _without_none(model=model, version=version) | _without_none(**{"class": label})
        answer = yield from self.send("POST", "/explain", params=params, files={"file": (name or "image", content)})
        return _parse(Explanation, answer, map=tuple(map(tuple, answer["map"])), file=name)

    def evaluate(
        self, archive: Archive | None, model: str | None, version: int | None, split: str | None, limit: int | None
    ) -> _Steps[Evaluation]:
        options: dict[str, Any] = {"params": _without_none(model=model, version=version, split=split, limit=limit)}
        if archive is not None:
            content = yield lambda: encode_image(archive)[1]
            options["files"] = {"file": ("images.zip", content)}
        # Each request measures anew, so it is not sent twice.
        answer = yield from self.send("POST", "/evaluate", is_repeatable=False, **options)
        return _parse_evaluation(answer)

    def train(self, recipe: str, overrides: dict[str, Any], promote: str, key: str | None) -> _Steps[TrainingJob]:
        body = {"recipe": recipe, "overrides": overrides, "promote": promote}
        headers = {"Idempotency-Key": key or uuid.uuid4().hex}  # a repeated request returns the same job
        return _parse(TrainingJob, (yield from self.send("POST", "/train", json=body, headers=headers)))

    def job(self, job_id: str) -> _Steps[TrainingJob]:
        return _parse(TrainingJob, (yield from self.send("GET", f"/train/{job_id}")))

    def cancel(self, job_id: str) -> _Steps[TrainingJob]:
        return _parse(TrainingJob, (yield from self.send("DELETE", f"/train/{job_id}")))

    def jobs(self, limit: int) -> _Steps[list[TrainingJob]]:
        answer = yield from self.send("GET", "/train", params={"limit": limit})
        return [_parse(TrainingJob, each) for each in answer]

    def models(self) -> _Steps[list[ModelSummary]]:
        return [_parse(ModelSummary, each) for each in (yield from self.send("GET", "/models"))]

    def promote(self, name: str, version: int) -> _Steps[ModelSummary]:
        answer = yield from self.send("PUT", f"/models/{name}/live", json={"version": version})
        return _parse(ModelSummary, answer)

    def download_version(self, name: str, version: int) -> _Steps[bytes]:
        return (yield from self.fetch("GET", f"/models/{name}/{version}/zip")).content

    def card(self, name: str, version: int) -> _Steps[dict[str, Any]]:
        card: dict[str, Any] = yield from self.send("GET", f"/models/{name}/{version}")
        return card

    def delete_version(self, name: str, version: int) -> _Steps[ModelSummary]:
        return _parse(ModelSummary, (yield from self.send("DELETE", f"/models/{name}/{version}")))

    def health(self) -> _Steps[dict[str, Any]]:
        health: dict[str, Any] = yield from self.send("GET", "/health")
        return health

    def upload_version(self, name: str, archive: Archive, promote: str) -> _Steps[UploadedVersion]:
        file = yield lambda: encode_image(archive)[1]
        options: dict[str, Any] = {"params": {"promote": promote}, "files": {"file": ("version.zip", file)}}
        answer = yield from self.send("POST", f"/models/{name}", timeout=_CHECK_TIMEOUT_S, **options)
        return _parse(UploadedVersion, answer)


def _encode_images(images: Sequence[Image]) -> list[tuple[str | None, bytes]]:
    return [encode_image(image) for image in images]


def _without_none(**params: Any) -> dict[str, Any]:
    return {name: value for name, value in params.items() if value is not None}


class _EventReader:
    """The events of one job over several connections. Input: responses, bytes and errors. Output: events and pauses.

    Args:
        path: Path of the event stream.
        last_event_id: Number of the last event that is known.
        budget_s: Seconds without an event after which the reader gives up.
    """

    def __init__(self, path: str, last_event_id: int, budget_s: float):
        self.path = path
        self.is_finished = False
        self._last = last_event_id
        self._budget_s = budget_s
        self._retries = _Retries(budget_s, is_repeatable=True)
        self._rest = b""
        self._fields: dict[str, str] = {}

    def start(self) -> dict[str, Any]:
        """Begin a connection. Return the options of its request."""
        self._rest, self._fields = b"", {}
        return {"headers": {"Last-Event-ID": str(self._last), "Accept": "text/event-stream"}}

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """Parse a part of the stream, see the HTML standard, section 9.2."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            name, _, value = line.decode().rstrip("\r").partition(":")
            if name:
                self._fields[name] = value.removeprefix(" ")
            elif "data" in self._fields:
                yield self._make_event()
                if self.is_finished:
                    return
            else:
                self._fields = {}

    def _make_event(self) -> Event:
        number = self._fields.get("id")
        event = Event(
            self._fields.get("event", "message"),
            None if number is None else int(number),
            json.loads(self._fields["data"]),
        )
        self._fields = {}
        self._last = self._last if event.number is None else event.number
        self.is_finished = event.name == "end"
        self._retries = _Retries(self._budget_s, is_repeatable=True)
        return event

    def pause_after(self, outcome: httpx.Response | httpx.TransportError | None) -> float:
        """Return the seconds to wait before the next connection. None stands for a stream that ended early.

        Raises:
            ServiceError: The service refuses the stream, or the budget is used up.
        """
        if isinstance(outcome, httpx.ReadTimeout):
            outcome = httpx.ReadError(str(outcome))
        return self._retries.pause_after(outcome or httpx.RemoteProtocolError("the service ended the event stream"))


def _job_events(job_id: str) -> str:
    return f"/train/{job_id}/events"


def _evaluation_events(evaluation: Evaluation) -> str:
    return f"/evaluate/{evaluation.id}/events"


def _require_success(evaluation: Evaluation) -> Evaluation:
    if evaluation.state != "succeeded":
        raise ServiceError(None, f"the evaluation {evaluation.id} {evaluation.state}: {evaluation.error}")
    return evaluation


def _options(url: str, api_key: str | None, timeout_s: float) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return {"base_url": url, "headers": headers, "timeout": timeout_s}


class Client:
    """A synchronous client. Several threads may share one.

    Args:
        url: Address of the service, with the path prefix of a proxy if there is one.
        api_key: One of the keys in CIFAR100_API_KEYS.
        timeout_s: Seconds without any progress after which an attempt fails.
        budget_s: Seconds for all attempts of a call. A call is sent again after a connection error, and after 429 and
            503 when the time in `Retry-After` has passed.
        transport: A transport of httpx, such as `httpx.HTTPTransport(uds=...)` for a unix socket.
    """

    def __init__(
        self,
        url: str = URL,
        *,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        budget_s: float = 30.0,
        transport: httpx.BaseTransport | None = None,
    ):
        self._http = httpx.Client(**_options(url, api_key, timeout_s), transport=transport)
        self._calls = _Calls(budget_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _run(self, steps: _Steps[Value]) -> Value:
        outcome: Any = None
        try:
            while True:
                match steps.send(outcome):
                    case _Request(method, path, options):
                        try:
                            outcome = self._http.request(method, path, **options)
                        except httpx.TransportError as error:
                            outcome = error
                    case float(seconds):
                        time.sleep(seconds)
                    case work:
                        outcome = work()
        except StopIteration as stop:
            return cast(Value, stop.value)

    def _follow(self, path: str, last_event_id: int = 0) -> Iterator[Event]:
        reader = _EventReader(path, last_event_id, self._calls.budget_s)
        while True:
            outcome: httpx.Response | httpx.TransportError | None = None
            try:
                with self._http.stream("GET", path, timeout=_STREAM_TIMEOUT_S, **reader.start()) as response:
                    if response.is_success:
                        for chunk in response.iter_bytes():
                            yield from reader.feed(chunk)
                            if reader.is_finished:
                                return
                    else:
                        response.read()
                        outcome = response
            except httpx.TransportError as error:
                outcome = error
            time.sleep(reader.pause_after(outcome))

    @overload
    def predict(
        self,
        images: list[Image] | tuple[Image, ...],
        *,
        model: str | None = None,
        version: int | None = None,
        top_k: int = 5,
    ) -> list[Prediction]: ...
    @overload
    def predict(
        self, images: Image, *, model: str | None = None, version: int | None = None, top_k: int = 5
    ) -> Prediction: ...
    def predict(
        self,
        images: Image | list[Image] | tuple[Image, ...],
        *,
        model: str | None = None,
        version: int | None = None,
        top_k: int = 5,
    ) -> Prediction | list[Prediction]:
        """Classify one image, or a list of images.

        Args:
            images: A path, the bytes of a file, an image of Pillow or an array of NumPy; or a list of these.
            model: Name of the model. Default: chosen by the service.
            version: Version. Default: the live one.
            top_k: Number of classes per image.

        Raises:
            ServiceError: The service refuses the images, or cannot be reached.
            OSError: A file cannot be read.
        """
        return self._run(self._calls.predict(images, model, version, top_k))

    def predict_each(
        self, images: Sequence[Image], *, model: str | None = None, version: int | None = None, top_k: int = 5
    ) -> list[Prediction | ServiceError]:
        """Classify several images. An image that cannot be decoded gets its error, and the others their predictions.

        Args:
            images: Images as for `predict`.
            model: Name of the model. Default: chosen by the service.
            version: Version. Default: the live one.
            top_k: Number of classes per image.

        Raises:
            ServiceError: The service refuses the whole request, or cannot be reached.
            OSError: A file cannot be read.
        """
        return self._run(self._calls.predict_each(images, model, version, top_k))

    def send_feedback(
        self, image: Image, label: str, *, model: str | None = None, version: int | None = None
    ) -> Correction:
        """Tell the service the right class of an image, for later training.

        Args:
            image: An image as for `predict`. The service keeps its 32x32 pixels only.
            label: Label of the right class.
            model: Name of the model that was wrong. Default: chosen by the service.
            version: Its version. Default: the live one.

        Raises:
            ServiceError: The service refuses the correction, accepts none, or cannot be reached.
            OSError: The file cannot be read.
        """
        return self._run(self._calls.send_feedback(image, label, model, version))

    def explain(
        self, image: Image, *, model: str | None = None, version: int | None = None, label: str | None = None
    ) -> Explanation:
        """Explain a class: how much each region of an image speaks for it.

        Args:
            image: A path, the bytes of a file, an image of Pillow or an array of NumPy.
            model: Name of the model. Default: chosen by the service.
            version: Version. Default: the live one.
            label: Label of the class. Default: the most probable class.

        Raises:
            ServiceError: The service refuses the image, or cannot be reached.
            OSError: The file cannot be read.
        """
        return self._run(self._calls.explain(image, model, version, label))

    def evaluate(
        self,
        archive: Archive | None = None,
        *,
        model: str | None = None,
        version: int | None = None,
        split: str | None = None,
        limit: int | None = None,
    ) -> Evaluation:
        """Measure a model on the data set of the service, or on a zip with a folder of images for each class.

        Args:
            archive: The zip. Default: the data set.
            model: Name of the model. Default: chosen by the service.
            version: Version. Default: the live one.
            split: "test" or "train". Default: "test".
            limit: Number of images of the split. Default: all.

        Raises:
            ServiceError: The service refuses the evaluation or cannot be reached, or the evaluation fails.
        """
        evaluation = self._run(self._calls.evaluate(archive, model, version, split, limit))
        if evaluation.state not in FINISHED:
            for event in self._follow(_evaluation_events(evaluation)):
                if event.name == "end":
                    evaluation = _parse_evaluation(event.data)
        return _require_success(evaluation)

    def train(
        self, recipe: str, *, promote: str = "if-better", idempotency_key: str | None = None, **overrides: Any
    ) -> "Job":
        """Queue a training job.

        Args:
            recipe: Name of a recipe.
            promote: "if-better", "always" or "never".
            idempotency_key: Key by which the service recognizes a repeated request, also one of another process.
                Default: a new key for each call.
            overrides: Fields of the recipe to change, such as `epochs=3`.

        Raises:
            ServiceError: The service refuses the job or cannot be reached.
        """
        return Job(self, self._run(self._calls.train(recipe, overrides, promote, idempotency_key)))

    def job(self, job_id: str) -> "Job":
        """Return a training job that was queued earlier."""
        return Job(self, self._run(self._calls.job(job_id)))

    def jobs(self, limit: int = 100) -> list[TrainingJob]:
        """List the latest training jobs, newest first, without their progress."""
        return self._run(self._calls.jobs(limit))

    def models(self) -> list[ModelSummary]:
        """List the models."""
        return self._run(self._calls.models())

    def promote(self, name: str, version: int) -> ModelSummary:
        """Make a version live."""
        return self._run(self._calls.promote(name, version))

    def download_version(self, name: str, version: int) -> bytes:
        """Return a zip of the card and the files of a version, which `upload_version` accepts."""
        return self._run(self._calls.download_version(name, version))

    def upload_version(self, name: str, archive: Archive, *, promote: str = "never") -> UploadedVersion:
        """Publish a version of another service. The service checks it first, which may take a minute.

        Args:
            name: Name of the model.
            archive: The zip of `download_version`.
            promote: "never", "if-better" or "always".

        Raises:
            ServiceError: The service refuses the version, does not accept uploads, or cannot be reached.
        """
        return self._run(self._calls.upload_version(name, archive, promote))

    def card(self, name: str, version: int) -> dict[str, Any]:
        """Return the card of a version."""
        return self._run(self._calls.card(name, version))

    def delete_version(self, name: str, version: int) -> ModelSummary:
        """Delete a version. The service keeps a version that is in use."""
        return self._run(self._calls.delete_version(name, version))

    def health(self) -> dict[str, Any]:
        """Return the state of the service."""
        return self._run(self._calls.health())


class Job:
    """A training job of a `Client`.

    Attributes:
        latest: The job as the service described it last.
    """

    def __init__(self, client: Client, latest: TrainingJob):
        self._client = client
        self.latest = latest

    @property
    def id(self) -> str:
        """Id of the job."""
        return self.latest.id

    def follow(self, last_event_id: int = 0) -> Iterator[Event]:
        """Iterate over the events of the job until its end. A lost connection is replaced, and no event is lost.

        Args:
            last_event_id: Number of the last event that is known. 0 for all events.

        Raises:
            ServiceError: The service does not answer for the budget of the client.
        """
        for event in self._client._follow(_job_events(self.id), last_event_id):
            if event.name == "end":
                self.latest = _parse(TrainingJob, event.data)
            yield event

    def wait(self) -> TrainingJob:
        """Wait until the job has finished, and return it."""
        for _ in self.follow():
            pass
        return self.latest

    def refresh(self) -> TrainingJob:
        """Ask the service for the job."""
        self.latest = self._client._run(self._client._calls.job(self.id))
        return self.latest

    def cancel(self) -> TrainingJob:
        """Cancel the job."""
        self.latest = self._client._run(self._client._calls.cancel(self.id))
        return self.latest


class AsyncClient:
    """An asynchronous client for asyncio. Its calls are those of `Client`, which describes them."""

    def __init__(
        self,
        url: str = URL,
        *,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        budget_s: float = 30.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ):
        self._http = httpx.AsyncClient(**_options(url, api_key, timeout_s), transport=transport)
        self._calls = _Calls(budget_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _run(self, steps: _Steps[Value]) -> Value:
        outcome: Any = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as stop:
                return cast(Value, stop.value)
            match step:
                case _Request(method, path, options):
                    try:
                        outcome = await self._http.request(method, path, **options)
                    except httpx.TransportError as error:
                        outcome = error
                case float(seconds):
                    await asyncio.sleep(seconds)
                case work:
                    outcome = await asyncio.to_thread(work)

    async def _follow(self, path: str, last_event_id: int = 0) -> AsyncIterator[Event]:
        reader = _EventReader(path, last_event_id, self._calls.budget_s)
        while True:
            outcome: httpx.Response | httpx.TransportError | None = None
            try:
                async with self._http.stream("GET", path, timeout=_STREAM_TIMEOUT_S, **reader.start()) as response:
                    if response.is_success:
                        async for chunk in response.aiter_bytes():
                            for event in reader.feed(chunk):
                                yield event
                            if reader.is_finished:
                                return
                    else:
                        await response.aread()
                        outcome = response
            except httpx.TransportError as error:
                outcome = error
            await asyncio.sleep(reader.pause_after(outcome))

    @overload
    async def predict(
        self,
        images: list[Image] | tuple[Image, ...],
        *,
        model: str | None = None,
        version: int | None = None,
        top_k: int = 5,
    ) -> list[Prediction]: ...
    @overload
    async def predict(
        self, images: Image, *, model: str | None = None, version: int | None = None, top_k: int = 5
    ) -> Prediction: ...
    async def predict(
        self,
        images: Image | list[Image] | tuple[Image, ...],
        *,
        model: str | None = None,
        version: int | None = None,
        top_k: int = 5,
    ) -> Prediction | list[Prediction]:
        """Classify one image, or a list of images."""
        return await self._run(self._calls.predict(images, model, version, top_k))

    async def predict_each(
        self, images: Sequence[Image], *, model: str | None = None, version: int | None = None, top_k: int = 5
    ) -> list[Prediction | ServiceError]:
        """Classify several images. An image that cannot be decoded gets its error."""
        return await self._run(self._calls.predict_each(images, model, version, top_k))

    async def send_feedback(
        self, image: Image, label: str, *, model: str | None = None, version: int | None = None
    ) -> Correction:
        """Tell the service the right class of an image, for later training."""
        return await self._run(self._calls.send_feedback(image, label, model, version))

    async def explain(
        self, image: Image, *, model: str | None = None, version: int | None = None, label: str | None = None
    ) -> Explanation:
        """Explain a class: how much each region of an image speaks for it."""
        return await self._run(self._calls.explain(image, model, version, label))

    async def evaluate(
        self,
        archive: Archive | None = None,
        *,
        model: str | None = None,
        version: int | None = None,
        split: str | None = None,
        limit: int | None = None,
    ) -> Evaluation:
        """Measure a model on the data set of the service, or on a zip with a folder of images for each class."""
        evaluation = await self._run(self._calls.evaluate(archive, model, version, split, limit))
        if evaluation.state not in FINISHED:
            async for event in self._follow(_evaluation_events(evaluation)):
                if event.name == "end":
                    evaluation = _parse_evaluation(event.data)
        return _require_success(evaluation)

    async def train(
        self, recipe: str, *, promote: str = "if-better", idempotency_key: str | None = None, **overrides: Any
    ) -> "AsyncJob":
        """Queue a training job."""
        return AsyncJob(self, await self._run(self._calls.train(recipe, overrides, promote, idempotency_key)))

    async def job(self, job_id: str) -> "AsyncJob":
        """Return a training job that was queued earlier."""
        return AsyncJob(self, await self._run(self._calls.job(job_id)))

    async def jobs(self, limit: int = 100) -> list[TrainingJob]:
        """List the latest training jobs, newest first, without their progress."""
        return await self._run(self._calls.jobs(limit))

    async def models(self) -> list[ModelSummary]:
        """List the models."""
        return await self._run(self._calls.models())

    async def promote(self, name: str, version: int) -> ModelSummary:
        """Make a version live."""
        return await self._run(self._calls.promote(name, version))

    async def download_version(self, name: str, version: int) -> bytes:
        """Return a zip of the card and the files of a version, which `upload_version` accepts."""
        return await self._run(self._calls.download_version(name, version))

    async def upload_version(self, name: str, archive: Archive, *, promote: str = "never") -> UploadedVersion:
        """Publish a version of another service. The service checks it first, which may take a minute."""
        return await self._run(self._calls.upload_version(name, archive, promote))

    async def card(self, name: str, version: int) -> dict[str, Any]:
        """Return the card of a version."""
        return await self._run(self._calls.card(name, version))

    async def delete_version(self, name: str, version: int) -> ModelSummary:
        """Delete a version. The service keeps a version that is in use."""
        return await self._run(self._calls.delete_version(name, version))

    async def health(self) -> dict[str, Any]:
        """Return the state of the service."""
        return await self._run(self._calls.health())


class AsyncJob:
    """A training job of an `AsyncClient`, see `Job`."""

    def __init__(self, client: AsyncClient, latest: TrainingJob):
        self._client = client
        self.latest = latest

    @property
    def id(self) -> str:
        """Id of the job."""
        return self.latest.id

    async def follow(self, last_event_id: int = 0) -> AsyncIterator[Event]:
        """Iterate over the events of the job until its end."""
        async for event in self._client._follow(_job_events(self.id), last_event_id):
            if event.name == "end":
                self.latest = _parse(TrainingJob, event.data)
            yield event

    async def wait(self) -> TrainingJob:
        """Wait until the job has finished, and return it."""
        async for _ in self.follow():
            pass
        return self.latest

    async def refresh(self) -> TrainingJob:
        """Ask the service for the job."""
        self.latest = await self._client._run(self._client._calls.job(self.id))
        return self.latest

    async def cancel(self) -> TrainingJob:
        """Cancel the job."""
        self.latest = await self._client._run(self._client._calls.cancel(self.id))
        return self.latest
