"""The training loop turns a recipe and a data set into a checkpointed run folder.

Every epoch draws batches on the device and runs forward, loss, backward and step for each. It then evaluates, records
metrics and saves a checkpoint. Each epoch seeds its random generators from (seed, epoch), so a checkpoint needs no
generator state. A resumed run gives the same weights as an uninterrupted one, bit for bit on a CPU.
"""

import copy
import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from training import augment, distillation, warm_start
from training.averaging import WeightAverage
from training.dataset import Dataset, Split, hold_out
from training.evaluate import evaluate, predict
from training.features import prepare
from training.networks import TransferResNet18, build
from training.optimizers import load_state, make_optimizer, set_learning_rate
from training.preparation import Preparation
from training.provenance import provenance
from training.recipes import Recipe
from training.resources import choose_dtype
from training.run import TICK_S, Run
from training.runtimes.cuda_graph import GraphedFunction
from training.schedule import learning_rate
from training.store import Store


class TrainingError(RuntimeError):
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
    """Estimated seconds until the end of the run."""
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
    """Estimated seconds until the end of the run."""
    event: str = "epoch"


Event = Preparation | Tick | Epoch
Prepared = TypeVar("Prepared")


@dataclass(frozen=True)
class Source:
    """The source of a training stage's batches: uint8 images or cached features.

    Attributes:
        batches: Function of a seeded generator and an epoch number. It yields pairs of a batch [B, C, H, W] and the
            row numbers int64 [B] of its images in the training split.
        evaluation: Images or features [M, H, W, C] that are evaluated after every epoch.
        inputs: Function from a batch [B, C, H, W] to the input of `head`: the images themselves or, if stages are
            frozen, their features. Mixup and cutmix combine these inputs.
        head: Function from these inputs to logits [B, classes].
    """

    batches: Callable[[torch.Generator, int], Iterator[tuple[Tensor, Tensor]]]
    evaluation: Tensor
    inputs: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor]

    def logits(self, batch: Tensor) -> Tensor:
        return self.head(self.inputs(batch))


