"""Test the Python client: encoding of images, retries and their limits, event streams, and results it does not know."""

import asyncio
import io
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from app.client import AsyncClient, Client, Event, Prediction, ServiceError, encode_image

Handler = Callable[[httpx.Request], httpx.Response]

JOB: dict[str, Any] = {"id": "1-a", "state": "queued", "request": {"recipe": "resnet"}, "unknown": [1]}


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Make pauses short. Return the pauses that were asked for."""
    asked: list[float] = []
    sleep = time.sleep

    def record(seconds: float) -> None:
        asked.append(seconds)
        sleep(0)

    monkeypatch.setattr(time, "sleep", record)
    return asked


def make_client(handler: Handler, **options: Any) -> Client:
    return Client("http://service", transport=httpx.MockTransport(handler), **options)


def sequence(*outcomes: httpx.Response | Exception) -> tuple[Handler, list[httpx.Request]]:
    """Return a handler that gives each outcome once, and the list of requests that it has received."""
    received: list[httpx.Request] = []
    left = iter(outcomes)

    def handle(request: httpx.Request) -> httpx.Response:
        received.append(request)
        outcome = next(left)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return handle, received


def problem(status: int, detail: str = "no", **headers: str) -> httpx.Response:
    body = {"type": "about:blank", "title": "Title", "status": status, "detail": detail}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.Response(status, json=body, headers={"content-type": "application/problem+json", **named})


def ok(body: Any) -> httpx.Response:
    return httpx.Response(200, json=body)


@pytest.mark.parametrize("shape", [(5, 7, 3), (32, 32, 3), (4, 6), (4, 6, 1), (4, 6, 2), (4, 6, 4)])
def test_arrays_are_encoded_without_loss(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    for each in (array, np.asfortranarray(array)):
        decoded = np.asarray(Image.open(io.BytesIO(encode_image(each)[1])))
        assert (decoded == (array[..., 0] if shape[2:] == (1,) else array)).all()


@pytest.mark.parametrize("array", [np.zeros((2, 2, 3)), np.zeros((2, 2, 5), np.uint8), np.zeros(3, np.uint8)])
def test_other_arrays_are_refused(array: Any) -> None:
    with pytest.raises(ValueError, match="give uint8"):
        encode_image(array)
    with pytest.raises(TypeError, match="int is no image"):
        encode_image(7)  # type: ignore[arg-type]


def test_images_of_pillow_keep_orientation_and_mode() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (4, 6), (1, 2, 3))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    sent = Image.open(io.BytesIO(encode_image(Image.open(buffer))[1]))
    assert (sent.format, sent.getexif()[0x0112]) == ("PNG", 6)
    assert Image.open(io.BytesIO(encode_image(Image.new("CMYK", (4, 6), (1, 2, 3, 4)))[1])).getpixel((0, 0)) == (
        1,
        2,
        3,
        4,
    )


def test_refused_and_lost_requests_are_sent_again_after_the_time_that_the_service_names(pauses: list[float]) -> None:
    outcomes = problem(503, retry_after="2"), problem(429, retry_after="3"), httpx.ReadError("lost"), ok([])
    handle, received = sequence(*outcomes)
    assert make_client(handle).models() == []
    assert len(received) == 4
    first, second, third = pauses
    assert 2 <= first <= 3
    assert 3 <= second <= 4.5
    assert 0 < third <= 5


def test_a_longer_pause_than_the_budget_fails_at_once(pauses: list[float]) -> None:
    handle, received = sequence(problem(429, "slow down", retry_after="60"))
    with pytest.raises(ServiceError, match="429 Title: slow down"):
        make_client(handle, budget_s=30).models()
    assert (len(received), pauses) == (1, [])


def test_attempts_end_with_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    received = []

    def handle(request: httpx.Request) -> httpx.Response:
        received.append(request)
        raise httpx.ConnectError("refused")

    with pytest.raises(ServiceError, match="ConnectError: refused") as raised:
        make_client(handle, budget_s=30).models()
    assert raised.value.status is None
    assert isinstance(raised.value.__cause__, httpx.ConnectError)
    assert 5 < len(received) < 15
    assert now <= 30


def test_errors_have_the_members_of_the_problem() -> None:
    body = {"type": "a:b", "title": "T", "status": 422, "detail": "d", "errors": [{"field": "f", "message": "m"}]}
    handle, received = sequence(httpx.Response(422, json=body, headers={"x-request-id": "7"}))
    with pytest.raises(ServiceError) as raised:
        make_client(handle).models()
    error = raised.value
    assert (error.status, error.type, error.detail, error.request_id) == (422, "a:b", "d", "7")
    assert error.errors == ({"field": "f", "message": "m"},)
    assert len(received) == 1
    handle, _ = sequence(httpx.Response(502, text="<html>Bad Gateway"))
    with pytest.raises(ServiceError, match="502 Bad Gateway: <html>"):
        make_client(handle).models()


def test_every_attempt_of_a_training_call_has_the_same_key() -> None:
    handle, received = sequence(httpx.ReadError("lost"), problem(503), ok(JOB))
    job = make_client(handle).train("resnet", epochs=3)
    assert job.latest.state == "queued"
    assert json.loads(received[0].content) == {"recipe": "resnet", "overrides": {"epochs": 3}, "promote": "if-better"}
    keys = [request.headers["idempotency-key"] for request in received]
    assert len(set(keys)) == 1
    assert len(keys[0]) == 32
    handle, received = sequence(ok(JOB))
    make_client(handle).train("resnet", idempotency_key="nightly")
    assert received[0].headers["idempotency-key"] == "nightly"


def test_an_evaluation_that_may_have_begun_is_not_started_again() -> None:
    handle, received = sequence(httpx.ReadError("lost"))
    with pytest.raises(ServiceError, match="ReadError: lost"):
        make_client(handle).evaluate()
    assert len(received) == 1


def test_a_read_timeout_is_not_retried_because_the_service_may_still_work() -> None:
    handle, received = sequence(httpx.ReadTimeout("slow"))
    with pytest.raises(ServiceError, match="ReadTimeout"):
        make_client(handle).predict(b"image")
    assert len(received) == 1


def test_an_answer_of_another_service_is_an_error_and_unknown_members_are_ignored() -> None:
    handle, _ = sequence(
        ok([{"title": "page"}]), ok([{"name": "a", "live": 1, "versions": [1], "error": None, "new": 1}])
    )
    with make_client(handle) as client:
        with pytest.raises(ServiceError, match="lacks 'name'"):
            client.models()
        assert client.models()[0].versions == (1,)


def test_more_images_than_a_request_may_have_are_sent_in_parts() -> None:
    sizes = []

    def handle(request: httpx.Request) -> httpx.Response:
        count = request.content.count(b'name="file"')
        sizes.append(count)
        classes = [{"class_id": 1, "label": "a", "superclass": "b", "probability": 0.5}]
        predictions = [{"file": None, "classes": classes, "warnings": []} for _ in range(count)]
        return ok({"model": "resnet", "version": 2, "predictions": predictions})

    with make_client(handle) as client:
        assert len(client.predict([b"image"] * 70)) == 70
        assert client.predict([]) == []
        assert client.predict(b"image").label == "a"
    assert sizes == [32, 32, 6, 1]


def test_each_image_gets_its_prediction_or_its_error() -> None:
    classes = [{"class_id": 1, "label": "a", "superclass": "b", "probability": 0.5}]
    error = {"type": "/errors#415", "title": "Unsupported Media Type", "status": 415, "detail": "no image"}
    predictions = [{"file": "image 0", "classes": classes}, {"file": "image 1", "error": error}]
    handle, received = sequence(ok({"model": "resnet", "version": 2, "predictions": predictions}))
    good, bad = make_client(handle).predict_each([b"image", b"text"], top_k=1)
    assert isinstance(good, Prediction)
    assert good.label == "a"
    assert isinstance(bad, ServiceError)
    assert (bad.status, bad.type, bad.title, bad.detail) == (415, "/errors#415", "Unsupported Media Type", "no image")
    assert dict(received[0].url.params) == {"top_k": "1", "partial": "true"}


def test_a_version_is_downloaded_and_uploaded_again_after_a_lost_connection() -> None:
    uploaded = {"name": "resnet", "version": 2, "live": False, "check": None}
    handle, received = sequence(httpx.Response(200, content=b"PK"), httpx.ReadError("lost"), ok(uploaded))
    client = make_client(handle)
    version = client.upload_version("resnet", client.download_version("resnet", 4), promote="if-better")
    assert (version.version, version.live, version.check) == (2, False, None)
    assert [request.url.path for request in received] == ["/models/resnet/4/zip", "/models/resnet", "/models/resnet"]
    assert dict(received[2].url.params) == {"promote": "if-better"}
    assert b"PK" in received[2].content
    assert received[2].extensions["timeout"]["read"] > 600


FIRST = b'id: 1\nevent: tick\ndata: {"epoch": 0}\n\n'
SECOND = b': nothing new\n\nid: 2\nevent: epoch\ndata: {"text": "\xe2\x80\xa8"}\n\n'
END = b"event: end\ndata: " + json.dumps(JOB | {"state": "succeeded"}).encode() + b"\n\n"
EXPECTED = [("tick", 1), ("epoch", 2), ("end", None)]


class Chunks(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that arrives in small parts, and may break off."""

    def __init__(self, content: bytes, breaks_off: bool = False):
        self._content = content
        self._breaks_off = breaks_off

    def __iter__(self) -> Iterator[bytes]:
        for at in range(0, len(self._content), 7):
            yield self._content[at : at + 7]
        if self._breaks_off:
            raise httpx.ReadError("the connection broke")

    async def __aiter__(self) -> Any:
        for chunk in self:
            yield chunk


