"""The report draws figures of a run.

Input: a run folder and the logits of its exported model on the test set.
Output: PNG files in RUN/pictures.

The sheet of mistakes shows images of the data set. The other figures show measures only.
"""

from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from training.dataset import Dataset
from training.evaluate import CALIBRATION_BINS, compute_calibration_bins, evaluate, expected_calibration_error
from training.files import write_durably
from training.run import FIGURES, Run

DPI = 110
MISTAKES_GRID = (4, 8)  # rows and columns of the sheet of mistakes


def draw_figures(run: Run, dataset: Dataset) -> list[Path]:
    """Draw all figures of a published run.

    Returns:
        The PNG files, with the names in `run.FIGURES`.

    Raises:
        RunError: The run has not been exported yet.
    """
    logits, temperature = run.test_logits()
    labels = torch.from_numpy(dataset.test.labels)
    figures = (
        plot_curves(run),
        plot_superclass_confusion(logits, labels, dataset.superclasses),
        plot_reliability(logits, labels, temperature),
        plot_class_accuracy(logits, labels, dataset),
        plot_mistakes(logits, labels, dataset),
    )
    run.pictures.mkdir(exist_ok=True)
    files = []
    for name, figure in zip(FIGURES, figures, strict=True):
        content = BytesIO()
        figure.savefig(content, format="png", dpi=DPI)
        files.append(run.pictures / f"{name}.png")
        write_durably(files[-1], content.getvalue())  # a reader never sees a part of it
    return files


def plot_curves(run: Run) -> Figure:
    """Plot loss and top-1 accuracy of every epoch, on the training split and on the evaluated split."""
    epochs = run.epochs()
    figure = Figure((9, 3.6), layout="constrained")
    numbers = [epoch["epoch"] for epoch in epochs]
    pairs = (("loss", "train_loss", "loss"), ("top-1 accuracy, %", "train_accuracy", "top1"))
    for axes, (title, train, evaluated) in zip(figure.subplots(1, 2), pairs, strict=True):
        scale = 1 if train == "train_loss" else 100
        for key, name in ((train, "train"), (evaluated, epochs[-1]["split"])):
            axes.plot(numbers, [scale * epoch[key] for epoch in epochs], marker=".", label=name)
        _label_axes(axes, title, "epoch", "")
        axes.legend(frameon=False)
    return figure


def plot_superclass_confusion(logits: Tensor, labels: Tensor, superclasses: tuple[str, ...]) -> Figure:
    """Plot the confusion matrix of the superclasses (rows: true, columns: predicted), in % of the row."""
    names = sorted(set(superclasses))
    group = torch.tensor([names.index(superclass) for superclass in superclasses])
    pairs = group[labels] * len(names) + group[logits.argmax(1)]
    counts = torch.bincount(pairs, minlength=len(names) ** 2).view(len(names), len(names))
    shares = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
    figure = Figure((9, 8.4), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=100)
    ticks = [name.replace("_", " ") for name in names]
    axes.set_xticks(range(len(names)), ticks, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(names)), ticks, fontsize=8)
    for row, column in (shares >= 1).nonzero().tolist():
        value = shares[row, column].item()
        axes.text(
            column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color="white" if value > 50 else "black"
        )
    _label_axes(axes, "superclasses: % of the images of a row taken for a column", "predicted", "true", grid=False)
    return figure


def plot_reliability(logits: Tensor, labels: Tensor, temperature: float) -> Figure:
    """Plot accuracy against confidence, before and after calibration (Guo et al. 2017, arXiv:1706.04599)."""
    figure = Figure((8, 3.9), layout="constrained")
    variants = (("uncalibrated", logits * temperature), (f"temperature {temperature:.2f}", logits))
    for axes, (title, values) in zip(figure.subplots(1, 2, sharey=True), variants, strict=True):
        bins = compute_calibration_bins(values, labels)
        axes.bar(bins.confidence.numpy(), bins.accuracy.numpy(), width=0.9 / CALIBRATION_BINS, color="tab:blue")
        axes.plot([0, 1], [0, 1], color="black", linewidth=1, linestyle="--")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        _label_axes(axes, f"{title}: ECE {expected_calibration_error(values, labels):.2%}", "confidence", "accuracy")
    return figure


def plot_class_accuracy(logits: Tensor, labels: Tensor, dataset: Dataset) -> Figure:
    """Plot the top-1 accuracy of every class, from the best to the worst."""
    accuracy = np.array(evaluate(logits, labels).per_class, float)  # a class without images is NaN and has no bar
    order = np.argsort(-accuracy, kind="stable")
    figure = Figure((9, 9), layout="constrained")
    columns = np.array_split(order, 2)
    for axes, classes in zip(figure.subplots(1, 2, sharex=True), columns, strict=True):
        axes.barh(range(len(classes)), 100 * accuracy[classes], color="tab:blue")
        axes.set_yticks(range(len(classes)), [dataset.classes[each].replace("_", " ") for each in classes], fontsize=7)
        axes.set_ylim(len(classes) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        _label_axes(axes, "", "top-1 accuracy, %", "")
    return figure


def plot_mistakes(logits: Tensor, labels: Tensor, dataset: Dataset) -> Figure:
    """Show the wrong predictions with the highest confidence, with their images."""
    confidence, predicted = logits.softmax(1).max(1)
    confidence[predicted == labels] = 0
    rows, columns = MISTAKES_GRID
    figure = Figure((1.5 * columns, 1.9 * rows), layout="constrained")
    wrong = int((predicted != labels).sum())
    worst = confidence.topk(min(rows * columns, wrong)).indices.tolist()
    cells: NDArray[np.object_] = figure.subplots(rows, columns).ravel()
    for axes in cells:
        axes.set_axis_off()
    for axes, image in zip(cells, worst, strict=False):
        axes.imshow(dataset.test.images[image])
        answer, truth = (dataset.classes[int(each[image])].replace("_", " ") for each in (predicted, labels))
        axes.set_title(f"{answer} {confidence[image].item():.0%}\nis {truth}", fontsize=7)
    return figure


def _label_axes(axes: Axes, title: str, x: str, y: str, grid: bool = True) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(alpha=0.25)
