"""`MlflowTracker` mirrors a run folder on an MLflow server.

Input: the files of the run, and the published version.
Output: an MLflow run with parameters, metrics, files, and a model with a signature. RUN/mlflow.json has its id and
lists the data that the server has already, so that a resumed run continues there.
"""

import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel

from training.files import write_durably
from training.loop import Event
from training.provenance import collect_provenance
from training.recipes import format_value
from training.run import Publication, Run
from training.runtimes.engine import example_images
from training.store import MODEL, Evaluation, ModelCard
from training.text import shorten
from training.trackers.tracker import Status, Tracker

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

EXPERIMENT = "cifar100"
"""Experiment of the MLflow runs, unless MLFLOW_EXPERIMENT_NAME names another."""
POSITION = "mlflow.json"
MODEL_CODE = Path(__file__).with_name("mlflow_model.py")

MAX_METRICS = 1000  # MLflow's limit for one request
MAX_METRICS_OF_A_LINE = 8
CLOSE_S = 120.0  # to send the missing data at the end of a run
STOP_S = 2.0  # the same if the run is stopped: a supervisor kills a process 3 s after SIGTERM
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the next event of the run is the next attempt
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_STATUSES: dict[Status, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MlflowTracker(Tracker):
    """The records of a run on an MLflow server. A thread of their own sends them.

    A server that does not answer costs one warning and, at the end of the run, at most `CLOSE_S` seconds. Each event
    is another attempt, which sends everything that the server lacks.

    Args:
        run: The run.
        uri: Tracking URI of the server.
        data: Fingerprint of the data set.
    """

    def __init__(self, run: Run, uri: str, data: str):
        self._mirror = MlflowMirror(run, uri, data)
        self._published: tuple[Publication, Path] | None = None
        self._status: Status | None = None
        self._changed = threading.Event()
        self._warned = False
        self._thread = threading.Thread(target=self._send, name="mlflow", daemon=True)
        self._thread.start()

    def log_event(self, event: Event) -> None:  # noqa: ARG002  the mirror reads it in the run's metrics
        """Wake the thread, which sends the new metrics of the run."""
        self._changed.set()

    def log_publication(self, published: Publication, version: Path) -> None:
        """Wake the thread, which sends the published version."""
        self._published = published, version
        self._changed.set()

    def close(self, status: Status) -> None:
        """Wait until the server has the whole run, until it does not answer, or for `CLOSE_S` or `STOP_S` seconds."""
        self._status = status
        self._changed.set()
        self._thread.join(STOP_S if status == "stopped" else CLOSE_S)

    def _send(self) -> None:
        status = None
        while status is None:
            self._changed.wait()
            self._changed.clear()  # a later change than those read below sets it again
            status, published = self._status, self._published
            try:
                self._mirror.send_metrics()
                if published:
                    self._mirror.send_publication(*published)
                if status:
                    self._mirror.end(status)
            except Exception as error:  # the libraries below raise errors of many types
                self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            cause: BaseException = error
            while deeper := cause.__cause__ or cause.__context__:
                cause = deeper
            log.warning(
                "the MLflow server %s lacks records of this run (%s: %s); training continues, and the records are sent "
                "once the server answers, or later with --resume --mlflow",
                self._mirror.server,
                type(cause).__name__,
                shorten(hide_password(str(cause)), 200),
            )


class Position(BaseModel):
    """The parts of a run that an MLflow server has."""

    server: str
    """Tracking URI of the server, without a password."""
    run_id: str
    """Id of the MLflow run."""
    lines: int = 0
    """Number of lines of metrics that the server has, counted from the first one."""
    version: str | None = None
    """Published version that the server has, such as resnet/5."""


class MlflowMirror:
    """The MLflow run of a run folder. Every method may raise errors of any type, and can be called again after one.

    Args:
        run: The run.
        uri: Tracking URI of the server.
        data: Fingerprint of the data set.
    """

    def __init__(self, run: Run, uri: str, data: str):
        self.server = hide_password(uri)
        self._run = run
        self._uri = uri
        self._data = data
        self._client: MlflowClient | None = None
        self._file = run.path / POSITION

    def send_metrics(self) -> None:
        """Send the lines of metrics that the server lacks. The first measures create the MLflow run."""
        position = self._load()
        batch: list[Any] = []
        sent = position.lines if position else 0
        for number, line in self._run.numbered_metrics(after=sent):
            batch += _list_metrics(line)
            if len(batch) > MAX_METRICS - MAX_METRICS_OF_A_LINE:
                self._send_batch(batch, number)
                batch = []
        if batch:
            self._send_batch(batch, number)

    def send_publication(self, published: Publication, version: Path) -> None:
        """Send the published version, unless the server has it: its card, its measures, and `model.pt` as a model.

        Args:
            published: The publication.
            version: Folder of the version in the model store.
        """
        client, position = self._connect()
        label = f"{published.model}/{published.version}"
        if position.version == label:
            return
        card = ModelCard.model_validate_json((version / "card.json").read_bytes())
        step = published.epoch or 0
        measures = list(_list_measures("test", published.test, step))
        if card.int8 and card.int8.test:
            measures += _list_measures("test_int8", card.int8.test, step)
        client.log_batch(position.run_id, metrics=measures)
        client.log_artifact(position.run_id, str(version / "card.json"))
        _log_model(position.run_id, version / MODEL, len(card.classes), step)
        client.set_tag(position.run_id, "version", label)
        self._save(position.model_copy(update={"version": label}))

    def end(self, status: Status) -> None:
        """Set the status of the MLflow run and send the files of the run. A run without measures has no MLflow run."""
        if not self._load():
            return
        client, position = self._connect()
        client.set_terminated(position.run_id, _STATUSES[status])
        for file in self._run.files().values():
            folder = None if file.parent == self._run.path else file.parent.name
            client.log_artifact(position.run_id, str(file), folder)

    def _connect(self) -> tuple["MlflowClient", Position]:
        """Return a client and the position. The first call creates the MLflow run, or reopens it."""
        position = self._load()
        if self._client and position:
            return self._client, position
        os.environ |= {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
        import mlflow
        from mlflow.entities import Param

        logging.getLogger("mlflow").setLevel(logging.ERROR)
        mlflow.set_tracking_uri(self._uri)
        experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT)
        client = mlflow.MlflowClient()
        if not position:
            created = client.create_run(experiment.experiment_id, run_name=self._run.path.name, tags=self._list_tags())
            position = Position(server=self.server, run_id=created.info.run_id)
            self._save(position)
        client.update_run(position.run_id, status="RUNNING")
        known = client.get_run(position.run_id).data.params  # parameters of an MLflow run cannot change
        fields = self._run.recipe().public_fields
        missing = [Param(name, format_value(value)) for name, value in fields.items() if name not in known]
        client.log_batch(position.run_id, params=missing)
        self._client = client
        return client, position

    def _list_tags(self) -> dict[str, str]:
        provenance = collect_provenance()
        tags = {"data": self._data, "device": provenance["device"], "mlflow.source.name": "python -m training"}
        tags |= {f"{library} version": number for library, number in provenance["libraries"].items()}
        return tags | ({"mlflow.source.git.commit": provenance["commit"]} if provenance["commit"] else {})

    def _send_batch(self, batch: list[Any], lines: int) -> None:
        client, position = self._connect()
        client.log_batch(position.run_id, metrics=batch)
        self._save(position.model_copy(update={"lines": lines}))

    def _load(self) -> Position | None:
        """Return the position on this server, or None before the first records there."""
        if not self._file.exists():
            return None
        position = Position.model_validate_json(self._file.read_bytes())
        return position if position.server == self.server else None

    def _save(self, position: Position) -> None:
        write_durably(self._file, position.model_dump_json(indent=1).encode())


def hide_password(text: str) -> str:
    """Remove user names and passwords from the URLs in a text."""
    return re.sub(r"(?<=://)[^/\s@]*@", "", text)


def _list_metrics(line: dict[str, Any]) -> Iterator[Any]:
    """List the measures of a line of metrics as MLflow metrics: by epoch, and by step within epochs."""
    match line["event"]:
        case "epoch":
            split, epoch = line["split"], line["epoch"]
            for name in ("train_loss", "train_accuracy", "learning_rate", "images_per_s", "seconds"):
                yield _make_metric(name, line[name], epoch)
            for name in ("loss", "top1", "top5"):
                yield _make_metric(f"{split}_{name}", line[name], epoch)
        case "tick":
            step = (line["epoch"] - 1) * line["steps"] + line["step"]
            yield _make_metric("step_train_loss", line["loss"], step)
            yield _make_metric("step_train_accuracy", line["accuracy"], step)


def _list_measures(prefix: str, measures: Evaluation, step: int) -> Iterator[Any]:
    for name in ("top1", "top5", "loss", "ece"):
        yield _make_metric(f"exported_{prefix}_{name}", getattr(measures, name), step)


def _make_metric(name: str, value: float, step: int) -> Any:
    from mlflow.entities import Metric

    return Metric(name, value, int(time.time() * 1000), step)


def _log_model(run_id: str, model: Path, classes: int, step: int) -> None:
    """Log an exported model for `mlflow.pyfunc.load_model`."""
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    pixels = TensorSpec(np.dtype(np.uint8), (-1, 3, 32, 32))
    logits = TensorSpec(np.dtype(np.float32), (-1, classes))
    Model.log(
        artifact_path=None,
        flavor=pyfunc,
        name="model",
        run_id=run_id,
        step=step,
        python_model=str(MODEL_CODE),
        artifacts={"model": str(model)},
        signature=ModelSignature(Schema([pixels]), Schema([logits])),
        input_example=example_images(1).numpy(),
        pip_requirements=[f"{name}=={installed_version(name).partition('+')[0]}" for name in ("torch", "numpy")],
    )