def streams() -> tuple[Handler, list[httpx.Request]]:
    """Return the responses to a client that follows a job: broken off, refused, ended early, and complete."""
    return sequence(
        ok(JOB),
        httpx.Response(200, stream=Chunks(FIRST + b"id: 9\nevent: half", breaks_off=True)),
        problem(503, retry_after="1"),
        httpx.ConnectError("the service restarts"),
        httpx.Response(200, stream=Chunks(SECOND)),
        httpx.Response(200, stream=Chunks(END)),
    )


def test_follow_reconnects_with_the_last_event_and_loses_none() -> None:
    handle, received = streams()
    job = make_client(handle).job("1-a")
    events = list(job.follow())
    assert [(event.name, event.number) for event in events] == EXPECTED
    assert events[1].data == {"text": "\u2028"}
    assert [request.headers.get("last-event-id") for request in received[1:]] == ["0", "1", "1", "1", "2"]
    assert job.latest.state == "succeeded"
    assert job.latest.is_finished


def test_the_asynchronous_client_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    handle, received = streams()
    pauses: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        await real(0)

    monkeypatch.setattr(asyncio, "sleep", sleep)

    async def follow() -> list[Event]:
        async with AsyncClient("http://service", transport=httpx.MockTransport(handle)) as client:
            job = await client.job("1-a")
            events = [event async for event in job.follow()]
            assert job.latest.state == "succeeded"
            return events

    assert [(event.name, event.number) for event in asyncio.run(follow())] == EXPECTED
    assert [request.headers.get("last-event-id") for request in received[1:]] == ["0", "1", "1", "1", "2"]
    assert len(pauses) == 4


