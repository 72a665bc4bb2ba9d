"""The training loop turns a recipe and a data set into a checkpointed run folder.

Every epoch draws batches on the device and performs a `TrainStep` on each. It then evaluates, records metrics and saves
a checkpoint. Each epoch seeds its random generators from (seed, epoch), so a checkpoint needs no generator state. A
resumed run gives the same weights as an uninterrupted one, bit for bit on a CPU.
"""

import copy
import math
import time
from collections.abc import Generator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from training import distillation, warm_start
from training.dataset import Dataset, Split, hold_out
from training.errors import ReportedError
from training.evaluate import evaluate, predict
from training.networks import Classifier, build
from training.phase import make_phase
from training.phase_report import PhaseReport, record_reports
from training.process_group import ALONE, ProcessGroup
from training.provenance import collect_provenance
from training.recipes import Recipe, RecipeError
from training.resources import choose_dtype
from training.run import TICK_S, Run, RunPhase
from training.schedule import learning_rate
from training.step import TrainStep
from training.store import Evaluation, Store


class TrainingError(ReportedError, RuntimeError):
    """The loss is no longer finite. The last checkpoint remains valid."""


@dataclass(frozen=True)
class Tick:
    """A progress report within an epoch."""

    epoch: int
    """Number of the epoch, counted from 1."""
    epochs: int
    step: int
    """Steps done in this epoch."""
    steps: int
    """Steps per epoch."""
    loss: float
    """Mean training loss since the start of the epoch."""
    accuracy: float
    """Training top-1 since the start of the epoch, 0-1. For mixup and cutmix it compares with the batch's own labels,
    not with those of the partners."""
    images_per_s: float
    remaining_s: float
    """Estimated seconds until the end of the run, including the evaluations and the export. Above 0."""
    phase: RunPhase = "training"
    event: str = "tick"


@dataclass(frozen=True)
class Epoch:
    """The result of an epoch."""

    epoch: int
    """Number of the epoch, counted from 1."""
    epochs: int
    learning_rate: float
    """Learning rate of the last step."""
    train_loss: float
    train_accuracy: float
    split: str
    """Evaluated split: "validation" if the recipe holds images out, otherwise "test", which never selects a model."""
    loss: float
    top1: float
    top5: float
    images_per_s: float
    seconds: float
    """Wall time of the epoch, including its evaluation."""
    remaining_s: float
    """Estimated seconds until the end of the run, including the export. Above 0."""
    phase: RunPhase = "training"
    event: str = "epoch"


Event = PhaseReport | Tick | Epoch


def train(
    recipe: Recipe,
    dataset: Dataset,
    run: Run,
    device: torch.device,
    store: Store | None = None,
    group: ProcessGroup = ALONE,
) -> Generator[Event, None, None]:
    """Train a recipe, starting from the run's checkpoint if there is one.

    Args:
        recipe: Recipe of the run.
        dataset: Data set of the run.
        run: Folder of the run. It receives metrics and checkpoints.
        device: Device that trains.
        store: Model store with the recipe's teachers and predecessor. A recipe without them needs no store.
        group: Processes that train the run together. All of them call this function, all but the first one with a
            `FollowedRun`. The first one alone yields the results of epochs.

    Yields:
        Progress, and the result of every epoch.

    Raises:
        RecipeError: The batches are too small for the group.
        TrainingError: The loss is no longer finite.
        StoreError: The recipe's teacher or predecessor cannot be used.
        EngineError: The runtime cannot compute the recipe's teacher.
        WeightsError: The recipe's pretrained weights cannot be used.
        RunError: The run was started with other data.
    """
    torch.manual_seed(recipe.seed)
    torch.backends.cudnn.allow_tf32 = recipe.precision != "float32"
    torch.backends.cudnn.benchmark = True  # benchmarks the algorithms of each convolution
    checkpoint = run.load(dataset.fingerprint) if run.checkpoint_file.exists() else None
    finished = checkpoint["epoch"] if checkpoint else 0
    run.drop_metrics_after(finished)
    loading = PhaseReport("loading", f"loading the images and the weights onto {device}")
    run.record(asdict(loading))
    yield loading
    classifier = _make_classifier(recipe, dataset, device, store, resumed=checkpoint is not None)
    split, evaluated_split, evaluation = make_splits(recipe, dataset, group.size)
    images, labels = to_device(split, device)
    evaluation_images, _ = to_device(evaluation, device)
    dtype = choose_dtype(recipe, device)
    step = TrainStep(recipe, classifier, labels, dtype, group)
    if checkpoint is not None:
        step.load_state_dict(checkpoint)
    fixed_state = {"data": dataset.fingerprint, "provenance": collect_provenance()}
    with group.first_on_machine():
        yield from record_reports(_prepare_teacher(step, dataset, images, run, store), run)

    for epoch in range(finished + 1, recipe.total_epochs + 1):
        if epoch in (finished + 1, recipe.epochs + 1):
            reports = make_phase(recipe, epoch, classifier, images, evaluation_images, dtype)
            with group.first_on_machine():
                phase = yield from record_reports(reports, run)
            step.begin_phase(phase)
        started = time.perf_counter()
        tick = yield from train_epoch(step, epoch, run)
        if not group.is_first:
            continue
        trained = time.perf_counter()
        weights, measures = evaluate_epoch(step, tick, torch.from_numpy(evaluation.labels))
        finished_at = time.perf_counter()
        times = finished_at - started, finished_at - trained
        result = _summarize(tick, step.learning_rate, evaluated_split, measures, *times)
        # Metrics are recorded before the checkpoint is saved. After a crash in between, the resumed run drops the line
        # and repeats the epoch.
        run.record(asdict(result))
        run.save({"epoch": epoch, "classifier": weights} | fixed_state | step.state_dict())
        yield result


