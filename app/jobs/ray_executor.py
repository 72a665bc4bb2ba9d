"""Train jobs of the queue as jobs of a Ray cluster, through the HTTP interface of its job server.

    this process --submit, stop--> job server of Ray --> `python -m training train` on a node with free resources
                 <--status, output--                     prints metrics and the publication as lines of JSON

The run folder of this machine gets the metrics, the publication and the output from Ray. The job has a run folder of
its own, `ray` within that path on its node, and publishes into the model store. A job survives this process: the next
one finds it by its id and follows it. This module needs the extra `ray`.
"""

import asyncio
import json
import logging
import os
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from app.exceptions import Unavailable
from app.jobs.executor import Ending, last_line, make_command
from app.jobs.queue import State
from app.jobs.training_queue import TrainingJobSummary, TrainingQueue
from app.settings import Settings
from app.threads import Threads
from training import ray_cluster  # noqa: F401  sets variables before Ray is imported
from training.files import write_durably
from training.recipes import Recipe
from training.run import PUBLISHED, Publication, Run

from ray.exceptions import RayError  # isort: skip
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient  # isort: skip

log = logging.getLogger(__name__)

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_POLL_S = 1.0
_PATIENCE_S = 15.0
_UNKNOWN = "does not exist"  # part of the error of a job that Ray does not know
_START_TIMEOUT = "JOB_SUPERVISOR_ACTOR_START_TIMEOUT"  # the job has waited too long for resources