def train(
    recipe: Recipe, dataset: Dataset, run: Run, device: torch.device, store: Store | None = None
) -> Generator[Event, None, None]:
    """Train a recipe, starting from the run's checkpoint if there is one.

    Args:
        store: Model store with the recipe's teachers and predecessor. A recipe without them needs no store.

    Yields:
        Progress, and the result of every epoch.

    Raises:
        TrainingError: The loss is no longer finite.
        StoreError: The recipe's teacher or predecessor cannot be used.
        WeightsError: The recipe's pretrained weights cannot be used.
        RunError: The run was started with other data.
    """
    torch.manual_seed(recipe.seed)
    torch.backends.cudnn.allow_tf32 = recipe.precision != "float32"
    torch.backends.cudnn.benchmark = True  # benchmarks the algorithms of each convolution
    resumed = run.checkpoint_file.exists()
    classifier = build(recipe.blank if resumed else recipe, len(dataset.classes))
    classifier = classifier.to(device).to(memory_format=torch.channels_last)
    network = classifier.network
    optimizer = make_optimizer(recipe, classifier)
    dtype = choose_dtype(recipe, device)
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype is not torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)

    finished = 0
    if resumed:
        state = run.load(dataset.fingerprint)
        classifier.load_state_dict(state["classifier"])
        load_state(optimizer, state["optimizer"])
        if state["scaler"]:  # empty if the epochs ran in another precision, on another machine
            scaler.load_state_dict(state["scaler"])
        finished = state["epoch"]
    elif recipe.predecessor:
        warm_start.load(classifier, recipe, _needed(store, recipe.weights), dataset)
    average = WeightAverage(classifier, recipe.average_decay) if recipe.average_decay else None
    if average and resumed:  # the checkpoint's classifier holds the averaged weights
        classifier.load_state_dict(state["trained"])
    run.forget_after(finished)

    split, eval_name, eval_split = splits(recipe, dataset)
    images, labels = to_device(split, device)
    eval_images, eval_labels = to_device(eval_split, device)
    steps = math.ceil(len(split) / recipe.batch_size)
    made_by = provenance()

    taught, teacher = None, None
    if recipe.teachers:
        load_teacher = partial(distillation.load_teacher, recipe, _needed(store, recipe.teacher), dataset, device)
        if recipe.teacher_view == "augmented":
            teacher = load_teacher()
        else:
            teaching = distillation.teach(recipe.teacher, load_teacher, images, dataset.fingerprint, run)
            taught = yield from recorded(teaching, run)

    def teacher_logits(inputs: Tensor, rows: Tensor) -> Tensor:
        """Return the teacher's logits for a batch, float [B, classes], or [B, 0] without a teacher."""
        if teacher is not None:
            return teacher(inputs)
        return labels.new_empty(len(rows), 0, dtype=torch.float32) if taught is None else taught[rows]

    def objective(logits: Tensor, rows: Tensor, answers: Tensor) -> Tensor:
        """Compute the loss against the labels and, if there is a teacher, against its logits."""
        loss = F.cross_entropy(logits, labels[rows], label_smoothing=recipe.label_smoothing)
        if not recipe.teachers:
            return loss
        learnt = distillation.loss(logits, answers, recipe.teacher_temperature)
        return torch.lerp(loss, learnt, recipe.teacher_weight)

    source = Source(partial(augment.batches, images, recipe), eval_images, lambda batch: batch, classifier)
    cropped = recipe.model_copy(update={"crop_padding": recipe.finetune_crop_padding})
    finetuning = replace(source, batches=partial(augment.batches, images, cropped))
    if isinstance(network, TransferResNet18) and network.frozen and finished < recipe.epochs:
        features = yield from recorded(prepare(recipe, classifier, images, eval_images, dtype), run)
        source = replace(source, inputs=lambda batch: network.features(classifier.preprocess(batch)), head=network.head)
        if features:
            source = replace(
                source,
                batches=partial(features.batches, recipe),
                evaluation=features.evaluation,
                inputs=lambda batch: batch.to(device).float(),
            )
        del features  # otherwise this name would keep their memory after the stage ends

    loss_sum, hits = torch.zeros(2, device=device)

    def learn(inputs: Tensor, rows: Tensor, answers: Tensor, *combination: Tensor) -> None:
        """Train one step on a batch and add to loss_sum and hits.

        For mixup and cutmix, `combination` holds the partners int64 [B] and the share of the batch itself, 0-1.
        """
        with autocast():
            logits = source.head(inputs)
            loss = objective(logits, rows, answers)
            if combination:
                partners, share = combination
                # A teacher with teacher_view=augmented saw the combined images, so its logits hold for both terms.
                theirs = answers if teacher is not None else answers[partners]
                loss = torch.lerp(objective(logits, rows[partners], theirs), loss, share)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        with autocast():  # Muon's matrix products run in half precision too
            scaler.step(optimizer)
        scaler.update()
        if average:
            average.update()
        loss_sum.add_(loss.detach() * len(rows))
        hits.add_((logits.detach().argmax(1) == labels[rows]).sum())

    # A gradient scaler reads back on the host whether gradients overflowed, which a CUDA graph cannot record.
    records = device.type == "cuda" and not scaler.is_enabled()
    train_on = GraphedFunction(learn) if records else learn
    for epoch in range(finished + 1, recipe.total_epochs + 1):
        if epoch > recipe.epochs and isinstance(network, TransferResNet18) and source is not finetuning:
            network.set_trainable(recipe.trainable_in(epoch))
            source = finetuning
            train_on = GraphedFunction(learn) if records else learn
        if epoch == recipe.eval_mode_after + 1:  # a CUDA graph keeps the training or evaluation mode of its recording
            train_on = GraphedFunction(learn) if records else learn
        started = ticked = time.perf_counter()
        seed = recipe.seed * 10_000 + epoch
        torch.manual_seed(seed)
        classifier.train(not recipe.trains_in_evaluation_mode(epoch))
        loss_sum.zero_()
        hits.zero_()
        seen = 0
        generator = torch.Generator().manual_seed(seed)
        for step, (batch, rows) in enumerate(source.batches(generator, epoch), start=1):
            rate = learning_rate(recipe, epoch - 1 + (step - 0.5) / steps)
            set_learning_rate(optimizer, rate)
            rows = rows.to(device, non_blocking=True)
            with autocast():
                inputs = source.inputs(batch)
            combination: tuple[Tensor, ...] = ()
            if recipe.combines:
                inputs, partners, share = augment.combine(inputs, recipe, generator)
                combination = partners, torch.full((), share, device=device)
            train_on(inputs, rows, teacher_logits(inputs, rows), *combination)
            seen += len(rows)
            now = time.perf_counter()
            if step == steps or now - ticked > TICK_S:
                mean_loss = loss_sum.item() / seen  # synchronizes with the GPU
                now = ticked = time.perf_counter()
                if not math.isfinite(mean_loss):
                    raise TrainingError(_non_finite(epoch, step, rate, epoch - 1))
                pace = (now - started) / step
                tick = Tick(
                    epoch=epoch,
                    epochs=recipe.total_epochs,
                    step=step,
                    steps=steps,
                    loss=mean_loss,
                    accuracy=hits.item() / seen,
                    images_per_s=seen / (now - started),
                    remaining_s=pace * (steps * (recipe.total_epochs - epoch + 1) - step),
                )
                run.record(asdict(tick))
                yield tick

        classifier.eval()
        with average.applied() if average else nullcontext():
            with autocast():
                result = evaluate(predict(source.logits, source.evaluation), eval_labels.cpu())
            to_publish = copy.deepcopy(classifier.state_dict())
        if not math.isfinite(result.loss):
            raise TrainingError(_non_finite(epoch, steps, rate, epoch - 1))
        seconds = time.perf_counter() - started
        outcome = Epoch(
            epoch=epoch,
            epochs=recipe.total_epochs,
            learning_rate=rate,
            train_loss=tick.loss,
            train_accuracy=tick.accuracy,
            split=eval_name,
            loss=result.loss,
            top1=result.top1,
            top5=result.top5,
            images_per_s=tick.images_per_s,
            seconds=seconds,
            remaining_s=seconds * (recipe.total_epochs - epoch),
        )
        # Metrics are recorded before the checkpoint is saved. After a crash in between, the resumed run drops the line
        # and repeats the epoch.
        run.record(asdict(outcome))
        run.save(
            {
                "epoch": epoch,
                "data": dataset.fingerprint,
                "provenance": made_by,
                "classifier": to_publish,
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
            }
            | ({"trained": classifier.state_dict()} if average else {})
        )
        yield outcome


