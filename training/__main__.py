"""The command line trains, exports and measures networks: `python -m training --help`."""

import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.table import Column, Table

from training import cascade, loop, report
from training import extra_data as extra
from training.dataset import DEFAULT_FOLDER, DataError, Dataset, Split, hold_out, load_dataset
from training.encoding import restart_in_utf8_mode
from training.evaluate import evaluate as measure
from training.evaluate import fit_familiarity, predict
from training.export import export as export_run
from training.loop import TrainingError, to_device
from training.networks.transfer import WeightsError
from training.phase_report import record_reports
from training.progress import show_progress
from training.recipes import RECIPES, Recipe, RecipeError, format_value, make_recipe, rename_former_fields
from training.resources import default_device, describe_peak_memory
from training.run import Publication, Run, RunBusy, RunError
from training.runtimes import Form, Runtime, selection
from training.runtimes.engine import Engine, EngineError
from training.runtimes.openvino import INT8
from training.runtimes.torch_export import FORM_FILES, parse_forms
from training.runtimes.torchscript import ExportError
from training.store import MODEL, ModelCard, Promotion, Store, StoreError
from training.trackers.tracking import Tracking, track

STOPPED = 130  # the exit status of a process that Ctrl-C ended
STOP_POLL_S = 0.5
STOP_GRACE_S = 3.0

console = Console(markup=False, highlight=False, soft_wrap=True)
cli = typer.Typer(no_args_is_help=True, add_completion=False)

Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Folder of cifar100.npz, or 'synthetic'.",
        envvar="CIFAR100_DATA",
        show_default=DEFAULT_FOLDER,
    ),
]
Models = Annotated[Path, typer.Option(help="The model store.", envvar="CIFAR100_MODELS")]
Promote = Annotated[Promotion, typer.Option(help="When the new version goes live.")]
Notes = Annotated[str, typer.Option(help="Free text for the model card.")]
Also = Annotated[
    str, typer.Option(metavar="FORM,...", help=f"Forms to write beside model.pt, of {', '.join(FORM_FILES)}.")
]
Mlflow = Annotated[
    str | None, typer.Option(metavar="URI", help="MLflow server that records the run.", envvar="MLFLOW_TRACKING_URI")
]


@cli.callback()
def start() -> None:
    """Train, export and measure CIFAR-100 residual networks."""
    restart_in_utf8_mode()


