"""Run evaluation jobs in the server, through the engine that also answers /predict.

    POST /evaluate -> row and run folder -> images -> batcher of the pinned version -> measures -> row

Chunks of images go through the model's queue like other requests, so they do not delay predictions. A server holds the
lock of the run folder of each job that it runs, and its lease in a database that several machines share. When a server
stops or dies, another one, or the next start, takes the job over and measures from the beginning.
"""

import asyncio
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.errors import describe_shortage
from app.exceptions import Problem, Unavailable
from app.inference.pool import Model, ModelPool
from app.jobs.evaluation_queue import (
    EvaluationJob,
    EvaluationQueue,
    EvaluationRequest,
    EvaluationResult,
    Mistake,
    ReliabilityBin,
)
from app.jobs.labeled_images import LabeledImages, read_split, read_zip
from app.jobs.queue import State, new_job_id
from app.settings import Settings
from app.threads import Threads
from training.evaluate import compute_calibration_bins, count_confusion, evaluate
from training.run import Run, RunBusy

log = logging.getLogger(__name__)

ZIP = "images.zip"
"""Name of the uploaded zip in the run folder. It is deleted when the job finishes."""

_CHUNK = 16  # images per turn in the model's queue
_MAX_RUNNING = 4
_MAX_MISTAKES = 20
_PROGRESS_S = 1.0  # interval at which a running evaluation records its progress and checks that it still has the job
_POLL_S = 2.0  # interval at which a server looks for jobs that wait
_WAIT_POLL_S = 0.1
_BUSY_S = 0.05  # pause when the model's queue is full
_PATIENCE_S = 30.0


