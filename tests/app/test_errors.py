"""Test error answers.

The service answers a shortage of machine resources with 503 and one log line. No error message repeats long input.
"""

import errno
import io
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from local_client import make_local_client, services_of
from PIL import Image

from app.main import create_app
from app.settings import Settings
from training.dataset import Dataset

LACKS = [
    (OSError(errno.ENOSPC, "No space left on device"), "a disk is full"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), "quota"),
    (OSError(errno.EFBIG, "File too large"), "larger than allowed"),
    (OSError(errno.EROFS, "Read-only file system"), "read-only"),
    (PermissionError(errno.EACCES, "Permission denied"), "has no permission"),
    (OSError(errno.EMFILE, "Too many open files"), "too many files open"),
    (OSError(errno.ENFILE, "Too many open files in system"), "too many files open"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "not enough memory"),
    (MemoryError(), "not enough memory"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), "enough memory"),
    (RuntimeError("can't start new thread"), "thread"),
]
LONG = 200_000


@pytest.fixture(autouse=True)
def warnings_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Set the level of the root logger, because libraries that other tests import may have changed it."""
    caplog.set_level(logging.INFO)


@pytest.fixture
def client(models: Path, tmp_path: Path) -> Iterator[TestClient]:
    settings = Settings(models=models, runs=tmp_path / "runs", data="synthetic:4", store_poll_s=600)
    with make_local_client(create_app(settings)) as client:
        yield client


@pytest.fixture
def small(dataset: Dataset) -> bytes:
    return png(dataset.test.images[0])


@pytest.fixture(scope="session")
def large() -> bytes:
    """A PNG image of 1.5 MB."""
    return png(np.random.default_rng(0).integers(0, 256, (710, 710, 3), np.uint8))


def png(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def assert_refused(response: httpx.Response, words: str, caplog: pytest.LogCaptureFixture) -> None:
    """Assert a 503 with Retry-After that names the shortage, and a log with one warning and no traceback."""
    assert response.status_code == 503, response.text
    assert response.headers["retry-after"] == "1"
    assert words in response.json()["detail"]
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.levelname for record in warnings] == ["WARNING"]
    assert not any(record.exc_info for record in caplog.records)
    caplog.clear()


@pytest.mark.parametrize(("error", "words"), LACKS, ids=lambda value: str(value)[:30])
def test_shortage_in_any_route_is_503(
    client: TestClient,
    small: bytes,
    error: Exception,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object, **__: object) -> Any:
        raise error

    services = services_of(client)
    monkeypatch.setattr(services.training_jobs, "newest", fail)
    monkeypatch.setattr(services.store, "names", fail)
    monkeypatch.setattr("app.inference.images.encoded.decode", fail)
    assert_refused(client.get("/train"), words, caplog)
    assert_refused(client.get("/models"), words, caplog)
    assert_refused(client.post("/predict", files={"file": small}), words, caplog)
    raw = client.post("/predict", content=small, headers={"Content-Type": "image/png"})
    assert_refused(raw, words, caplog)


def test_error_that_is_no_shortage_is_a_500_with_a_traceback(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for error in (OSError(errno.EIO, "Input/output error"), RuntimeError("broken"), ValueError("broken")):
        monkeypatch.setattr(
            services_of(client).training_jobs, "newest", lambda *_, error=error: (_ for _ in ()).throw(error)
        )
        assert client.get("/train").status_code == 500
        assert any(record.exc_info for record in caplog.records)
        caplog.clear()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EFBIG])
def test_temporary_folder_that_takes_no_file_refuses_large_forms_only(
    client: TestClient,
    small: bytes,
    large: bytes,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object, **__: object) -> Any:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("tempfile.TemporaryFile", fail)
        for route in ("/predict", "/evaluate"):
            refused = client.post(route, files={"file": large})
            assert_refused(refused, f"temporary folder ({os.strerror(number)})", caplog)
            assert "send files of up to 1,048,576 bytes" in refused.json()["detail"]
        assert client.post("/predict", files={"file": small}).status_code == 200
        assert client.post("/predict", content=large, headers={"Content-Type": "image/png"}).status_code == 200
    assert client.post("/predict", files={"file": large}).status_code == 200


def test_missing_temporary_folder_refuses_large_forms_only(
    client: TestClient,
    small: bytes,
    large: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    assert_refused(client.post("/predict", files={"file": large}), "temporary folder", caplog)
    assert client.post("/predict", files={"file": small}).status_code == 200


def test_stream_that_lacks_a_file_after_its_head_is_broken_off_with_one_line(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def events(*_: object) -> Any:
        yield None
        raise OSError(errno.EMFILE, "Too many open files")

    services = services_of(client)
    monkeypatch.setattr(services.training_jobs, "state", lambda _: None)
    monkeypatch.setattr(services.training_jobs, "events", events)
    assert client.get("/train/1/events").text == ": nothing new\n\n"
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert ["was aborted" in record.getMessage() for record in warnings] == [True]
    assert not any(record.exc_info for record in warnings)


@pytest.mark.parametrize(
    "request_body",
    [
        {"recipe": "x" * LONG},
        {"recipe": "resnet", "x" * LONG: 1},
        {"recipe": "resnet", "promote": "x" * LONG},
        {"recipe": "resnet", "overrides": {"x" * LONG: 1}},
        {"recipe": "resnet", "overrides": {"teacher": ",".join(["resnet/1"] * (LONG // 9))}},
        {"recipe": "resnet", "overrides": {"teacher": "x" * LONG}},
        {"recipe": "resnet", "overrides": {"weights": "x" * LONG}},
        {"recipe": "resnet18", "overrides": {"weights": "x" * 4000}},
        {"recipe": "resnet", "overrides": {"optimizer": "x" * LONG}},
        {"recipe": "resnet", "overrides": {"epochs": "9" * LONG}},
        {"recipe": "resnet18", "overrides": {"trainable": ["fc"] * LONG}},
        {"recipe": "resnet18", "overrides": {"trainable": "fc," * LONG}},
        {"recipe": "resnet18", "overrides": {"reinitialise": ["x" * LONG]}},
        {"recipe": "resnet", "overrides": {f"field{number}": 1 for number in range(10_000)}},
        {"recipe": "resnet"} | {f"field{number}": 1 for number in range(10_000)},
        {"recipe": {"deep": "x" * LONG}},
        [["x" * 100] * 1000],
    ],
    ids=lambda body: str(body)[:50],
)
def test_training_request_of_any_size_is_refused_in_few_words(client: TestClient, request_body: Any) -> None:
    refused = client.post("/train", json=request_body)
    assert refused.status_code == 422
    assert len(refused.content) < 6000, refused.text[:1000]
    assert client.get("/train").json() == []


def test_names_of_any_length_are_refused_in_few_words(client: TestClient, small: bytes) -> None:
    name = "x" * 20_000
    for method, path in (
        ("GET", f"/train/{name}"),
        ("DELETE", f"/train/{name}"),
        ("GET", f"/train/{name}/events"),
        ("GET", f"/models/{name}"),
        ("GET", f"/evaluate/{name}"),
        ("POST", f"/evaluate?model={name}"),
        ("GET", f"/train?limit={name}"),
    ):
        refused = client.request(method, path)
        assert 400 <= refused.status_code < 500, path[:20]
        assert len(refused.content) < 1000, path[:20]
    for query in ({"model": name}, {"version": name}, {"top_k": name}):
        refused = client.post("/predict", params=query, files={"file": small})
        assert 400 <= refused.status_code < 500
        assert len(refused.content) < 1000
    refused = client.put(f"/models/{name}/live", json={"version": 1})
    assert (refused.status_code, len(refused.content) < 1000) == (404, True)
    refused = client.post("/predict", content=small, headers={"Content-Type": f"text/{name}"})
    assert (refused.status_code, len(refused.content) < 1000) == (415, True)
    refused = client.post("/predict", files=[("file", (name[:3000], b"none"))] * 2)
    assert (refused.status_code, len(refused.content) < 2500) == (415, True)


def test_a_path_that_is_not_utf8_is_quoted_with_escapes(
    models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)  # pytest-xdist cannot send log lines with this path
    store = models.rename(tmp_path / os.fsdecode(b"gr\xf6\xdfe?%23"))
    (store / "resnet" / "2").mkdir()
    (store / "resnet" / "2" / "card.json").write_bytes(b"{")
    (store / "vgg" / "1").mkdir(parents=True)
    (store / "vgg" / "1" / "card.json").write_bytes(b"{")
    (store / "vgg" / "live").write_text("1")
    with make_local_client(create_app(Settings(models=store, runs=store / "runs"))) as client:
        assert client.get("/models/resnet").json()["live"] == 1
        assert "gr\\xf6\\xdfe?%23/resnet/2/card.json is damaged" in client.get("/models/resnet").json()["error"]
        assert "gr\\xf6\\xdfe?%23/vgg/1/card.json is damaged" in client.get("/health").json()["errors"]["vgg"]
        refused = client.put("/models/resnet/live", json={"version": 2})
        assert refused.status_code == 503
        assert "gr\\xf6\\xdfe?%23" in refused.json()["detail"]
        assert client.get("/train").json() == []
    assert (store / "runs" / "jobs.sqlite").exists()