@cli.command()
def train(
    name: Annotated[str, typer.Argument(metavar="RECIPE", help=f"One of {', '.join(RECIPES)}.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[FIELD=VALUE]...", help="Changes to the recipe, such as epochs=3.")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Run folder.", show_default="runs/RECIPE-TIME")] = None,
    resume: Annotated[bool, typer.Option(help="Continue the run in the run folder.")] = False,
    extra_data: Annotated[
        Path | None, typer.Option(help="An npz file with further training images, see docs/training.md.")
    ] = None,
    publish: Annotated[bool, typer.Option(help="Export the result into the model store.")] = True,
    promote: Promote = "if-better",
    notes: Notes = "",
    also: Also = "",
    mlflow: Mlflow = None,
    data_source: Data = None,
    models: Models = Path("models"),
    lock: Annotated[int | None, typer.Option(hidden=True, help="Descriptor of the run's lock, inherited.")] = None,
) -> None:
    """Train a recipe and publish the result. Use --resume to continue an interrupted run."""
    with _report_errors():
        changes = _parse_overrides(overrides or [])
        recipe = make_recipe(name, changes)
        forms = parse_forms(also)
        folder = Run(run or Path("runs", f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"))
        dataset = load_dataset(data_source)
        if not resume:
            if recipe.validation_images >= len(dataset.train):
                raise RecipeError(
                    f"validation_images={recipe.validation_images} leaves none of {len(dataset.train)} images for "
                    "training; lower it"
                )
            folder.path.mkdir(parents=True, exist_ok=True)
        elif extra_data:
            raise RecipeError("a resumed run keeps its extra data; leave out --extra-data")
        # SIGTERM from a supervisor raises KeyboardInterrupt as Ctrl-C does. The checkpoint remains.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with folder.lock(lock), _stop_on_request(folder):
            if resume:
                recipe = _resume_recipe(folder, recipe, changes)
            else:
                folder.create(recipe, extra_data.read_bytes() if extra_data else None)
            with _discard_if_refused(folder, resume):
                dataset = _add_extra_data(folder, recipe, dataset)
            with track(folder, dataset, mlflow) as tracking:
                if published := folder.outcome():
                    console.print(f"the run is finished and published as {published.model}/{published.version}")
                    if published.version in Store(models).versions(published.model):
                        tracking.log_publication(published, Store(models).folder(published.model, published.version))
                    return
                with _discard_if_refused(folder, resume):
                    _train(folder, recipe, dataset, Store(models), tracking)
                if publish:
                    _publish(folder, dataset, Store(models), promote, notes, forms, tracking)


@cli.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    promote: Promote = "if-better",
    notes: Notes = "",
    also: Also = "",
    mlflow: Mlflow = None,
    data_source: Data = None,
    models: Models = Path("models"),
) -> None:
    """Export a run's last checkpoint into the model store."""
    with _report_errors():
        forms = parse_forms(also)
        dataset, folder = load_dataset(data_source), Run(run)
        with folder.lock():
            dataset = _add_extra_data(folder, folder.recipe(), dataset)
            with track(folder, dataset, mlflow) as tracking:
                _publish(folder, dataset, Store(models), promote, notes, forms, tracking)


@cli.command(name="cascade")
def fit_cascade(
    first: Annotated[str, typer.Argument(help="The member that sees every image: NAME, or NAME/VERSION.")] = "resnet",
    second: Annotated[str, typer.Argument(help="The member that sees images that are sent on.")] = "resnet18",
    promote: Promote = "if-better",
    notes: Notes = "",
    data_source: Data = None,
    models: Models = Path("models"),
) -> None:
    """Fit a cascade of two models on images that both have held out, and publish it."""
    with _report_errors():
        store = Store(models)
        _print_cascade(store, cascade.publish(store, load_dataset(data_source), (first, second), promote, notes))


@cli.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="NAME for the live version, or NAME/VERSION.")],
    split: Annotated[
        Literal["test", "train", "validation"],
        typer.Option(help="What to measure on; validation is what its recipe held out of train."),
    ] = "test",
    int8: Annotated[bool, typer.Option("--int8", help="Its quantized form, with OpenVINO.")] = False,
    flip: Annotated[bool, typer.Option("--flip", help="The mean logits of an image and its mirror image.")] = False,
    data_source: Data = None,
    models: Models = Path("models"),
) -> None:
    """Measure an exported model on a whole split. A cascade is measured with the engines that serve its members."""
    with _report_errors():
        store = Store(models)
        name, version = store.parse(model)
        card = store.card(name, version)
        folder = store.verify(card)
        if int8 and not (folder / INT8).exists():
            raise StoreError(f"{name}/{version} has no int8 form; evaluate it without --int8")
        dataset = load_dataset(data_source)
        if card.classes != list(dataset.classes):
            raise StoreError(f"{name}/{version} was trained on other classes than this data set has; change --data")
        device = torch.device("cpu") if int8 or card.cascade else default_device()
        images, labels = to_device(_split(dataset, split, card), device)
        engine: Engine
        if card.cascade:
            engine = selection.load_version(store, card)
        else:
            runtime: Runtime = "int8" if int8 else "auto"
            engine = selection.load(folder / MODEL, "cuda" if device.type == "cuda" else "cpu", runtime, "evaluation")
        started = time.perf_counter()
        logits = predict(engine.compute_logits, images)
        if flip:
            logits = (logits + predict(engine.compute_logits, images.flip(2))) / 2
        seconds = time.perf_counter() - started
        result = measure(logits, labels.cpu())
        views = f"{result.images} {split} images" + (" and their mirror images" if flip else "")
        console.print(
            f"{name}/{version} on {views}: top-1 {result.top1:.2%}, top-5 {result.top5:.2%}, "
            f"loss {result.loss:.4f}, ECE {result.ece:.2%} ({result.images / seconds:.0f} images/s)"
        )


