"""The work of the command line: training, exporting, measuring and fitting, with progress on stderr.

`training.__main__` declares the commands. It imports this module, and with it PyTorch, only when a command runs.
"""

import os
import signal
import threading
import time
from collections.abc import Collection, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import typer
from pydantic import BaseModel

from training import cascade, loop, report
from training import extra_data as extra
from training.console import STOPPED, err, working
from training.dataset import DataError, Dataset, Split, hold_out, load_dataset, sample_rows
from training.errors import ReportedError
from training.evaluate import evaluate, fit_familiarity, predict
from training.export import CPU, export
from training.loop import Event, to_device
from training.networks.transfer import WeightsError
from training.phase_report import PhaseReport, predict_with_reports, record_reports
from training.process_group import ALONE, ProcessGroup
from training.progress import show_progress
from training.recipes import Recipe, RecipeError
from training.resources import default_device, describe_peak_memory
from training.run import FollowedRun, Publication, Run
from training.runtimes import Form, Runtime, selection
from training.runtimes.engine import Engine, EngineError
from training.runtimes.openvino import INT8
from training.store import MODEL, Evaluation, FamiliarityThreshold, ModelCard, Promotion, Store, StoreError
from training.trackers.tracking import Tracking, track

if TYPE_CHECKING:  # it needs the extra ray
    from training.ray_train import Workers

SplitName = Literal["test", "train", "validation"]

STOP_POLL_S = 0.5
STOP_GRACE_S = 3.0


@dataclass(frozen=True)
class Publishing:
    """Where and how a run is published.

    Attributes:
        store: The model store.
        promotion: Rule for making the version live.
        notes: Free text for the model card.
        forms: Further forms of the model to write.
        mlflow: Address of an MLflow server that records the run, or None.
    """

    store: Store
    promotion: Promotion
    notes: str
    forms: Collection[Form] = ()
    mlflow: str | None = None


class Outcome(BaseModel):
    """The result of a run: its folder, the published version, and the cascade that was fitted again because of it."""

    run: Path
    published: Publication | None = None
    cascade: Publication | None = None
    was_finished: bool = False
    """True if the run was finished and published before."""


class Measurement(BaseModel):
    """The measures of a version on one split or on labeled photos."""

    model: str
    version: int
    engine: str
    split: str
    images_per_s: float
    result: Evaluation
    classes: list[str]
    """Names of the classes, in the order of `result.per_class`."""


def read_dataset(source: str | None) -> Dataset:
    """Load a data set as `load_dataset` does, and show that work goes on."""
    with working("reading the data set"):
        return load_dataset(source)


def train(
    recipe: Recipe,
    changes: dict[str, str],
    run: Run,
    data: str | None,
    publishing: Publishing,
    *,
    extra_data: Path | None,
    resume: bool,
    publish: bool,
    lock: int | None,
    workers: "Workers | None" = None,
    group: ProcessGroup = ALONE,
) -> Outcome:
    """Train a recipe in a run folder, and publish the result.

    Args:
        recipe: The recipe with all changes.
        changes: Changed fields with their texts. A resumed run refuses most of them.
        run: Folder of the run.
        data: Data set, see `load_dataset`.
        publishing: Model store and promotion rule.
        extra_data: File of further training images, see `training.extra_data`.
        resume: True to continue the run in the folder.
        publish: False to leave the export to a later command.
        lock: Descriptor of the run's lock, inherited from the parent process.
        workers: Workers of Ray Train that train. None to train in this process.
        group: Group of processes whose first one this process is. The others call `assist`.

    Raises:
        ReportedError: The run cannot be started, resumed, trained or published.
    """
    dataset = read_dataset(data)
    if not resume:
        if recipe.validation_images >= len(dataset.train):
            raise RecipeError(
                f"validation_images={recipe.validation_images} leaves none of {len(dataset.train)} images for "
                "training; lower it"
            )
        run.path.mkdir(parents=True, exist_ok=True)
    elif extra_data:
        raise RecipeError("a resumed run keeps its extra data; leave out --extra-data")
    # SIGTERM from a supervisor raises KeyboardInterrupt as Ctrl-C does. The checkpoint remains.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with run.lock(lock), _stop_on_request(run), _report_lack_of_memory():
        if resume:
            recipe = _resume_recipe(run, recipe, changes)
        else:
            run.create(recipe, extra_data.read_bytes() if extra_data else None)
        group.broadcast(run.path)
        with _discard_if_refused(run, resume):
            dataset = _add_extra_data(run, recipe, dataset)
        with track(run, dataset, publishing.mlflow) as tracking:
            if published := run.outcome():
                if published.version in publishing.store.versions(published.model):
                    tracking.log_publication(published, _fetch(publishing.store, published))
                return Outcome(run=run.path, published=published, was_finished=True)
            with _discard_if_refused(run, resume):
                if workers:
                    from training import ray_train

                    err.print(f"{_describe(recipe)}\nin {workers.count} workers of Ray Train, into {run.path}")
                    _show_training(run, ray_train.train(recipe, dataset, run, publishing.store, workers), tracking)
                else:
                    device = default_device()
                    together = f" in {group.size} processes" if group.size > 1 else ""
                    err.print(f"{_describe(recipe)}\non {device}{together}, into {run.path}")
                    events = loop.train(recipe, dataset, run, device, publishing.store, group)
                    _show_training(run, events, tracking)
                    err.print(f"peak memory: {describe_peak_memory(device)}")
            return _publish(run, dataset, publishing, tracking) if publish else Outcome(run=run.path)