class EvaluationRunner:
    """The evaluations of this server.

    Args:
        settings: Limits of images and archives, and how long a request waits for its result.
        queue: The queue.
        pool: The models.
    """

    def __init__(self, settings: Settings, queue: EvaluationQueue, pool: ModelPool):
        self._settings = settings
        self._queue = queue
        self._pool = pool
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._poller: asyncio.Task[None] | None = None
        self._threads = Threads("the evaluations", 2 * _MAX_RUNNING, patience_s=_PATIENCE_S)

    def start(self) -> None:
        """Start to look for jobs that another server has left."""
        self._poller = asyncio.create_task(self._poll())

    async def stop(self) -> None:
        """Interrupt the running evaluations. The next start, or another server, measures them again."""
        for task in [self._poller, *self._tasks.values()]:
            if task:
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task
        self._threads.close()

    async def submit(self, model: Model, split: str, limit: int | None, file: BinaryIO | None) -> EvaluationJob:
        """Evaluate a model. Return when the job has finished or after `evaluate_wait_s`, whichever comes first.

        Args:
            model: The version to measure. A promotion during the measurement does not change it.
            split: "test" or "train", or "zip" with a file.
            limit: Number of images of the split. None means all.
            file: The uploaded zip, or None. It is copied into the run folder.

        Raises:
            Unavailable: Too many evaluations are waiting or running, or the database cannot be used.
            Exception: The error of the evaluation, if it fails within `evaluate_wait_s`.
        """
        request = EvaluationRequest.model_validate(
            {
                "model": model.card.name,
                "version": model.card.version,
                "engine": model.batcher.engine_name,
                "split": split,
                "limit": limit,
            }
        )
        job_id = new_job_id()
        if len(self._tasks) < _MAX_RUNNING:
            lock = ExitStack()
            await self._threads.run(self._add, job_id, request, State.RUNNING, file, lock)
            task = self._run_in_task(job_id, request, lock, model)
            await asyncio.wait([task], timeout=self._settings.evaluate_wait_s)
            job = await self._queue.threads.read(self._queue.get, job_id)
            if task.done() and not task.cancelled() and (error := task.exception()):
                raise error
            return job
        await self._threads.run(self._add, job_id, request, State.QUEUED, file, None)
        await self._wait(job_id)
        return await self._queue.threads.read(self._queue.get, job_id)

    async def cancel(self, job_id: str) -> EvaluationJob:
        """Cancel a job. Raises the errors of `JobQueue.cancel`."""
        job = await self._queue.threads.run(self._queue.cancel, job_id)
        if task := self._tasks.get(job_id):
            task.cancel()
        return job

    def _add(
        self, job_id: str, request: EvaluationRequest, state: State, file: BinaryIO | None, lock: ExitStack | None
    ) -> None:
        """Create the run folder and the row of a job. `lock` gets the lock of the folder."""
        self._queue.require_room()  # before the zip is copied
        run = self._queue.run_folder(job_id)
        run.path.mkdir(parents=True)
        try:
            with ExitStack() as on_error:
                if lock is not None:
                    on_error.enter_context(run.lock_for_child())
                if file:
                    file.seek(0)
                    with (run.path / ZIP).open("wb") as copy:
                        shutil.copyfileobj(file, copy)
                self._queue.add(job_id, request, state)
                if lock is not None:
                    lock.push(on_error.pop_all())
        except BaseException:
            shutil.rmtree(run.path, ignore_errors=True)
            raise

    async def _wait(self, job_id: str) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.evaluate_wait_s):
                while not (await self._queue.threads.read(self._queue.state, job_id)).finished:  # noqa: ASYNC110
                    await asyncio.sleep(_WAIT_POLL_S)  # another server may run the job

    async def _poll(self) -> None:
        fault = ""
        while True:
            try:
                if self._pool.ready:
                    await self._take_waiting_jobs()
                fault = ""
            except (Unavailable, OSError) as error:
                if fault != str(error):
                    fault = str(error)
                    log.warning("evaluations that wait cannot be read: %s", error)
            except Exception:  # one job must not end the polling
                log.exception("a waiting evaluation cannot be started")
            await asyncio.sleep(_POLL_S)

    async def _take_waiting_jobs(self) -> None:
        """Run jobs that wait, and jobs of servers that have died."""
        for job_id in await self._threads.run(self._queue.unfinished):
            if len(self._tasks) >= _MAX_RUNNING:
                return
            if job_id in self._tasks:
                continue
            lock = ExitStack()
            with suppress(RunBusy):  # another server runs it
                if request := await self._threads.run(self._claim, job_id, lock):
                    self._run_in_task(job_id, request, lock, None)

    def _claim(self, job_id: str, lock: ExitStack) -> EvaluationRequest | None:
        run = self._queue.run_folder(job_id)
        with ExitStack() as on_error:
            run.path.mkdir(exist_ok=True)
            on_error.enter_context(run.lock_for_child())
            request = self._queue.claim(job_id, (run.path / ZIP).exists())
            if request:
                lock.push(on_error.pop_all())
            elif self._queue.state(job_id).finished:
                self._delete_upload(run)
            return request

    def _run_in_task(
        self, job_id: str, request: EvaluationRequest, lock: ExitStack, model: Model | None
    ) -> "asyncio.Task[None]":
        task = self._tasks[job_id] = asyncio.create_task(self._execute(job_id, request, model))
        task.add_done_callback(lambda task: self._release(job_id, lock, task))
        return task

    def _release(self, job_id: str, lock: ExitStack, task: "asyncio.Task[None]") -> None:
        lock.close()
        del self._tasks[job_id]
        if not task.cancelled():
            task.exception()  # the job reports the exception; asyncio would log one that is never retrieved

    async def _execute(self, job_id: str, request: EvaluationRequest, model: Model | None) -> None:
        """Run a job and record its outcome."""
        record, threads = self._queue.record_outcome, self._threads
        try:
            model = model or await self._pool.get(request.model, request.version, patient=True)
            result = await self._measure(job_id, request, model)
            await record(threads, self._queue.succeed, job_id, model.batcher.engine_name, result)
        except asyncio.CancelledError:  # the service stops, or the job was cancelled and does not change
            with suppress(Unavailable, RuntimeError):  # the next start resumes a running job as well
                await self._threads.run(self._queue.interrupt, job_id)
            raise
        except Problem as error:
            await record(threads, self._queue.fail, job_id, error.detail)
            raise
        except Exception as error:
            if shortage := describe_shortage(error):
                await record(threads, self._queue.fail, job_id, f"{shortage}; try again later")
            else:
                log.exception("evaluation %s failed", job_id)
                await record(threads, self._queue.fail, job_id, f"{type(error).__name__}: {error}")
            raise
        finally:
            with suppress(Unavailable, RuntimeError):
                await self._threads.run(self._clean_up, job_id)

    def _clean_up(self, job_id: str) -> None:
        """Delete the zip of a finished job, and old jobs."""
        if self._queue.state(job_id).finished:
            self._delete_upload(self._queue.run_folder(job_id))
            self._queue.prune()

    def _delete_upload(self, run: Run) -> None:
        """Delete the zip of a finished job. A shared database has the other files, so the whole folder is deleted."""
        if self._queue.database.shared:
            shutil.rmtree(run.path, ignore_errors=True)
        with suppress(OSError):
            (run.path / ZIP).unlink(missing_ok=True)

    async def _measure(self, job_id: str, request: EvaluationRequest, model: Model) -> EvaluationResult:
        run, stop_event = self._queue.run_folder(job_id), threading.Event()
        read = self._reader(request, run.path / ZIP, model.card.classes)
        done = 0

        async def record_progress() -> None:
            tick: dict[str, Any] = {"event": "tick", "phase": "measuring", "done": done, "images": len(labeled.labels)}
            with suppress(OSError):
                await self._threads.run(run.record, tick)
            await self._threads.run(self._queue.push_files, job_id)

        async def record_periodically() -> None:
            while True:
                await asyncio.sleep(_PROGRESS_S)
                with suppress(Unavailable):
                    await record_progress()
                    if not await self._threads.run(self._queue.is_held, job_id):
                        self._tasks[job_id].cancel()

        try:
            labeled = await self._threads.run(read, stop_event)
            await record_progress()
            recording = asyncio.create_task(record_periodically())
            try:
                chunk = min(_CHUNK, model.batcher.max_batch)
                logits = []
                for start in range(0, len(labeled.labels), chunk):
                    logits.append(await _compute_logits(model, labeled.images[start : start + chunk]))
                    done = start + len(logits[-1])
            finally:
                recording.cancel()
            await record_progress()
            all_logits, labels = torch.from_numpy(np.concatenate(logits)), torch.from_numpy(labeled.labels)
            return await self._threads.run(_compute_result, all_logits, labels, labeled.names, model.card.classes)
        finally:
            stop_event.set()

    def _reader(
        self, request: EvaluationRequest, zip_file: Path, classes: list[str]
    ) -> Callable[[threading.Event], LabeledImages]:
        """Return a function that reads the images. It returns or raises early once its event is set."""

        def read(stop_event: threading.Event) -> LabeledImages:
            if request.split in ("test", "train"):
                return read_split(self._settings, request.split, request.limit, classes)
            with zip_file.open("rb") as file:
                return read_zip(self._settings, file, classes, stop_event)

        return read


