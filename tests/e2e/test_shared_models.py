"""Test services whose model store is on an S3 server: publication, promotion, outages and restarts."""

import signal
import uuid
from functools import partial
from pathlib import Path

import httpx
import pytest
from command_line import answered
from s3_server import S3Server, make_bucket, open_files
from server import Server, wait_for
from service import TINY, find_finished_job, run_service

from training.store import make_store

pytestmark = pytest.mark.slow

TRAINING = {"recipe": "resnet", "overrides": {**TINY, "epochs": 1}, "promote": "always"}


@pytest.fixture
def location(s3: S3Server, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store with one live version, copied from a folder."""
    monkeypatch.setenv("CIFAR100_MODELS_CACHE", str(tmp_path / "cache"))
    bucket = f"bucket-{uuid.uuid4().hex}"
    make_bucket(bucket)
    location = f"s3://{bucket}/models"
    files, root = open_files(location)
    files.put(str(models), root, recursive=True)
    return location


def serves(client: httpx.Client, version: int) -> bool:
    return bool(client.get("/health").json()["models"]["resnet"]["version"] == version)


def test_a_version_that_one_service_trains_is_served_by_all(location: str, tmp_path: Path, image: Path) -> None:
    first_log, second_log = tmp_path / "first.log", tmp_path / "second.log"
    with (
        run_service(location, tmp_path / "first", first_log) as (first, _),
        run_service(location, tmp_path / "second", second_log) as (second, _),
    ):
        job_id = first.post("/train", json=TRAINING).raise_for_status().json()["id"]
        job = wait_for(lambda: find_finished_job(first, job_id), 120, first_log)
        assert job["published"] == {**job["published"], "model": "resnet", "version": 2}, first_log.read_text()
        for client, log in ((first, first_log), (second, second_log)):
            wait_for(partial(serves, client, 2), 60, log)
        answers = [client.post("/predict", files={"file": image.read_bytes()}).json() for client in (first, second)]
        assert answers[0]["predictions"] == answers[1]["predictions"]
        assert second.put("/models/resnet/live", json={"version": 1}).json()["live"] == 1
        wait_for(partial(serves, first, 1), 60, first_log)
        zipped = first.get("/models/resnet/2/zip").raise_for_status().content
        assert len(zipped) > 1000
        assert first.delete("/models/resnet/1").status_code == 409
    assert make_store(location).versions("resnet") == [1, 2]
    assert make_store(location).live("resnet") == 1
    (listed,) = answered("models", "list", "--models", location)
    assert (listed["name"], listed["live"], listed["versions"]) == ("resnet", 1, [1, 2])


def test_a_service_goes_on_while_the_object_store_does_not_answer(
    location: str, s3: S3Server, tmp_path: Path, image: Path
) -> None:
    log = tmp_path / "log"
    with run_service(location, tmp_path / "runs", log) as (client, _):
        s3.process.send_signal(signal.SIGSTOP)
        try:
            for _ in range(20):
                assert client.post("/predict", files={"file": image.read_bytes()}).status_code == 200
            wait_for(lambda: client.get("/models").status_code == 503, 60, log)
            assert client.get("/health/ready").status_code == 200
        finally:
            s3.process.send_signal(signal.SIGCONT)
        wait_for(lambda: client.get("/models").status_code == 200, 60, log)
        assert client.put("/models/resnet/live", json={"version": 1}).status_code == 200


def test_a_service_without_its_object_store_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    log = tmp_path / "log"
    server = Server("s3://nowhere/models", tmp_path / "runs", log)
    assert server.process.wait(60) == 1
    assert "CIFAR100_MODELS: the model store s3://nowhere/models cannot be read: " in log.read_text().strip()
    assert "Traceback" not in log.read_text()