def assist(group: ProcessGroup, data: str | None, store: Store) -> None:
    """Train in a process of a group that is not the first one. The first one calls `train`.

    Args:
        group: The group.
        data: Data set, see `load_dataset`.
        store: Model store with the recipe's teachers and predecessor.

    Raises:
        ReportedError: The run cannot be trained.
    """
    dataset = read_dataset(data)
    run = FollowedRun(group.broadcast(None))
    if not run.outcome():
        recipe = run.recipe()
        dataset = _add_extra_data(run, recipe, dataset)
        for _ in loop.train(recipe, dataset, run, default_device(), store, group):
            pass


def export_run(run: Run, data: str | None, publishing: Publishing) -> Outcome:
    """Export a run's last checkpoint into the model store.

    Raises:
        ReportedError: The run cannot be exported.
    """
    dataset = read_dataset(data)
    with run.lock(), _report_lack_of_memory():
        dataset = _add_extra_data(run, run.recipe(), dataset)
        with track(run, dataset, publishing.mlflow) as tracking:
            return _publish(run, dataset, publishing, tracking)


def fit_cascade(members: tuple[str, str], data: str | None, publishing: Publishing) -> Publication:
    """Fit a cascade of two models and publish it, see `training.cascade.publish`."""
    dataset = read_dataset(data)
    with working(f"fitting a cascade of {members[0]} and {members[1]}"):
        return cascade.publish(publishing.store, dataset, members, publishing.promotion, publishing.notes)


def measure(
    store: Store,
    card: ModelCard,
    data: str | None,
    split: SplitName = "test",
    *,
    int8: bool = False,
    flip: bool = False,
    limit: int | None = None,
) -> Measurement:
    """Measure a version on a split. A cascade is measured with the engines that serve its members.

    Args:
        store: The model store.
        card: Card of the version.
        data: Data set, see `load_dataset`.
        split: Split of the data set. "validation" is the part of "train" that the version's recipe held out.
        int8: True for the quantized form.
        flip: True for the mean logits of an image and its mirror image.
        limit: Number of images of the split. None means all.

    Raises:
        ReportedError: The version or the data set cannot be used.
    """
    label = f"{card.name}/{card.version}"
    folder = store.verify(card)
    if int8 and not (folder / INT8).exists():
        raise StoreError(f"{label} has no int8 form; evaluate it without --int8")
    dataset = read_dataset(data)
    if card.classes != list(dataset.classes):
        raise StoreError(f"{label} was trained on other classes than this data set has; change --data")
    device = CPU if int8 or card.cascade else default_device()
    chosen = _split(dataset, split, card)
    chosen = chosen[sample_rows(len(chosen), limit)]
    with working(f"loading {label}"):
        if card.cascade:
            engine = selection.load_version(store, card)
        else:
            runtime: Runtime = "int8" if int8 else "auto"
            engine = selection.load(folder / MODEL, "cuda" if device.type == "cuda" else "cpu", runtime, "evaluation")
    return measure_images(card, engine, chosen, split, device, flip=flip)


def measure_images(
    card: ModelCard, engine: Engine, split: Split, name: str, device: torch.device = CPU, *, flip: bool = False
) -> Measurement:
    """Measure a loaded version on labeled images.

    Args:
        card: Card of the version.
        engine: Engine of the version.
        split: The images.
        name: Name of the split.
        device: Device of the engine.
        flip: True for the mean logits of an image and its mirror image.
    """
    images, labels = to_device(split, device)
    report = PhaseReport("measuring", f"measuring {card.name}/{card.version}", images=len(images))
    views = [images, images.flip(2)] if flip else [images]
    started = time.perf_counter()
    reports = (predict_with_reports(engine.compute_logits, view, report) for view in views)
    logits = torch.stack([show_progress(each, err) for each in reports]).mean(0)
    seconds = time.perf_counter() - started
    return Measurement(
        model=card.name,
        version=card.version,
        engine=engine.name,
        split=name,
        images_per_s=len(labels) / seconds,
        result=evaluate(logits, labels.cpu()),
        classes=card.classes,
    )


