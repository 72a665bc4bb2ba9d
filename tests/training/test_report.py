"""Test the report: the pictures show the measured values."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image

from training import report
from training.dataset import Dataset
from training.run import Run, RunError

FOUR_CLASSES = ("animal", "animal", "plant", "plant")  # the superclasses of classes 0 to 3


def test_the_pictures_of_a_published_run_are_in_its_folder(
    finished_run: Run, published_store: Path, dataset: Dataset
) -> None:
    files = report.draw_figures(finished_run, dataset)
    assert [file.name for file in files] == [
        "curves.png", "superclasses.png", "reliability.png", "classes.png", "mistakes.png"
    ]  # fmt: skip
    for file in files:
        assert file.parent == finished_run.path / "pictures"
        with Image.open(file) as picture:
            assert min(picture.size) > 300
            assert len(picture.convert("L").getcolors() or ()) > 10


def test_a_run_that_was_not_exported_has_no_pictures(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has not been exported yet"):
        report.draw_figures(Run(tmp_path), dataset)


def confident(predictions: list[int], confidence: float = 0.9) -> torch.Tensor:
    """Return logits [N, 4] whose softmax gives `confidence` to each predicted class."""
    rest = (1 - confidence) / 3
    return torch.full((len(predictions), 4), rest).scatter(1, torch.tensor(predictions)[:, None], confidence).log()


def bars(axes: Axes) -> list[Rectangle]:
    return [patch for patch in axes.patches if isinstance(patch, Rectangle)]


def test_confusion_of_superclasses_is_in_percent_of_the_true_one() -> None:
    labels = torch.tensor([0, 0, 1, 1, 2, 3])
    logits = confident([0, 1, 0, 3, 2, 2])  # one of four animals is predicted as a plant
    (axes,) = report.plot_superclass_confusion(logits, labels, FOUR_CLASSES).axes
    assert np.asarray(axes.images[0].get_array()).tolist() == [[75, 25], [0, 100]]
    assert [text.get_text() for text in axes.texts] == ["75", "25", "100"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["animal", "plant"]


def test_reliability_shows_the_accuracy_of_each_confidence_before_and_after_calibration() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    calibrated = confident([0, 0, 0, 0], 0.75)
    before, after = report.plot_reliability(calibrated, labels, temperature=2.0).axes
    assert "ECE 0.00%" in after.get_title()
    assert "ECE 0.00%" not in before.get_title()
    heights = [bar.get_height() for bar in bars(after)]
    assert [height for height in heights if height] == [0.75]


def test_classes_are_ordered_by_their_accuracy(dataset: Dataset) -> None:
    labels = torch.from_numpy(dataset.test.labels)
    predicted = torch.where(labels == 7, 8, labels)
    axes = report.plot_class_accuracy(torch.nn.functional.one_hot(predicted, 100).float(), labels, dataset).axes
    names = [label.get_text() for each in axes for label in each.get_yticklabels()]
    assert names[-1] == dataset.classes[7].replace("_", " ")
    assert len(names) == 100
    assert [bar.get_width() for bar in bars(axes[-1])][-2:] == [100, 0]


def test_the_sheet_of_mistakes_begins_with_the_most_confident_one(dataset: Dataset) -> None:
    labels = torch.from_numpy(dataset.test.labels)
    logits = 9.0 * torch.nn.functional.one_hot(labels, 100)
    logits[5] = logits[5].roll(1) * 0.9
    logits[3] = logits[3].roll(1)
    sheet = report.plot_mistakes(logits, labels, dataset).axes
    true = dataset.classes[int(labels[3])].replace("_", " ")
    assert sheet[0].get_title().endswith(f"is {true}")
    assert (sheet[0].images[0].get_array() == dataset.test.images[3]).all()
    assert (sheet[1].images[0].get_array() == dataset.test.images[5]).all()
    assert sum(bool(each.images) for each in sheet) == 2