def train_epoch(step: TrainStep, epoch: int, run: Run) -> Generator[Tick, None, Tick]:
    """Train one epoch.

    Until the last report, the loss and the accuracy are those of this process's share of the batches.

    Args:
        step: Optimization step of the run.
        epoch: Number of the epoch, counted from 1.
        run: Run that records the progress.

    Yields:
        Progress, every `TICK_S` seconds and at the end of the epoch.

    Returns:
        The progress at the end of the epoch.

    Raises:
        TrainingError: The loss is no longer finite.
    """
    recipe, images = step.recipe, len(step.labels)
    steps = math.ceil(images / recipe.batch_size)
    started = reported = time.perf_counter()
    seed = recipe.seed * 10_000 + epoch
    torch.manual_seed(seed + step.group.rank * 2**32)  # dropout differs between the processes
    generator = torch.Generator().manual_seed(seed)
    step.begin_epoch(epoch)
    for number, (batch, indices) in enumerate(step.phase.batches(generator, epoch), start=1):
        step(batch, indices, learning_rate(recipe, epoch - 1 + (number - 0.5) / steps), generator)
        if number < steps and time.perf_counter() - reported <= TICK_S:
            continue
        if number == steps:
            step.add_up()
        seen = min(number * recipe.batch_size, images)
        loss = step.loss_sum.item() / step.seen  # synchronizes with the GPU
        reported = time.perf_counter()
        seconds = reported - started
        tick = Tick(
            epoch=epoch,
            epochs=recipe.total_epochs,
            step=number,
            steps=steps,
            loss=loss,
            accuracy=step.correct.item() / step.seen,
            images_per_s=seen / seconds,
            remaining_s=seconds / seen * _remaining_images(step, epoch, seen),
        )
        _require_finite(loss, tick, step.learning_rate)
        run.record(asdict(tick))
        yield tick
    return tick


def _remaining_images(step: TrainStep, epoch: int, seen: int) -> float:
    """Return the work until the end of a run, as a number of training images.

    The evaluation of an image is a forward pass, which takes about a third of a training step. The export is counted as
    one more evaluation.

    Args:
        step: Optimization step of the run.
        epoch: Number of the epoch, counted from 1.
        seen: Images trained on in this epoch.
    """
    epochs = step.recipe.total_epochs - epoch + 1
    return epochs * len(step.labels) - seen + (epochs + 1) * len(step.phase.evaluation) / 3


def evaluate_epoch(step: TrainStep, tick: Tick, labels: Tensor) -> tuple[dict[str, Tensor], Evaluation]:
    """Evaluate the weights after an epoch: the averaged weights, if the recipe averages them.

    Args:
        step: Optimization step of the run.
        tick: Progress at the end of the epoch.
        labels: int64 [M] on the CPU, labels of the images that the phase evaluates.

    Returns:
        A copy of the evaluated weights, and their measures.

    Raises:
        TrainingError: The loss is not finite.
    """
    step.classifier.eval()
    with step.average.apply() if step.average else nullcontext():
        with step.autocast():
            measures = evaluate(predict(step.phase.compute_logits, step.phase.evaluation), labels)
        weights = copy.deepcopy(step.classifier.state_dict())
    _require_finite(measures.loss, tick, step.learning_rate)
    return weights, measures