def add_familiarity(store: Store, card: ModelCard, data: str | None) -> list[FamiliarityThreshold]:
    """Add the thresholds of familiar images to the card of a version, and return them: two for a cascade, else one.

    Raises:
        ReportedError: The version has held out no images, or cannot be used.
    """
    held_out = _split(read_dataset(data), "validation", card)
    full = None
    if card.cascade:
        fast, full = cascade.fit_thresholds(*cascade.predict_members(store, card, held_out))
    else:
        images, _ = to_device(held_out, CPU)
        engine = selection.load(store.verify(card) / MODEL, "cpu", purpose="evaluation")
        fast = fit_familiarity(predict(engine.compute_logits, images))
    store.amend(card.model_copy(update={"familiarity": fast, "full_familiarity": full}))
    return [fast, full] if full else [fast]


def _split(dataset: Dataset, name: SplitName, card: ModelCard) -> Split:
    if name != "validation":
        return dataset.test if name == "test" else dataset.train
    if not card.held_out or card.data != dataset.fingerprint:
        raise StoreError(f"{card.name}/{card.version} has held out none of these images; use --split test")
    return hold_out(dataset.train, card.held_out)[1]


def _resume_recipe(run: Run, requested: Recipe, changes: dict[str, str]) -> Recipe:
    """Return the recipe of a run to resume. Only its number of epochs may change.

    Raises:
        RecipeError: The run has another recipe, or `changes` alter another field.
    """
    started = run.recipe()
    if started.name != requested.name:
        raise RecipeError(f"{run.path} contains a run of {started.name}, not of {requested.name}; give another folder")
    for field in changes:
        before, now = getattr(started, field), getattr(requested, field)
        if before != now and field != "epochs":
            raise RecipeError(f"{run.path} was started with {field}={before}; a resumed run cannot change it to {now}")
    return run.extend(requested.epochs) if "epochs" in changes and requested.epochs != started.epochs else started


@contextmanager
def _stop_on_request(run: Run) -> Iterator[None]:
    """End this process when the run's stop file appears.

    SIGTERM ends it as Ctrl-C does. If it still runs after `STOP_GRACE_S` seconds, it exits at once.
    """
    finished = threading.Event()

    def watch() -> None:
        while not run.stop_file.exists():
            if finished.wait(STOP_POLL_S):
                return
        err.print(f"stopping because {run.stop_file} exists; delete it before you resume the run")
        os.kill(os.getpid(), signal.SIGTERM)
        if not finished.wait(STOP_GRACE_S):
            os._exit(STOPPED)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        finished.set()


@contextmanager
def _report_lack_of_memory() -> Iterator[None]:
    """Turn the errors of a machine without memory into a `ReportedError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        reason = (str(error).splitlines() or ["no memory"])[0]
        raise ReportedError(f"out of memory: {reason}; lower batch_size or image_size") from error


@contextmanager
def _discard_if_refused(run: Run, resumed: bool) -> Iterator[None]:
    """Delete a new run folder if the run is refused, so that a corrected command may use the same folder."""
    try:
        yield
    except (DataError, RecipeError, StoreError, EngineError, WeightsError):
        if not resumed:
            run.discard()
        raise


def _fetch(store: Store, published: Publication) -> Path:
    """Return a folder of this machine with the files of a published version."""
    return store.fetch(store.card(published.model, published.version))


def _add_extra_data(run: Run, recipe: Recipe, dataset: Dataset) -> Dataset:
    """Add the extra training images of a run, if it has any."""
    if not run.extra_file.exists():
        return dataset
    dataset = extra.add(dataset, run.extra_file, recipe.validation_images)
    if dataset.extra:
        count, left_out = len(dataset.extra.split), dataset.extra.left_out
        err.print(f"{count} extra training images; {left_out} are left out, because they are test or held-out images")
    return dataset


def _describe(recipe: Recipe) -> str:
    return recipe.model_dump_json(exclude_defaults=True)


def _show_training(run: Run, events: Generator[Event, None, None], tracking: Tracking) -> None:
    try:
        show_progress(tracking.follow(events), err)
    except KeyboardInterrupt:
        done = len(run.epochs())
        err.print(f"stopped; {done} epochs are kept; continue with --run {run.path} --resume")
        tracking.close("stopped")
        raise typer.Exit(STOPPED) from None


def _publish(run: Run, dataset: Dataset, publishing: Publishing, tracking: Tracking) -> Outcome:
    """Publish a run, draw its figures, and fit the live cascade again if the new version replaces one of its members.

    A cascade that cannot be fitted is no failure of the run: the live one serves on with the versions that it pins.
    """
    store, promotion = publishing.store, publishing.promotion
    reports = export(run, dataset, store, promotion, publishing.notes, publishing.forms)
    published = show_progress(record_reports(reports, run), err)
    with working("drawing the pictures"):
        files = report.draw_figures(run, dataset)
    err.print(f"pictures in {files[0].parent}: {', '.join(file.name for file in files)}")
    tracking.log_publication(published, _fetch(store, published))
    refitted = None
    try:
        with working("checking whether a live cascade needs another fit"):
            refitted = cascade.refit(store, dataset, published, promotion)
    except (StoreError, EngineError) as error:
        err.print(f"the cascade is not fitted again, and the live one keeps its members: {error}")
    return Outcome(run=run.path, published=published, cascade=refitted)
