"""Collect the examples of the OpenAPI document from answers of the service, and write them to app/examples.json.

    python tests/helpers/api_examples.py

The service has two versions of `resnet` from the shipped models. It trains a small network on the synthetic data set,
which takes some seconds. Long lists are cut to their first items.
"""

import base64
import io
import json
import re
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[2]))

import httpx
from fastapi import FastAPI
from fastapi.testclient import TestClient
from local_client import make_local_client

from app.archives import zip_chunks
from app.main import create_app
from app.openapi import EXAMPLES
from app.settings import Settings

ROOT = Path(__file__).parents[2]
PHOTO = ROOT / "docs/pictures/rocket.jpg"
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="
"""A PNG of one gray pixel, in base64."""
KEY = "a-secret-of-the-examples"
TRAINING = {
    "recipe": "resnet",
    "overrides": {"width": 8, "epochs": 1, "validation_images": 0, "int8": False},
    "promote": "if-better",
}
JOB_S = 200.0
MAX_ITEMS = 3

_BINARY = ("image/", "application/octet-stream", "application/zip")
_JSON = ("application/json", "application/problem+json")
# Members whose values depend on the machine, or on the moment at which a job is read.
_FREE = {"commit", "device", "engine", "libraries", "title", "version"}
_FREE |= {"done", "files", "images", "phase", "progress", "started", "state"}
_CHANGING = re.compile(r"[0-9a-f]{8,}|\d+(?:[.,:]\d+)*")

Examples = dict[str, dict[str, Any]]


class Recorder:
    """Makes calls and keeps their requests and answers by operation id.

    Args:
        app: An application with all operations.
        folder: Folder of the service, which the examples leave out of paths.
    """

    def __init__(self, app: FastAPI, folder: Path):
        self.examples: Examples = {}
        self._folder = folder
        self._operations = {
            operation["operationId"]: (method, path, operation)
            for path, operations in app.openapi()["paths"].items()
            for method, operation in operations.items()
        }
        for name in self._operations:
            self.examples[name] = {"responses": {}, "problems": {}}

    def call(self, client: TestClient, name: str, expected: int, **request: Any) -> Any:
        """Make a call and keep its answer. An accepted call also gives the examples of its parameters.

        Args:
            client: Client of the service.
            name: Operation id.
            expected: Status of the answer.
            request: Arguments of httpx. `path` has the parameters of the path.

        Returns:
            The JSON, text or bytes of the answer.
        """
        method, path, operation = self._operations[name]
        in_path = request.pop("path", {})
        answer: httpx.Response = client.request(method, path.format(**in_path), **request)
        assert answer.status_code == expected, (name, answer.status_code, answer.text[:500])
        example, status, content = self.examples[name], str(expected), self._read(answer)
        kind = answer.headers["content-type"]
        if kind == "application/problem+json" or status not in operation["responses"]:
            example["problems"][status] = content
            return content
        declared = next(each for each in operation["responses"][status]["content"] if kind.startswith(each))
        if not isinstance(content, bytes):
            example["responses"].setdefault(status, {})[declared] = _shorten(content)
        given = {key.lower(): value for key, value in request.get("headers", {}).items()} | request.get("params", {})
        declared_names = {parameter["name"] for parameter in operation.get("parameters", [])}
        parameters = {key: value for key, value in (given | in_path).items() if key in declared_names}
        example["parameters"] = example.get("parameters", {}) | parameters
        if "json" in request:
            example["body"] = request["json"]
        return content

    def _read(self, answer: httpx.Response) -> Any:
        if answer.headers["content-type"].startswith(_BINARY):
            return answer.content
        text = answer.text.replace(f"{self._folder}/", "")
        return json.loads(text) if answer.headers["content-type"] in _JSON else text

    def refuse_unknown_parameters(self, client: TestClient, **in_path: str) -> None:
        """Keep a 422 of every operation that checks the names of its parameters, and a 405 of the one that does not."""
        for name, (method, path, _) in self._operations.items():
            if name == "metrics":
                answer = client.post(path)
            else:
                answer = client.request(method, path.format_map(in_path), params={"colour": "red"})
            if answer.status_code in (405, 422):
                self.examples[name]["problems"].setdefault(str(answer.status_code), answer.json())

    def refuse_strangers(self, with_keys: TestClient, without_keys: TestClient, **in_path: str) -> None:
        """Keep the 401 and the 403 of every operation that is for operators."""
        for name, (method, path, operation) in self._operations.items():
            if operation.get("security") == [{"HTTPBearer": []}]:
                for client, status in ((with_keys, "401"), (without_keys, "403")):
                    answer = client.request(method, path.format_map(in_path))
                    assert answer.status_code == int(status), (name, answer.text)
                    self.examples[name]["problems"][status] = answer.json()