class RayExecutor:
    """Trains in jobs of a Ray cluster, which queues them until it has the resources.

    Args:
        settings: Address of the job server, resources of a job, model store and data set.
        jobs: The queue.
        threads: Threads for the queue and the run folders.
    """

    capacity = 8
    survives = True

    def __init__(self, settings: Settings, jobs: TrainingQueue, threads: Threads):
        self._settings = settings
        self._jobs = jobs
        self._threads = threads
        self._calls = Threads("the job server of Ray", self.capacity, patience_s=_PATIENCE_S)
        self._connection: JobSubmissionClient | None = None
        self._fault = ""  # last logged reason why Ray cannot be reached

    def device(self) -> None:
        """Return None, because the cluster chooses the device."""

    async def run(self, job: TrainingJobSummary, recipe: Recipe, run: Run) -> Ending:
        """Submit a job, or follow one that is submitted, until its end."""
        if not run.recipe_file.exists():
            await self._threads.run(run.create, recipe)
        attempts = [_attempt_id(job.id, number) for number in range(job.crashes + 1)]
        await self._retry(self._submit_once, attempts[-1], job, recipe, run)
        while True:
            details = await self._retry(self._find, attempts[-1])
            await self._threads.run(_write_output, run, await self._retry(self._read_output, attempts))
            try:
                await self._threads.run(self._jobs.push_files, job.id)
                is_held = await self._threads.run(self._jobs.is_held, job.id)
                if not is_held and await self._threads.run(self._jobs.state, job.id) is State.CANCELLED:
                    await self._retry(self._stop_once, attempts[-1])
                    await self._threads.run(self._jobs.record_stop, job.id)
            except Unavailable:  # a temporary failure of the database does not end the job
                is_held = True
            if not is_held:
                return Ending()
            if details is None:
                return Ending(crash="the Ray cluster no longer knows the job")
            if details.status.is_terminal():
                return await self._conclude(attempts[-1], details, run)
            await asyncio.sleep(_POLL_S)

    async def stop(self, job_id: str) -> None:
        """Stop all attempts of a cancelled job."""
        crashes = (await self._threads.run(self._jobs.get, job_id)).crashes
        for number in range(crashes + 1):
            await self._retry(self._stop_once, _attempt_id(job_id, number))

    async def _conclude(self, attempt: str, details: JobDetails, run: Run) -> Ending:
        if details.error_type == _START_TIMEOUT:
            await self._retry(self._client().delete_job, attempt)  # the next start submits it again
            return Ending()
        code = details.driver_exit_code
        if details.status == JobStatus.FAILED and code is not None and 0 < code != os.EX_TEMPFAIL:
            return Ending(error=await self._threads.run(last_line, run.output_file))
        return Ending(crash=f"the Ray job has the status {details.status}: {details.message}")

    async def _retry(
        self, function: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Result:
        """Call the job server. Retry while it cannot be reached, so that no job fails for this reason."""
        while True:
            try:
                result = await self._calls.read(function, *args, **kwargs)
            except (Unavailable, RuntimeError, OSError, RayError) as error:
                if self._fault != str(error):
                    self._fault = str(error)
                    log.warning("the job server of Ray at %s cannot be used: %s", self._settings.jobs_address, error)
                await asyncio.sleep(_POLL_S)
            else:
                self._fault = ""
                return result

    def _client(self) -> JobSubmissionClient:
        if self._connection is None:
            self._connection = JobSubmissionClient(self._settings.jobs_address)
        return self._connection

    def _find(self, attempt: str) -> JobDetails | None:
        """Return the state of a job, or None if Ray does not know it."""
        try:
            return self._client().get_job_info(attempt)
        except RuntimeError as error:
            if _UNKNOWN in str(error):
                return None
            raise

    def _submit_once(self, attempt: str, job: TrainingJobSummary, recipe: Recipe, run: Run) -> None:
        if self._find(attempt):
            return
        folder = run.path.absolute() / "ray"
        command = make_command(recipe, Run(folder), self._settings.models, job.request.promote)
        threads = str(max(1, int(self._settings.job_cpus)))
        variables = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        variables |= {name: os.environ[name] for name in ("MLFLOW_TRACKING_URI",) if name in os.environ}
        if self._settings.data:
            variables["CIFAR100_DATA"] = self._settings.data
        self._client().submit_job(
            entrypoint=shlex.join([*command, "--cluster-job"]),
            submission_id=attempt,
            runtime_env={"env_vars": variables},
            entrypoint_num_cpus=self._settings.job_cpus,
            entrypoint_num_gpus=self._settings.job_gpus,
        )
        log.info("training job %s is submitted to Ray as %s", job.id, attempt)

    def _read_output(self, attempts: list[str]) -> str:
        """Return the output of all attempts of a job. Ray keeps that of an attempt until it forgets the attempt."""
        return "".join(self._client().get_job_logs(attempt) for attempt in attempts if self._find(attempt))

    def _stop_once(self, attempt: str) -> None:
        if self._find(attempt):
            self._client().stop_job(attempt)


def _attempt_id(job_id: str, crashes: int) -> str:
    """Return the id in Ray of the attempt after a number of crashes."""
    return f"{job_id}-{crashes}" if crashes else job_id


def _write_output(run: Run, output: str) -> None:
    """Write the output of a job into the run folder: the lines of metrics, the publication and the rest."""
    metrics, rest = list[str](), list[str]()
    for line in output.splitlines():
        event = _parse(line)
        if event is None:
            rest.append(line)
        elif event["event"] == PUBLISHED:
            write_durably(run.publication_file, Publication.model_validate(event).model_dump_json(indent=1).encode())
        else:
            metrics.append(line)
    _write_lines(run.metrics_file, _drop_repeated_epochs(metrics))
    _write_lines(run.output_file, rest)


def _parse(line: str) -> dict[str, Any] | None:
    """Return the event of a line, or None for other output and for a line that is not complete yet."""
    if not line.startswith("{"):
        return None
    try:
        event: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return None
    return event if "event" in event else None


def _drop_repeated_epochs(lines: Iterable[str]) -> list[str]:
    """Blank the metrics of epochs that a later attempt has measured again. Line numbers do not change."""
    kept, numbers = list[str](), dict[int, int]()
    for line in lines:
        event = json.loads(line)
        if event["event"] == "epoch":
            for epoch in [each for each in numbers if each >= event["epoch"]]:
                kept[numbers.pop(epoch)] = ""
            numbers[event["epoch"]] = len(kept)
        kept.append(line)
    return kept


def _write_lines(file: Path, lines: Iterable[str]) -> None:
    """Replace a file unless it has these lines already."""
    content = "".join(f"{line}\n" for line in lines).encode()
    if not file.exists() or file.read_bytes() != content:
        write_durably(file, content)