async def _compute_logits(model: Model, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    while True:
        try:
            return (await model.batcher.run(images)).logits
        except Unavailable:  # the queue is full; predictions have priority
            await asyncio.sleep(_BUSY_S)


def _compute_result(logits: Tensor, labels: Tensor, names: list[str], classes: list[str]) -> EvaluationResult:
    """Compute the measures from logits float32 [N, classes], labels int64 [N] and N names of images."""
    confusion = count_confusion(logits, labels)
    return EvaluationResult(
        **evaluate(logits, labels).model_dump(),
        classes=classes,
        images_per_class=confusion.sum(1).tolist(),
        confusion=confusion.tolist(),
        mistakes=list(_find_mistakes(logits, labels, names, classes)),
        reliability=_fill_bins(logits, labels),
    )


def _find_mistakes(logits: Tensor, labels: Tensor, names: list[str], classes: list[str]) -> Iterator[Mistake]:
    """Iterate over the `_MAX_MISTAKES` most confident mistakes, the worst first."""
    probabilities, predicted = logits.softmax(1).max(1)
    wrong = (predicted != labels).nonzero().flatten()
    for index in wrong[probabilities[wrong].argsort(descending=True)][:_MAX_MISTAKES].tolist():
        yield Mistake(
            file=names[index],
            label=classes[labels[index]],
            predicted=classes[predicted[index]],
            probability=float(probabilities[index]),
        )


def _fill_bins(logits: Tensor, labels: Tensor) -> list[ReliabilityBin]:
    bins = compute_calibration_bins(logits, labels)
    rows = zip(bins.images.tolist(), bins.confidence.tolist(), bins.accuracy.tolist(), strict=True)
    return [
        ReliabilityBin(images=round(images), confidence=confidence, accuracy=accuracy)
        for images, confidence, accuracy in rows
        if images
    ]