def collect(folder: Path) -> Examples:
    """Run a service in a folder and return the examples of all operations."""
    for version in ("3", "4"):
        shutil.copytree(ROOT / "models/resnet" / version, folder / "models/resnet" / version)
    (folder / "models/resnet/live").write_text("4\n")
    settings = Settings(
        models=folder / "models",
        runs=folder / "runs",
        data="synthetic:1",
        runtime="torchscript",
        operator_rate_limit=None,
        deadline_s=600,
        feedback=True,
    )
    app = create_app(settings)
    recorder = Recorder(app, folder)
    with make_local_client(app) as client:
        job_id = recorder.call(client, "submit", 202, json=TRAINING)["id"]
        _predict(recorder, client)
        evaluation_id = _evaluate(recorder, client)
        _read_models(recorder, client)
        _infer(recorder, client)
        correction_id = _correct(recorder, client)
        _train(recorder, client, job_id)
        for name in ("health", "live", "ready", "metrics"):
            recorder.call(client, name, 200)
        recorder.call(client, "metrics", 200, headers={"Accept": "application/openmetrics-text"})
        ids = {"job_id": job_id, "evaluation_id": evaluation_id, "correction_id": correction_id}
        ids |= {"name": "resnet", "version": "4", "file": "model.pt"}
        recorder.refuse_unknown_parameters(client, **ids)
        pool = app.state.services.pool
        live, pool.live = pool.live, _break
        failure = client.get("/evaluate").json()
        pool.live = live
        stranger = TestClient(app, base_url="http://127.0.0.1", client=("192.0.2.1", 50000))
        with _client(settings.model_copy(update={"api_keys": (_secret(),)})) as keyed:
            recorder.refuse_strangers(keyed, stranger, **ids)
    _upload(recorder, folder, settings)
    (folder / "no_runs").write_text("a file, not a folder")
    with _client(settings.model_copy(update={"models": folder / "none", "runs": folder / "no_runs"})) as empty:
        _lack(recorder, empty)
    for example in recorder.examples.values():
        example["problems"]["500"] = failure
    return recorder.examples


def _predict(recorder: Recorder, client: TestClient) -> None:
    file = {"file": ("rocket.jpg", PHOTO.read_bytes())}
    recorder.call(
        client,
        "predict",
        200,
        files=file,
        params={"model": "resnet", "version": 4, "top_k": 3, "partial": False, "familiarity": "fast"},
    )
    recorder.call(client, "explain", 200, files=file, params={"model": "resnet", "version": 4, "class": "rocket"})
    recorder.call(client, "explain", 422, files=file, params={"class": "rockets"})
    recorder.call(client, "predict", 422, files=file, params={"top_k": 0})
    for name in ("predict", "explain"):
        recorder.call(client, name, 400, content=b"", headers={"Content-Type": "multipart/form-data"})
        recorder.call(client, name, 404, files=file, params={"model": "vgg"})
        recorder.call(client, name, 413, files={"file": bytes(11 << 20)})
        recorder.call(client, name, 415, files={"file": b"hello"})


def _correct(recorder: Recorder, client: TestClient) -> str:
    """Send corrections, list them and delete one. Return the id of another one."""
    file = {"file": ("rocket.jpg", PHOTO.read_bytes())}
    ids = [
        recorder.call(
            client, "send_feedback", 201, files=each, params={"model": "resnet", "version": 4, "class": label}
        )["id"]
        for each, label in (({"file": base64.b64decode(PIXEL)}, "cloud"), (file, "rocket"))
    ]
    recorder.call(client, "send_feedback", 422, files=file, params={"class": "rockets"})
    recorder.call(client, "corrections", 200, params={"limit": 1})
    recorder.call(client, "delete_correction", 200, path={"correction_id": ids[0]})
    recorder.call(client, "delete_correction", 404, path={"correction_id": ids[0]})
    return str(ids[1])


