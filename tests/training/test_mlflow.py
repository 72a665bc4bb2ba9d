"""Test the records of runs on a real MLflow server, also while the server does not answer."""

import importlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from server import wait_for
from service import TINY

from training.dataset import Dataset
from training.loop import Epoch
from training.run import Run
from training.runtimes.engine import example_images
from training.runtimes.torchscript import TorchScriptEngine
from training.trackers import mlflow as tracker_module
from training.trackers.mlflow import MlflowTracker
from training.trackers.tracking import track

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (find_spec("mlflow") and find_spec("flask")), reason="the full MLflow is not installed"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an MLflow server."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow warns of its own code where warnings are errors
        importlib.import_module("mlflow.pyfunc")
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    settings = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    log = folder / "log"

    def answers() -> bool:
        try:
            return httpx.get(f"{address}/health").is_success
        except httpx.TransportError:
            return False

    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=os.environ | settings, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_for(answers, 120, log)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def run(finished_run: Run, published_store: Path, tmp_path: Path) -> Run:
    """A copy of the files of a published run that people read, with a picture."""
    run = Run(tmp_path / "a run")
    run.pictures.mkdir(parents=True)
    for file in (finished_run.recipe_file, finished_run.metrics_file, finished_run.publication_file):
        (run.path / file.name).write_bytes(file.read_bytes())
    Image.new("RGB", (8, 8)).save(run.pictures / "mistakes.png")
    return run


def api(server: str, call: str, **query: str) -> Any:
    return httpx.get(f"{server}/api/2.0/mlflow/{call}", params=query).raise_for_status().json()


def find_run(server: str, name: str) -> Any:
    body = {"experiment_ids": ["1"], "filter": f"attributes.run_name = '{name}'"}
    (found,) = httpx.post(f"{server}/api/2.0/mlflow/runs/search", json=body).raise_for_status().json()["runs"]
    return found


def values(server: str, run: Any, metric: str) -> list[tuple[int, float]]:
    history = api(server, "metrics/get-history", run_id=run["info"]["run_id"], metric_key=metric)
    return [(each.get("step", 0), each["value"]) for each in history["metrics"]]


def epoch(number: int) -> dict[str, Any]:
    return {
        "epoch": number, "epochs": 2, "learning_rate": 0.1, "train_loss": 2.0, "train_accuracy": 0.4,
        "split": "validation", "loss": 3.0, "top1": 0.5, "top5": 0.8, "images_per_s": 100.0, "seconds": 1.0,
        "remaining_s": 0.0, "event": "epoch"
    }  # fmt: skip


def test_a_run_is_recorded_with_a_model_that_gives_the_logits_of_the_service(
    server: str, run: Run, published_store: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import pyfunc

    version, published = published_store / "resnet" / "1", run.publication()
    assert published
    with track(run, dataset, server) as tracking:
        tracking.log_publication(published, version)
    found = find_run(server, "a run")
    assert found["info"]["status"] == "FINISHED"
    parameters = {each["key"]: each["value"] for each in found["data"]["params"]}
    assert parameters["width"] == "8"
    assert parameters["trainable"] == "stem,layer1,layer2,layer3,layer4,fc"
    tags = {each["key"]: each["value"] for each in found["data"]["tags"]}
    assert (tags["version"], tags["data"]) == ("resnet/1", dataset.fingerprint)
    (measured,) = run.epochs()
    assert values(server, found, "train_loss") == [(1, measured["train_loss"])]
    assert values(server, found, "validation_top1") == [(1, measured["top1"])]
    ticks = [line for line in run.metrics() if line["event"] == "tick"]
    assert values(server, found, "step_train_loss") == [(tick["step"], tick["loss"]) for tick in ticks]
    assert values(server, found, "exported_test_top1") == [(1, published.test.top1)]
    identity = {"run_id": found["info"]["run_id"]}
    names = {each["path"] for each in api(server, "artifacts/list", **identity)["files"]}
    assert {"recipe.json", "metrics.jsonl", "published.json", "card.json", "pictures"} <= names
    pictures = {each["path"] for each in api(server, "artifacts/list", path="pictures", **identity)["files"]}
    assert pictures == {"pictures/mistakes.png"}

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    model = pyfunc.load_model(f"runs:/{identity['run_id']}/model")
    assert str(model.metadata.signature.inputs) == "[Tensor('uint8', (-1, 3, 32, 32))]"
    assert str(model.metadata.signature.outputs) == "[Tensor('float32', (-1, 100))]"
    images = example_images(5).numpy()
    np.testing.assert_array_equal(model.predict(images), TorchScriptEngine(version / "model.pt")(images))


@pytest.mark.parametrize("silent", [False, True], ids=["refuses connections", "never answers"])
def test_a_server_that_does_not_answer_costs_one_warning_and_gets_the_records_of_the_resumed_run(
    silent: bool,
    server: str,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setattr(tracker_module, "STOP_S", 60.0)
    fingerprint, (first,) = "0" * 64, run.epochs()
    with socket.create_server(("127.0.0.1", 0)) as dead:
        address = f"127.0.0.1:{dead.getsockname()[1]}"
        if not silent:
            dead.close()
        tracker = MlflowTracker(run, f"http://user:secret@{address}", fingerprint)
        for _ in range(3):
            tracker.log_event(Epoch(**{name: value for name, value in epoch(1).items() if name != "event"}))
        tracker.close("failed")
    (warning,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert f"the MLflow server http://{address} lacks records of this run" in warning
    assert ("ConnectionRefusedError" in warning) != silent
    assert not (run.path / "mlflow.json").exists()

    for status in ("stopped", "finished"):
        tracker = MlflowTracker(run, server, fingerprint)
        tracker.close(status)
        found = api(server, "runs/get", run_id=json.loads((run.path / "mlflow.json").read_text())["run_id"])["run"]
        assert found["info"]["status"] == {"stopped": "KILLED", "finished": "FINISHED"}[status]
        run.record(epoch(2))
    assert values(server, found, "train_loss") == [(1, first["train_loss"]), (2, 2.0)]


def test_the_command_line_records_a_run_on_the_server_that_the_environment_names(server: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "training", "train", "resnet", *(f"{field}={TINY[field]}" for field in TINY)]
    command += ["--data", "synthetic:1", "--run", str(tmp_path / "typed"), "--models", str(tmp_path / "models")]
    environment = os.environ | {"MLFLOW_TRACKING_URI": server}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert "MLflow server" not in process.stderr  # no warning
    found = find_run(server, "typed")
    assert found["info"]["status"] == "FINISHED"
    assert {"key": "version", "value": "resnet/1"} in found["data"]["tags"]