def test_follow_gives_up_on_an_unknown_job() -> None:
    handle, received = sequence(ok(JOB), problem(404, "there is no such job"))
    with pytest.raises(ServiceError, match="no such job"):
        make_client(handle).job("1-a").wait()
    assert len(received) == 2


def test_an_evaluation_in_the_background_is_followed_to_its_end() -> None:
    job = {"id": "e", "state": "running", "model": "resnet", "version": 1, "engine": "x"}
    measures = {"images": 2, "top1": 0.5, "top5": 1.0, "loss": 1.0, "ece": 0.1, "confusion": [[1, 0], [1, 0]]}
    done = json.dumps(job | {"state": "succeeded", "result": measures}).encode()
    handle, received = sequence(
        httpx.Response(202, json=job), httpx.Response(200, stream=Chunks(b"event: end\ndata: " + done + b"\n\n"))
    )
    result = make_client(handle).evaluate(b"zip", model="resnet").result
    assert result
    assert (result.top1, result.confusion) == (0.5, ((1, 0), (1, 0)))
    assert received[1].url.path == "/evaluate/e/events"
    handle, _ = sequence(ok(job | {"state": "failed", "error": "no data"}))
    with pytest.raises(ServiceError, match="no data"):
        make_client(handle).evaluate()


def test_pauses_differ_between_clients(pauses: list[float]) -> None:
    for _ in range(2):
        handle, _ = sequence(problem(503, retry_after="1"), ok([]))
        make_client(handle).models()
    assert pauses[0] != pauses[1]