def _upload(recorder: Recorder, folder: Path, settings: Settings) -> None:
    """Upload a version to a service with an empty store, twice."""
    archive = b"".join(zip_chunks(sorted((ROOT / "models/resnet-seed/2").iterdir())))
    request: dict[str, Any] = {"path": {"name": "resnet-seed"}, "headers": {"Authorization": f"Bearer {KEY}"}}
    request |= {"files": {"file": ("resnet-seed-2.zip", archive)}, "params": {"promote": "never"}}
    stores = {"models": folder / "uploaded", "runs": folder / "runs-of-uploads"}
    with _client(settings.model_copy(update={"api_keys": (_secret(),), "allow_uploads": True, **stores})) as client:
        recorder.call(client, "upload_version", 201, **request)
        recorder.call(client, "upload_version", 200, **request)
        recorder.call(client, "upload_version", 422, **request | {"path": {"name": "vgg"}})
        recorder.call(client, "upload_version", 415, **request | {"files": None})


def _evaluate(recorder: Recorder, client: TestClient) -> str:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as files:
        files.writestr("rocket/1.jpg", PHOTO.read_bytes())
    file = {"file": ("photos.zip", archive.getvalue())}
    recorder.call(client, "recorded", 200)
    job_id: str = recorder.call(client, "evaluate", 200, files=file, params={"model": "resnet", "version": 4})["id"]
    recorder.call(client, "evaluate", 404, files=file, params={"model": "vgg"})
    recorder.call(client, "evaluate", 415, json={})
    recorder.call(client, "evaluate", 422, files=file, params={"split": "test"})
    settings = client.app.state.services.settings  # type: ignore[attr-defined]
    settings.evaluate_wait_s = 0
    recorder.call(client, "evaluate", 202, files=file, params={"model": "resnet", "version": 4})
    settings.evaluate_wait_s = 5
    _wait_for(client, "/evaluate/jobs", lambda jobs: jobs[0]["finished"])
    recorder.call(client, "evaluations", 200, params={"limit": 1})
    recorder.call(client, "evaluations", 422, params={"limit": 1000})
    path = {"evaluation_id": job_id}
    recorder.call(client, "evaluation", 200, path=path)
    recorder.call(client, "evaluation_events", 200, path=path, headers={"Last-Event-ID": "1"})
    recorder.call(client, "cancel_evaluation", 200, path=path)
    for name in ("evaluation", "evaluation_events", "cancel_evaluation"):
        recorder.call(client, name, 404, path={"evaluation_id": "0123456789ab"})
    return job_id


def _read_models(recorder: Recorder, client: TestClient) -> None:
    path = {"name": "resnet"}
    recorder.call(client, "models", 200)
    recorder.call(client, "model", 200, path=path)
    recorder.call(client, "card", 200, path=path | {"version": 4})
    recorder.call(client, "promote", 200, path=path, json={"version": 4})
    recorder.call(client, "promote", 404, path=path, json={"version": 9})
    recorder.call(
        client, "promote", 422, path=path, content=b"{'version': 4}", headers={"Content-Type": "application/json"}
    )
    recorder.call(client, "model", 404, path={"name": "vgg"})
    recorder.call(client, "card", 404, path=path | {"version": 9})
    recorder.call(client, "version_file", 200, path=path | {"version": 4, "file": "model.pt"})
    recorder.call(client, "version_file", 404, path=path | {"version": 4, "file": "live"})
    behind = {"Range": "bytes=99999999-"}
    recorder.call(client, "version_file", 416, path=path | {"version": 4, "file": "model.pt"}, headers=behind)
    recorder.call(client, "version_zip", 200, path=path | {"version": 4})
    recorder.call(client, "version_zip", 404, path=path | {"version": 9})
    recorder.call(client, "delete_version", 404, path=path | {"version": 9})
    recorder.call(client, "delete_version", 409, path=path | {"version": 4})
    recorder.call(client, "delete_version", 200, path=path | {"version": 3})


def _infer(recorder: Recorder, client: TestClient) -> None:
    """Make the calls of the Open Inference Protocol."""
    path: dict[str, Any] = {"name": "resnet"}
    image = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [PIXEL]}
    body = {"inputs": [image], "outputs": [{"name": "labels"}]}
    for name in ("server_metadata", "server_live", "server_ready", "all_statistics"):
        recorder.call(client, name, 200)
    for name in ("model_metadata", "model_ready", "model_statistics"):
        recorder.call(client, name, 200, path=path)
        recorder.call(client, name, 404, path={"name": "vgg"})
    for name in ("version_metadata", "version_ready", "version_statistics"):
        recorder.call(client, name, 200, path=path | {"version": 4})
        recorder.call(client, name, 404, path=path | {"version": 9})
    for name in ("infer", "infer_version"):
        recorder.call(client, name, 200, path=path | {"version": 4}, json=body)
        recorder.call(client, name, 404, path={"name": "vgg", "version": 4}, json=body)
        recorder.call(client, name, 422, path=path | {"version": 4}, json={"inputs": []})