def _make_classifier(
    recipe: Recipe, dataset: Dataset, device: torch.device, store: Store | None, resumed: bool
) -> Classifier:
    """Make the classifier of a run with its initial weights. A resumed run gets random weights."""
    classifier = build(recipe.from_scratch if resumed else recipe, len(dataset.classes))
    classifier = classifier.to(device).to(memory_format=torch.channels_last)
    if recipe.predecessor and not resumed:
        warm_start.load(classifier, recipe, _require_store(store, recipe.weights), dataset)
    return classifier


def _prepare_teacher(
    step: TrainStep, dataset: Dataset, images: Tensor, run: Run, store: Store | None
) -> Generator[PhaseReport, None, None]:
    """Give the step its teacher, or a teacher's logits on all training images."""
    recipe = step.recipe
    if not recipe.teachers:
        return
    store = _require_store(store, recipe.teacher)
    load_teacher = partial(distillation.load_teacher, recipe, store, dataset, images.device)
    if recipe.teacher_view == "augmented":
        step.teacher = load_teacher()
    else:
        step.teacher_logits = yield from distillation.compute_teacher_logits(
            recipe.teacher, load_teacher, images, dataset.fingerprint, run
        )


def _require_store(store: Store | None, versions: str) -> Store:
    if store is None:
        raise ValueError(f"the recipe needs {versions} from a model store; pass the store to train()")
    return store


def _require_finite(loss: float, tick: Tick, rate: float) -> None:
    """Check a loss.

    Raises:
        TrainingError: The loss is not finite.
    """
    if math.isfinite(loss):
        return
    last = tick.epoch - 1
    kept = f"the checkpoint of epoch {last} is kept" if last else "no epoch was finished"
    raise TrainingError(
        f"the loss is no longer finite (epoch {tick.epoch}, step {tick.step}, learning rate {rate:.3g}); {kept}. "
        "Start again with a lower learning_rate or precision=float32."
    )


def _summarize(tick: Tick, rate: float, split: str, measures: Evaluation, seconds: float, evaluation_s: float) -> Epoch:
    """Return the result of an epoch. The export after the last epoch is estimated to take as long as an evaluation."""
    return Epoch(
        epoch=tick.epoch,
        epochs=tick.epochs,
        learning_rate=rate,
        train_loss=tick.loss,
        train_accuracy=tick.accuracy,
        split=split,
        loss=measures.loss,
        top1=measures.top1,
        top5=measures.top5,
        images_per_s=tick.images_per_s,
        seconds=seconds,
        remaining_s=seconds * (tick.epochs - tick.epoch) + evaluation_s,
    )


def make_splits(recipe: Recipe, dataset: Dataset, processes: int = 1) -> tuple[Split, str, Split]:
    """Return the training split with the extra images, and the name and the images of the split to evaluate.

    A rest of fewer than two images per process is left out, because batch normalization fails on one image.

    Args:
        recipe: Recipe of the run.
        dataset: Data set of the run.
        processes: Number of processes that share each batch.

    Raises:
        RecipeError: A batch has fewer than two images per process.
    """
    if recipe.batch_size < 2 * processes:
        raise RecipeError(
            f"batch_size={recipe.batch_size} is too small for {processes} processes; give at least {2 * processes}"
        )
    train, name, evaluation = dataset.train, "test", dataset.test
    if recipe.validation_images:
        name, (train, evaluation) = "validation", hold_out(dataset.train, recipe.validation_images)
    if dataset.extra:
        extra = dataset.extra.split
        train = Split(np.concatenate((train.images, extra.images)), np.concatenate((train.labels, extra.labels)))
    rest = len(train) % recipe.batch_size
    if rest < 2 * processes:
        train = train[: len(train) - rest]
    return train, name, evaluation


def to_device(split: Split, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return uint8 images [N, 32, 32, 3] and int64 labels [N] as tensors on the device."""
    return torch.from_numpy(split.images).to(device), torch.from_numpy(split.labels).to(device)