def _needed(store: Store | None, versions: str) -> Store:
    if store is None:
        raise ValueError(f"the recipe needs {versions} from a model store; pass the store to train()")
    return store


def recorded(preparing: Generator[Preparation, None, Prepared], run: Run) -> Generator[Preparation, None, Prepared]:
    """Pass the progress of a preparation on, and record each report in the run's metrics."""
    while True:
        try:
            progress = next(preparing)
        except StopIteration as stop:
            prepared: Prepared = stop.value
            return prepared
        run.record(asdict(progress))
        yield progress


def splits(recipe: Recipe, dataset: Dataset) -> tuple[Split, str, Split]:
    """Return the training split, and the name and the images of the split evaluated after every epoch."""
    train, name, evaluation = dataset.train, "test", dataset.test
    if recipe.validation_images:
        name, (train, evaluation) = "validation", hold_out(dataset.train, recipe.validation_images)
    if len(train) % recipe.batch_size == 1:  # batch normalization fails on a last batch of one image
        train = train[: len(train) - 1]
    return train, name, evaluation


def to_device(split: Split, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return uint8 images [N, 32, 32, 3] and int64 labels [N] as tensors on the device."""
    return torch.from_numpy(split.images).to(device), torch.from_numpy(split.labels).to(device)


def _non_finite(epoch: int, step: int, rate: float, last_good: int) -> str:
    kept = f"the checkpoint of epoch {last_good} is kept" if last_good else "no epoch was finished"
    return (
        f"the loss is no longer finite (epoch {epoch}, step {step}, learning rate {rate:.3g}); {kept}. "
        "Start again with a lower learning_rate or precision=float32."
    )