def _train(recorder: Recorder, client: TestClient, job_id: str) -> None:
    path = {"job_id": job_id}
    _wait_for(client, f"/train/{job_id}", lambda job: job["finished"])
    recorder.call(client, "job", 200, path=path)
    recorder.call(client, "events", 200, path=path, headers={"Last-Event-ID": "1"})
    recorder.call(client, "output", 200, path=path)
    for name in ("metrics.jsonl", "curves.png", "published.json"):
        recorder.call(client, "file", 200, path=path | {"name": name})
    recorder.call(client, "file", 404, path=path | {"name": "checkpoint.pt"})
    recorder.call(client, "submit", 202, json=TRAINING, headers={"Idempotency-Key": "nightly-1"})
    recorder.call(client, "submit", 415, content=b"recipe=resnet", headers={"Content-Type": "text/plain"})
    recorder.call(client, "submit", 422, json={"recipe": "resnet", "overrides": {"epoch": 3}})
    recorder.call(client, "recipes", 200)
    recorder.call(client, "jobs", 200, params={"limit": 2})
    recorder.call(client, "jobs", 422, params={"limit": 0})
    (queued, _) = (job["id"] for job in client.get("/train").json())
    recorder.call(client, "cancel", 200, path={"job_id": queued})
    for name in ("job", "events", "output", "cancel"):
        recorder.call(client, name, 404, path={"job_id": "20260101-000000-00000000"})


def _wait_for(client: TestClient, url: str, condition: Callable[[Any], Any]) -> None:
    end = time.monotonic() + JOB_S
    while not condition(client.get(url).json()):
        assert time.monotonic() < end
        time.sleep(0.2)


def _lack(recorder: Recorder, client: TestClient) -> None:
    """Keep the 503 of the operations that need a live model or the job database."""
    file = {"file": ("rocket.jpg", PHOTO.read_bytes())}
    for name in ("predict", "explain"):
        recorder.call(client, name, 503, files=file)
    recorder.call(client, "ready", 503)
    recorder.call(client, "server_ready", 503)
    recorder.call(client, "evaluate", 503)
    recorder.call(client, "submit", 503, json=TRAINING)
    for name in ("jobs", "evaluations"):
        recorder.call(client, name, 503)
    for name in ("job", "cancel", "events", "output"):
        recorder.call(client, name, 503, path={"job_id": "x"})
    recorder.call(client, "file", 503, path={"job_id": "x", "name": "curves.png"})
    for name in ("evaluation", "cancel_evaluation", "evaluation_events"):
        recorder.call(client, name, 503, path={"evaluation_id": "x"})


@contextmanager
def _client(settings: Settings) -> Iterator[TestClient]:
    with make_local_client(create_app(settings)) as client:
        yield client


def _secret() -> Any:
    return Settings(api_keys=KEY).api_keys[0]  # type: ignore[arg-type]


def _break() -> Any:
    raise ValueError("an error of the examples")


def _shorten(value: Any) -> Any:
    """Cut long lists, and of the metrics keep those of the service."""
    match value:
        case dict():
            return {key: _shorten(each) for key, each in list(value.items())}
        case list():
            return [_shorten(each) for each in value[:MAX_ITEMS]]
        case str() if value.startswith("# HELP"):
            lines = [line for line in value.splitlines() if re.match(r"(# \w+ )?cifar100_(live|queued)|# EOF", line)]
            return "\n".join(lines) + "\n"
    return value


def outline(value: Any) -> Any:
    """Return a value without numbers, times, ids and what else differs between two machines or runs."""
    match value:
        case dict():
            return {key: None if key in _FREE else outline(each) for key, each in value.items()}
        case list():
            return [outline(each) for each in value[:1]]
        case bool() | None:
            return value
        case int() | float():
            return 0
        case str() if value.startswith(("id: ", "event: ")):
            events = [event.partition("\ndata: ") for event in value.strip().split("\n\n")]
            names = {(head.rpartition("event: ")[2], tuple(json.loads(data))) for head, _, data in events}
            return sorted(names)
        case str() if "\n" in value:
            return "lines"
        case str():
            return _CHANGING.sub("0", value)
    return value


def write(examples: Examples) -> None:
    """Write app/examples.json."""
    EXAMPLES.write_text(json.dumps(examples, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        write(collect(Path(temporary)))