@cli.command()
def familiarity(
    model: Annotated[str, typer.Argument(help="NAME for the live version, or NAME/VERSION.")],
    data_source: Data = None,
    models: Models = Path("models"),
) -> None:
    """Add the thresholds of familiar images to the card of a version of an earlier release."""
    with _report_errors():
        store = Store(models)
        card = store.card(*store.parse(model))
        held_out = _split(load_dataset(data_source), "validation", card)
        full = None
        if card.cascade:
            fast, full = cascade.fit_thresholds(*cascade.predict_members(store, card, held_out))
        else:
            images, _ = to_device(held_out, torch.device("cpu"))
            engine = selection.load(store.verify(card) / MODEL, "cpu", purpose="evaluation")
            fast = fit_familiarity(predict(engine.compute_logits, images))
        store.amend(card.model_copy(update={"familiarity": fast, "full_familiarity": full}))
        for fitted in filter(None, (fast, full)):
            console.print(
                f"{card.name}/{card.version}: {fitted.kept:.1%} of {fitted.images} held-out images have a score "
                f"({fitted.score}) of at least {fitted.threshold:.4f}"
            )


@cli.command()
def recipes() -> None:
    """List the recipes and all fields that FIELD=VALUE can change."""
    table = Table(Column("field", no_wrap=True), "values", Column("meaning", min_width=32))
    for field, info in Recipe.model_fields.items():
        if field != "name":
            texts = {name: format_value(getattr(each, field)) for name, each in RECIPES.items()}
            same = len(set(texts.values())) == 1
            cell = texts["resnet"] if same else "\n".join(f"{name}: {text}" for name, text in texts.items())
            table.add_row(field, cell or "(none)", info.description or "")
    console.print(table)


def _split(dataset: Dataset, name: str, card: ModelCard) -> Split:
    if name != "validation":
        return dataset.test if name == "test" else dataset.train
    if not card.held_out or card.data != dataset.fingerprint:
        raise StoreError(f"{card.name}/{card.version} has held out none of these images; use --split test")
    return hold_out(dataset.train, card.held_out)[1]


def _parse_overrides(overrides: list[str]) -> dict[str, str]:
    """Parse FIELD=VALUE texts into values by the present names of the fields."""
    for override in overrides:
        if "=" not in override:
            raise RecipeError(f"{override!r} is not of the form FIELD=VALUE, such as epochs=3")
    return rename_former_fields(dict(override.split("=", 1) for override in overrides))


def _resume_recipe(folder: Run, requested: Recipe, changes: dict[str, str]) -> Recipe:
    """Return the recipe of a run to resume. Only its number of epochs may change.

    Raises:
        RecipeError: The run has another recipe, or `changes` alter another field.
    """
    started = folder.recipe()
    if started.name != requested.name:
        raise RecipeError(
            f"{folder.path} contains a run of {started.name}, not of {requested.name}; give another folder"
        )
    for field in changes:
        before, now = getattr(started, field), getattr(requested, field)
        if before != now and field != "epochs":
            raise RecipeError(
                f"{folder.path} was started with {field}={before}; a resumed run cannot change it to {now}"
            )
    return folder.extend(requested.epochs) if "epochs" in changes and requested.epochs != started.epochs else started


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
        console.print(f"stopping because {run.stop_file} exists; delete it before you resume the run")
        os.kill(os.getpid(), signal.SIGTERM)
        if not finished.wait(STOP_GRACE_S):
            os._exit(STOPPED)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        finished.set()


@contextmanager
def _discard_if_refused(run: Run, resumed: bool) -> Iterator[None]:
    """Delete a new run folder if the run is refused, so that a corrected command may use the same folder."""
    try:
        yield
    except (DataError, RecipeError, StoreError, EngineError, WeightsError):
        if not resumed:
            run.discard()
        raise


