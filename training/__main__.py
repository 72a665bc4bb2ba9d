"""The command line trains, exports and measures networks: `python -m training --help`.

The modules that are imported here do not import PyTorch, so that help and wrong options are answered at once.
"""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Column, Table

from training.console import CommandGroup, Debug, Json, out, print_json, print_table, working
from training.dataset import DEFAULT_FOLDER
from training.encoding import restart_in_utf8_mode
from training.errors import UsageError
from training.lifeline import watch
from training.recipes import RECIPES, Recipe, RecipeError, format_value, make_recipe, rename_former_fields
from training.run import PrintedRun, Publication, Run
from training.runtimes.forms import FORM_FILES, parse_forms
from training.store import Promotion, Store, make_store, open_store

if TYPE_CHECKING:
    from training.commands import Measurement
    from training.ray_train import Workers

LOADING = "loading PyTorch"

cli = typer.Typer(cls=CommandGroup, add_completion=False)

Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Folder of cifar100.npz, or 'synthetic'.",
        envvar="CIFAR100_DATA",
        show_default=DEFAULT_FOLDER,
    ),
]
Models = Annotated[
    str,
    typer.Option(metavar="FOLDER|URL", help="The model store, such as s3://bucket/models.", envvar="CIFAR100_MODELS"),
]
Promote = Annotated[Promotion, typer.Option(help="When the new version goes live.")]
Split = Annotated[
    Literal["test", "train", "validation"],
    typer.Option(help="What to measure on; validation is what its recipe held out of train."),
]
Int8 = Annotated[bool, typer.Option("--int8", help="Its quantized form, with OpenVINO.")]
Flip = Annotated[bool, typer.Option("--flip", help="The mean logits of an image and its mirror image.")]
Notes = Annotated[str, typer.Option(help="Free text for the model card.")]
Also = Annotated[
    str, typer.Option(metavar="FORM,...", help=f"Forms to write beside model.pt, of {', '.join(FORM_FILES)}.")
]
Engine = Annotated[
    Literal["local", "ray"], typer.Option(help="This process, or workers of Ray Train, which needs the extra ray.")
]
WorkerCount = Annotated[int, typer.Option("--workers", help="Workers that share each batch. (ray)", min=1, max=1024)]
WorkerCpus = Annotated[int, typer.Option(help="Processors of each worker. (ray)", min=1, max=1024)]
Cluster = Annotated[
    str,
    typer.Option(help="Ray cluster: local starts one here; auto, or HOST:PORT. (ray)", envvar="CIFAR100_CLUSTER"),
]
Mlflow = Annotated[
    str | None, typer.Option(metavar="URI", help="MLflow server that records the run.", envvar="MLFLOW_TRACKING_URI")
]


@cli.callback()
def start(debug: Debug = False) -> None:  # noqa: ARG001  CommandGroup reads it
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
    models: Models = "models",
    engine: Engine = "local",
    workers: WorkerCount = 1,
    worker_cpus: WorkerCpus = 1,
    cluster: Cluster = "local",
    as_json: Json = False,
    lock: Annotated[int | None, typer.Option(hidden=True, help="Descriptor of the run's lock, inherited.")] = None,
    lifeline: Annotated[int | None, typer.Option(hidden=True, help="Descriptor of a lifeline, inherited.")] = None,
    cluster_job: Annotated[
        bool, typer.Option(hidden=True, help="Continue a run that has begun. Print metrics and publication as JSON.")
    ] = False,
) -> None:
    """Train a recipe and publish the result. Use --resume to continue an interrupted run."""
    if lifeline is not None:
        watch(lifeline)
    changes = parse_overrides(overrides or [])
    recipe = make_recipe(name, changes)
    forms = parse_forms(also)
    folder = (PrintedRun if cluster_job else Run)(run or Path("runs", f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"))
    if workers > 1 and engine == "local":
        raise UsageError("--workers needs --engine ray; without Ray, start torchrun --nproc-per-node N -m training")
    with working(LOADING):
        from training import commands
        from training.process_group import join_torchrun

        ray_workers = _load_ray(workers, worker_cpus, cluster) if engine == "ray" else None
    publishing = commands.Publishing(make_store(models), promote, notes, forms, mlflow)
    with join_torchrun() as group:
        if not group.is_first:
            commands.assist(group, data_source, publishing.store)
            return
        outcome = commands.train(
            recipe,
            changes,
            folder,
            data_source,
            publishing,
            extra_data=extra_data,
            resume=resume or (cluster_job and folder.recipe_file.exists()),
            publish=publish,
            lock=lock,
            workers=ray_workers,
            group=group,
        )
    if as_json:
        print_json(outcome.model_dump(mode="json"))
    elif outcome.published and outcome.was_finished:
        out.print(f"the run is finished and published as {outcome.published.model}/{outcome.published.version}")
    else:
        _print_publications(publishing.store, outcome.published, outcome.cascade)


@cli.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    promote: Promote = "if-better",
    notes: Notes = "",
    also: Also = "",
    mlflow: Mlflow = None,
    data_source: Data = None,
    models: Models = "models",
    as_json: Json = False,
) -> None:
    """Export a run's last checkpoint into the model store."""
    forms = parse_forms(also)
    Run(run).recipe()  # fails for a folder without a run, before PyTorch is loaded
    with working(LOADING):
        from training import commands
    publishing = commands.Publishing(make_store(models), promote, notes, forms, mlflow)
    outcome = commands.export_run(Run(run), data_source, publishing)
    if as_json:
        print_json(outcome.model_dump(mode="json"))
    else:
        _print_publications(publishing.store, outcome.published, outcome.cascade)


@cli.command()
def cascade(
    first: Annotated[str, typer.Argument(help="The member that sees every image: NAME, or NAME/VERSION.")] = "resnet",
    second: Annotated[str, typer.Argument(help="The member that sees images that are sent on.")] = "resnet18",
    promote: Promote = "if-better",
    notes: Notes = "",
    data_source: Data = None,
    models: Models = "models",
    as_json: Json = False,
) -> None:
    """Fit a cascade of two models on images that both have held out, and publish it."""
    store = open_store(models)
    with working(LOADING):
        from training import commands
    publishing = commands.Publishing(store, promote, notes)
    published = commands.fit_cascade((first, second), data_source, publishing)
    if as_json:
        print_json(published.model_dump(mode="json"))
    else:
        _print_publications(publishing.store, None, published)


@cli.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="NAME for the live version, or NAME/VERSION.")],
    split: Split = "test",
    int8: Int8 = False,
    flip: Flip = False,
    data_source: Data = None,
    models: Models = "models",
    as_json: Json = False,
) -> None:
    """Measure an exported model on a whole split. A cascade is measured with the engines that serve its members."""
    store = open_store(models)
    card = store.card(*store.parse(model))
    with working(LOADING):
        from training import commands
    measured = commands.measure(store, card, data_source, split, int8=int8, flip=flip)
    if as_json:
        print_json(measured.model_dump(mode="json"))
    else:
        print_measurement(measured, flip)


