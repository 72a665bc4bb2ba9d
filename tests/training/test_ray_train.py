"""Test runs that workers of Ray Train train, in a cluster on this machine."""

import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import find_processes
from typer.testing import CliRunner

from training import loop
from training.__main__ import cli
from training.dataset import Dataset
from training.loop import Epoch, Tick, TrainingError
from training.phase_report import PhaseReport
from training.recipes import make_recipe
from training.run import Run

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("training.ray_train", exc_type=ImportError)
    from training import ray_train
    from training.ray_cluster import ClusterError, connect

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

FIELDS = {"width": 8, "batch_size": 32, "learning_rate": 0.05, "validation_images": 100, "int8": False}


def start_run(folder: Path, **changes: Any) -> Run:
    run = Run(folder)
    run.create(make_recipe("resnet", FIELDS | changes))
    return run


def train(run: Run, dataset: Dataset, count: int) -> Iterator[Any]:
    return ray_train.train(run.recipe(), dataset, run, None, ray_train.Workers(count))


def list_workers() -> list[int]:
    """Return the ids of the processes that train."""
    return find_processes(Path("RayTrainWorker"))


def test_one_worker_trains_the_weights_of_a_local_run(tmp_path: Path, dataset: Dataset) -> None:
    local, remote = start_run(tmp_path / "local", epochs=2), start_run(tmp_path / "remote", epochs=2)
    expected = [event for event in loop.train(local.recipe(), dataset, local, torch.device("cpu")) if event]
    events = list(train(remote, dataset, 1))
    assert {type(event) for event in events} == {PhaseReport, Tick, Epoch} == {type(event) for event in expected}
    one, other = local.load()["classifier"], remote.load()["classifier"]
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not (remote.path / "ray").exists()


def test_a_run_survives_the_death_of_a_worker(tmp_path: Path, dataset: Dataset) -> None:
    run = start_run(tmp_path / "run", epochs=4)
    killed = list[int]()
    messages = list[str]()
    for event in train(run, dataset, 2):
        if isinstance(event, Epoch) and event.epoch == 2 and not killed:
            killed = list_workers()
            assert len(killed) == 2
            with suppress(ProcessLookupError):
                os.kill(killed[1], signal.SIGKILL)
        if isinstance(event, PhaseReport):
            messages.append(event.message)
    assert any("a worker has failed; new workers continue" in message for message in messages)
    assert [epoch["epoch"] for epoch in run.epochs()] == [1, 2, 3, 4]
    assert run.load()["epoch"] == 4


def test_an_error_that_a_new_worker_would_have_too_ends_the_run(tmp_path: Path, dataset: Dataset) -> None:
    run = start_run(tmp_path / "run", epochs=1, learning_rate=100.0, optimizer="sgd", precision="float16")
    with pytest.raises(TrainingError, match="no longer finite"):
        list(train(run, dataset, 2))


def test_workers_that_fail_again_and_again_end_the_run(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = list[int]()

    def fail(_: Any) -> None:
        attempts.append(1)
        raise RuntimeError("a node is gone\nthe reason")

    monkeypatch.setattr("training.ray_train.TorchTrainer.fit", fail)
    with pytest.raises(ray_train.WorkersFailed, match="have failed 3 times in succession: the reason; the last check"):
        list(train(start_run(tmp_path / "run"), dataset, 2))
    assert len(attempts) == 3


def test_a_cluster_that_does_not_exist_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(ClusterError, match=r"cannot connect to the Ray cluster 127\.0\.0\.1:1: [^\n]+$"):
        connect("127.0.0.1:1")


@pytest.mark.parametrize(
    ("options", "missing", "message"),
    [
        (["--workers", "2"], False, "--workers needs --engine ray"),
        (["--engine", "ray"], True, "--engine ray needs the extra ray: pip install 'cifar100[ray]'"),
    ],
)
def test_wrong_options_are_refused(
    options: list[str], missing: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing:
        monkeypatch.setitem(__import__("sys").modules, "training.ray_train", None)
    done = CliRunner().invoke(cli, ["train", "resnet", *options])
    assert done.exit_code == 2
    assert message in done.output