def _add_extra_data(folder: Run, recipe: Recipe, dataset: Dataset) -> Dataset:
    """Add the extra training images of a run, if it has any."""
    if not folder.extra_file.exists():
        return dataset
    dataset = extra.add(dataset, folder.extra_file, recipe.validation_images)
    if dataset.extra:
        count, left_out = len(dataset.extra.split), dataset.extra.left_out
        console.print(
            f"{count} extra training images; {left_out} are left out, because they are test or held-out images"
        )
    return dataset


def _train(folder: Run, recipe: Recipe, dataset: Dataset, store: Store, tracking: Tracking) -> None:
    device = default_device()
    console.print(f"{recipe.model_dump_json(exclude_defaults=True)}\non {device}, into {folder.path}")
    try:
        events = loop.train(recipe, dataset, folder, device, store)
        show_progress(tracking.follow(events), console)
    except KeyboardInterrupt:
        done = len(folder.epochs())
        console.print(f"stopped; {done} epochs are kept; continue with --run {folder.path} --resume")
        tracking.close("stopped")
        raise typer.Exit(STOPPED) from None
    console.print(f"peak memory: {describe_peak_memory(device)}")


def _publish(
    run: Run,
    dataset: Dataset,
    store: Store,
    promotion: Promotion,
    notes: str,
    also: Collection[Form],
    tracking: Tracking,
) -> None:
    """Publish a run, draw its figures, and fit the live cascade again if the new version replaces one of its members.

    A cascade that cannot be fitted is no failure of the run: the live one serves on with the versions that it pins.
    """
    steps = export_run(run, dataset, store, promotion, notes, also)
    published = show_progress(record_reports(steps, run), console)
    _print_publication(published)
    _draw_figures(run, dataset)
    tracking.log_publication(published, store.folder(published.model, published.version))
    try:
        if refitted := cascade.refit(store, dataset, published, promotion):
            _print_cascade(store, refitted)
    except (StoreError, EngineError) as error:
        console.print(f"the cascade is not fitted again, and the live one keeps its members: {error}")


def _print_cascade(store: Store, published: Publication) -> None:
    card = store.card(published.model, published.version)
    fitted, fit = store.cascade(card), card.cascade
    if fit:
        console.print(
            f"{' and '.join(fit.members)}: weights {fitted.weights[0]:g} and {fitted.weights[1]:g}, temperature "
            f"{fitted.temperature:.3f}, threshold {fitted.threshold:.3f}; {fit.sent_on:.1%} of {fit.images} held-out "
            f"images and {fit.test_sent_on:.1%} of the test images are sent on"
        )
    _print_publication(published)


def _print_publication(published: Publication) -> None:
    test = published.test
    console.print(
        f"published {published.model}/{published.version}: test top-1 {test.top1:.2%}, top-5 {test.top5:.2%}, "
        f"ECE {test.ece:.2%}; " + ("it is live" if published.live else "the live version did not change")
    )


def _draw_figures(run: Run, dataset: Dataset) -> None:
    files = report.draw_figures(run, dataset)
    console.print(f"pictures in {files[0].parent}: {', '.join(file.name for file in files)}")


_REPORTED_ERRORS = (
    RecipeError,
    RunError,
    StoreError,
    WeightsError,
    TrainingError,
    DataError,
    ExportError,
    EngineError,
    OSError,  # for example, the disk is full or read-only
)


_EXIT_CODES: dict[type[Exception], int] = {RecipeError: 2, RunBusy: os.EX_TEMPFAIL}


@contextmanager
def _report_errors() -> Iterator[None]:
    try:
        yield
    except _REPORTED_ERRORS as error:
        _print_error(f"{error}")
        raise typer.Exit(_EXIT_CODES.get(type(error), 1)) from None
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        reason = (str(error).splitlines() or ["no memory"])[0]
        _print_error(f"out of memory: {reason}; lower batch_size or image_size")
        raise typer.Exit(1) from None


def _print_error(error: str) -> None:
    Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(cli(prog_name="python -m training"))