@cli.command()
def familiarity(
    model: Annotated[str, typer.Argument(help="NAME for the live version, or NAME/VERSION.")],
    data_source: Data = None,
    models: Models = "models",
    as_json: Json = False,
) -> None:
    """Add the thresholds of familiar images to the card of a version of an earlier release."""
    store = open_store(models)
    card = store.card(*store.parse(model))
    with working(LOADING):
        from training import commands
    thresholds = commands.add_familiarity(store, card, data_source)
    if as_json:
        fitted = [each.model_dump() for each in thresholds]
        print_json({"model": card.name, "version": card.version, "thresholds": fitted})
        return
    for each in thresholds:
        out.print(
            f"{card.name}/{card.version}: {each.kept:.1%} of {each.images} held-out images have a score ({each.score}) "
            f"of at least {each.threshold:.4f}"
        )


@cli.command()
def recipes(as_json: Json = False) -> None:
    """List the recipes and all fields that FIELD=VALUE can change."""
    if as_json:
        print_json([each.model_dump(mode="json") for each in RECIPES.values()])
        return
    table = Table(Column("field", no_wrap=True), "values", Column("meaning", min_width=32))
    for field, info in Recipe.model_fields.items():
        if field != "name":
            texts = {name: format_value(getattr(each, field)) for name, each in RECIPES.items()}
            same = len(set(texts.values())) == 1
            cell = texts["resnet"] if same else "\n".join(f"{name}: {text}" for name, text in texts.items())
            table.add_row(field, cell or "(none)", info.description or "")
    print_table(table)


def print_measurement(measured: "Measurement", flip: bool = False) -> None:
    """Print the measures of a version in one line."""
    result = measured.result
    views = f"{result.images} {measured.split} images" + (" and their mirror images" if flip else "")
    out.print(
        f"{measured.model}/{measured.version} on {views}: top-1 {result.top1:.2%}, top-5 {result.top5:.2%}, "
        f"loss {result.loss:.4f}, ECE {result.ece:.2%} ({measured.images_per_s:.0f} images/s)"
    )


def parse_overrides(overrides: list[str]) -> dict[str, str]:
    """Parse FIELD=VALUE texts into values by the present names of the fields.

    Raises:
        RecipeError: A text has another form.
    """
    for override in overrides:
        if "=" not in override:
            raise RecipeError(f"{override!r} is not of the form FIELD=VALUE, such as epochs=3")
    return rename_former_fields(dict(override.split("=", 1) for override in overrides))


def _load_ray(count: int, cpus: int, cluster: str) -> "Workers":
    """Import Ray.

    Raises:
        UsageError: The extra is not installed.
    """
    try:
        from training.ray_train import Workers
    except ImportError as error:
        raise UsageError("--engine ray needs the extra ray: pip install 'cifar100[ray]'") from error
    return Workers(count, cpus, cluster)


def _print_publications(store: Store, published: Publication | None, refitted: Publication | None) -> None:
    """Print a published version, and a cascade that was published because of it or alone."""
    if published:
        _print_publication(published)
    if refitted:
        card = store.card(refitted.model, refitted.version)
        fitted, fit = store.cascade(card), card.cascade
        if fit:
            out.print(
                f"{' and '.join(fit.members)}: weights {fitted.weights[0]:g} and {fitted.weights[1]:g}, temperature "
                f"{fitted.temperature:.3f}, threshold {fitted.threshold:.3f}; {fit.sent_on:.1%} of {fit.images} "
                f"held-out images and {fit.test_sent_on:.1%} of the test images are sent on"
            )
        _print_publication(refitted)


def _print_publication(published: Publication) -> None:
    test = published.test
    out.print(
        f"published {published.model}/{published.version}: test top-1 {test.top1:.2%}, top-5 {test.top5:.2%}, "
        f"ECE {test.ece:.2%}; " + ("it is live" if published.live else "the live version did not change")
    )


if __name__ == "__main__":
    sys.exit(cli(prog_name="python -m training"))
