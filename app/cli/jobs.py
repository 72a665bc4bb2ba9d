"""`cifar100 jobs`: submit, list, show, follow and cancel training jobs."""

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.options import Key, Models, Runs, Server, connect
from training.__main__ import Promote, parse_overrides
from training.console import FAILED, CommandGroup, Json, make_table, out, print_json, print_table, working
from training.recipes import RECIPES

if TYPE_CHECKING:
    from app.client import Event, TrainingJob

cli = typer.Typer(name="jobs", cls=CommandGroup, help="Submit, list, show, follow and cancel training jobs.")

JobId = Annotated[str, typer.Argument(metavar="ID", help="Id of a job.")]


@cli.command()
def submit(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help=f"One of {', '.join(RECIPES)}.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[FIELD=VALUE]...", help="Changes to the recipe, such as epochs=3.")
    ] = None,
    promote: Promote = "if-better",
    server: Server = None,
    key: Key = None,
    models: Models = None,
    runs: Runs = None,
    as_json: Json = False,
) -> None:
    """Queue a training job and print its id. A service trains it: this one, or one on the same runs folder."""
    changes = parse_overrides(overrides or [])
    with connect(context, server, key, models, runs) as service, working("checking the recipe"):
        job = service.train(recipe, promote=promote, **changes).latest
    if as_json:
        print_json(asdict(job))
    else:
        out.print(job.id)


@cli.command("list")
def list_jobs(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Largest number of jobs.")] = 20,
    server: Server = None,
    key: Key = None,
    runs: Runs = None,
    as_json: Json = False,
) -> None:
    """List the latest jobs, newest first."""
    with connect(context, server, key, None, runs) as service:
        jobs = service.jobs(limit)
    if as_json:
        print_json([asdict(job) for job in jobs])
        return
    table = make_table("id", "state", "recipe", "result")
    for job in jobs:
        state = f"{job.state}, {job.phase}" if job.phase else job.state
        table.add_row(job.id, state, _format_request(job.request), _format_result(job))
    print_table(table)


@cli.command()
def show(
    context: typer.Context,
    job_id: JobId,
    server: Server = None,
    key: Key = None,
    runs: Runs = None,
    as_json: Json = False,
) -> None:
    """Show a job with its progress and the measures of its epochs."""
    with connect(context, server, key, None, runs) as service:
        job = service.job(job_id).latest
    if as_json:
        print_json(asdict(job))
        return
    out.print(f"{job.id}  {job.state}  {_format_request(job.request)}")
    for name in ("created", "started", "finished"):
        if time := getattr(job, name):
            out.print(f"{name}: {time}")
    for epoch in job.history:
        out.print(_format_event("epoch", epoch))
    if job.progress and not job.is_finished:
        out.print(_format_event(job.progress["event"], job.progress))
    if result := _format_result(job):
        out.print(result)


@cli.command()
def follow(
    context: typer.Context,
    job_id: JobId,
    server: Server = None,
    key: Key = None,
    runs: Runs = None,
    as_json: Json = False,
) -> None:
    """Print the progress of a job until its end. The exit status is 1 unless it succeeds.

    --json prints one JSON object per line for each event. Ctrl-C ends the command, not the job.
    """
    with connect(context, server, key, None, runs) as service:
        job = service.job(job_id)
        for event in job.follow():
            _print_event(event, as_json)
    if not as_json:
        out.print(f"{job.latest.state}  {_format_result(job.latest)}".rstrip())
    if job.latest.state != "succeeded":
        raise typer.Exit(FAILED)


@cli.command()
def cancel(
    context: typer.Context,
    job_id: JobId,
    server: Server = None,
    key: Key = None,
    runs: Runs = None,
    as_json: Json = False,
) -> None:
    """Cancel a job. A finished job does not change."""
    with connect(context, server, key, None, runs) as service:
        job = service.job(job_id).cancel()
    if as_json:
        print_json(asdict(job))
    else:
        out.print(f"{job.id}  {job.state}")


def _print_event(event: "Event", as_json: bool) -> None:
    if as_json:
        print(json.dumps({"event": event.name, "number": event.number, "data": event.data}), flush=True)
    elif event.name != "end":
        out.print(_format_event(event.name, event.data))
        sys.stdout.flush()


def _format_event(name: str, data: dict[str, Any]) -> str:
    """Return one line for a report of a job, see `training.loop` and `training.phase_report`."""
    match name:
        case "epoch":
            return (
                f"epoch {data['epoch']}  train loss {data['train_loss']:.3f}  {data['split']} loss {data['loss']:.3f}  "
                f"top-1 {data['top1']:.2%}"
            )
        case "tick":
            return f"epoch {data['epoch']}  step {data['step']}/{data['steps']}  loss {data['loss']:.3f}"
        case _:
            images = f"  image {data['done']}/{data['images']}" if data.get("images") else ""
            return f"{data.get('phase', name)}: {data.get('message', '')}{images}"


def _format_request(request: dict[str, Any]) -> str:
    return " ".join([request["recipe"], *(f"{field}={value}" for field, value in request["overrides"].items())])


def _format_result(job: "TrainingJob") -> str:
    if job.published:
        state = "it is live" if job.published["live"] else "not live"
        version = f"{job.published['model']}/{job.published['version']}"
        return f"published {version}, test top-1 {job.published['test']['top1']:.2%}, {state}"
    return job.error or ""
