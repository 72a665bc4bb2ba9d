"""Test the TensorBoard events of a run: scalars, hyperparameters, the graph and pictures."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from training.dataset import Dataset
from training.loop import Epoch, Event
from training.recipes import make_recipe
from training.run import Run
from training.trackers.tensorboard import TensorBoardTracker
from training.trackers.tracking import track


def epoch(number: int, top1: float) -> Epoch:
    return Epoch(
        epoch=number, epochs=3, learning_rate=0.1, train_loss=2.0, train_accuracy=0.4, split="validation", loss=3.0,
        top1=top1, top5=0.8, images_per_s=100.0, seconds=1.0, remaining_s=0.0
    )  # fmt: skip


def read_events(run: Run) -> EventAccumulator:
    events = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    return events


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    run.create(make_recipe("resnet", {"width": 8, "weights": "none"}))
    return run


def test_tensorboard_shows_every_epoch_once_also_after_a_crash(run: Run, dataset: Dataset) -> None:
    def crashing() -> Iterator[Event]:
        yield epoch(1, 0.1)
        yield epoch(2, 0.2)
        raise OSError

    with pytest.raises(OSError), track(run, dataset, mlflow=None) as tracking:  # noqa: PT011
        list(tracking.follow(crashing()))
    again: list[Event] = [epoch(2, 0.25), epoch(3, 0.3)]
    with track(run, dataset, mlflow=None) as tracking:
        assert list(tracking.follow(again)) == again

    def scalars(tag: str) -> list[tuple[int, Any]]:
        return [(each.step, pytest.approx(each.value)) for each in events.Scalars(tag)]

    events = read_events(run)
    assert scalars("top-1/validation") == [(1, 0.1), (2, 0.25), (3, 0.3)]
    assert scalars("loss/train") == [(1, 2.0), (2, 2.0), (3, 2.0)]


def test_tensorboard_has_the_recipe_and_the_graph_of_the_network(run: Run) -> None:
    tracker = TensorBoardTracker(run, classes=100)
    tracker.log_event(epoch(1, 0.1))
    tracker.close("finished")
    events = read_events(run)
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    recipe = HParamsPluginData.FromString(content).session_start_info.hparams
    assert recipe["width"].number_value == 8
    assert recipe["network"].string_value == "resnet"
    content = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    compared = HParamsPluginData.FromString(content).experiment.metric_infos
    assert {metric.name.tag for metric in compared} == {"top-1/validation", "loss/validation"}
    graph = {node.name: node for node in events.Graph().node}
    assert graph["input/images"].attr["_output_shapes"].list.shape[0].dim[1].size == 3
    layers = [name for name, node in graph.items() if "ResNet[network]" in name and node.op.endswith("_convolution")]
    assert len(layers) > 20


def test_tensorboard_shows_the_pictures_of_an_export(run: Run, finished_run: Run, published_store: Path) -> None:
    run.pictures.mkdir()
    for width, name in ((8, "curves"), (9, "mistakes")):
        Image.new("RGB", (width, 7)).save(run.pictures / f"{name}.png")
    published = finished_run.publication()
    assert published
    tracker = TensorBoardTracker(run, classes=100)
    tracker.log_publication(published, published_store / "resnet" / "1")
    tracker.close("finished")
    events = read_events(run)
    shown = {
        tag: [(each.step, each.width, each.height) for each in events.Images(tag)] for tag in events.Tags()["images"]
    }
    assert shown == {"pictures/curves": [(1, 8, 7)], "pictures/mistakes": [(1, 9, 7)]}
