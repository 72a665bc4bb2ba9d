"""Test the moving average of weights: its values, resumed runs, and the published weights."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from training.averaging import WeightAverage
from training.dataset import Dataset
from training.export import restore
from training.loop import Epoch, train
from training.recipes import make_recipe
from training.run import Run

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
FIELDS = {"width": 8, "epochs": 2, "batch_size": 64, "validation_images": 100}


def started(path: Path, **fields: float) -> Run:
    run = Run(path)
    run.create(make_recipe("resnet", FIELDS | fields))
    return run


def test_the_mean_begins_with_the_weights_and_follows_them_by_the_decay() -> None:
    network = nn.BatchNorm1d(2)
    average = WeightAverage(network, decay=0.75)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([5.0, 1.0]))
        network.running_mean.fill_(4.0)  # type: ignore[union-attr]
    average.update()
    with average.apply():
        assert network.weight.tolist() == [2.0, 1.0]
        assert network.running_mean.tolist() == [1.0, 1.0]  # type: ignore[union-attr]
    assert network.weight.tolist() == [5.0, 1.0]


def test_training_itself_is_the_same_with_a_mean_and_the_mean_is_what_is_published(
    dataset: Dataset, tmp_path: Path
) -> None:
    plain, averaged = started(tmp_path / "plain"), started(tmp_path / "averaged", average_decay=0.9)
    for run in (plain, averaged):
        list(train(run.recipe(), dataset, run, CPU))
    weights, state = plain.load()["classifier"], averaged.load()
    assert "trained" not in plain.load()
    for name, value in state["trained"].items():
        assert torch.equal(value, weights[name]), name
    published, _ = restore(averaged, averaged.recipe(), dataset)
    name = "network.fc.weight"
    assert torch.equal(published.state_dict()[name], state["classifier"][name])
    assert not torch.equal(published.state_dict()[name], weights[name])
    assert averaged.epochs()[-1]["loss"] != plain.epochs()[-1]["loss"]


def test_a_run_with_a_mean_is_resumed_bit_for_bit(dataset: Dataset, tmp_path: Path) -> None:
    run = started(tmp_path / "whole", average_decay=0.9)
    events = train(run.recipe(), dataset, run, CPU)
    assert next(event for event in events if isinstance(event, Epoch)).epoch == 1
    resumed = Run(shutil.copytree(run.path, tmp_path / "resumed"))
    list(events)
    list(train(resumed.recipe(), dataset, resumed, CPU))
    for part in ("classifier", "trained"):
        for name, value in run.load()[part].items():
            assert torch.equal(value, resumed.load()[part][name]), name
