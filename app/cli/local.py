"""The model store and the training jobs of this machine, with the calls of `app.client.Client` that they answer."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from pydantic import BaseModel
from sqlalchemy.exc import DBAPIError

from app.archives import zip_chunks
from app.client import Event, ModelSummary, TrainingJob
from app.jobs.database import Database
from app.jobs.training_queue import TrainingQueue, TrainingRequest
from app.settings import Settings
from training.errors import ReportedError
from training.store import CARD, Promotion, Store, StoreError, VersionInUse, open_store


class LocalService:
    """The folders of this machine.

    Args:
        settings: Model store, runs folder and limits of jobs.
    """

    def __init__(self, settings: Settings):
        self._settings = settings
        self._database = Database(settings.runs, settings.database)

    def close(self) -> None:
        """Close the connections to the job database."""
        self._database.close()

    @property
    def _store(self) -> Store:
        return open_store(self._settings.models)

    def models(self) -> list[ModelSummary]:
        """List the models."""
        return [self._summarize(name) for name in self._store.names()]

    def card(self, name: str, version: int) -> dict[str, Any]:
        """Return the card of a version."""
        return self._store.card(name, version).model_dump(mode="json")

    def promote(self, name: str, version: int) -> ModelSummary:
        """Make a version live. A version with a damaged file is refused."""
        store = self._store
        store.verify(store.card(name, version))
        store.promote(name, version)
        return self._summarize(name)

    def delete_version(self, name: str, version: int) -> ModelSummary:
        """Delete a version that is not in use."""
        if self._has_jobs() and version in self._open_queue().required_versions(name):
            raise VersionInUse(f"a waiting training job needs {name}/{version}; cancel the job first")
        self._store.delete(name, version)
        return self._summarize(name)

    def download_version(self, name: str, version: int) -> bytes:
        """Return a zip of the card and the files of a version. A version with a damaged file is refused."""
        card = self._store.card(name, version)
        folder = self._store.verify(card)
        return b"".join(zip_chunks(folder / file for file in (CARD, *card.files)))

    def _summarize(self, name: str) -> ModelSummary:
        store, errors, live = self._store, list[str](), None
        versions = store.versions(name)
        try:
            live = store.live(name)
            for version in versions:
                store.require_files(store.card(name, version))
        except StoreError as error:
            errors.append(str(error))
        return ModelSummary(name, live, tuple(versions), "; ".join(errors) or None)

    def train(self, recipe: str, *, promote: Promotion = "if-better", **overrides: Any) -> "LocalJob":
        """Queue a training job. A service on the same runs folder runs it."""
        queue = self._open_queue()
        return LocalJob(
            queue, _to_job(queue.submit(TrainingRequest(recipe=recipe, overrides=overrides, promote=promote)))
        )

    def jobs(self, limit: int = 100) -> list[TrainingJob]:
        """List the latest training jobs, newest first, without their progress."""
        return [_to_job(job) for job in self._open_known_queue().newest(limit)]

    def job(self, job_id: str) -> "LocalJob":
        """Return a training job that was queued earlier."""
        queue = self._open_known_queue()
        return LocalJob(queue, _to_job(queue.get(job_id)))

    def _has_jobs(self) -> bool:
        return self._database.backend.exists

    def _open_known_queue(self) -> TrainingQueue:
        """Open the queue of a runs folder that has one."""
        if not self._has_jobs():
            folder = self._settings.runs.absolute()
            raise ReportedError(
                f"there are no training jobs in {folder}; name another folder by --runs or CIFAR100_RUNS"
            )
        return self._open_queue()

    def _open_queue(self) -> TrainingQueue:
        try:
            self._database.connect()
        except DBAPIError as error:
            raise ReportedError(f"{self._database.backend.label} cannot be used: {error.orig}") from error
        return _LocalQueue(self._settings, self._database)


class _LocalQueue(TrainingQueue):
    listing = "cifar100 jobs list"


class LocalJob:
    """A training job in the database of this machine.

    Attributes:
        latest: The job as it was read last.
    """

    def __init__(self, queue: TrainingQueue, latest: TrainingJob):
        self._queue = queue
        self.latest = latest

    @property
    def id(self) -> str:
        """Id of the job."""
        return self.latest.id

    def follow(self) -> Iterator[Event]:
        """Iterate over the events of the job until its end."""
        events = self._queue.events(self.id, 0, lambda: False)
        with asyncio.Runner() as runner:
            while True:
                event = runner.run(anext(events))
                if event:
                    data = json.loads(event.data)
                    if event.name == "end":
                        self.latest = _to_job(data)
                    yield Event(event.name, event.number, data)
                    if event.name == "end":
                        return

    def cancel(self) -> TrainingJob:
        """Cancel the job. The service that runs it, if any, ends its process."""
        self.latest = _to_job(self._queue.cancel(self.id))
        return self.latest


def _to_job(job: BaseModel | dict[str, Any]) -> TrainingJob:
    values = job.model_dump(mode="json") if isinstance(job, BaseModel) else job
    known = {field.name: values[field.name] for field in fields(TrainingJob) if field.name in values}
    return TrainingJob(**known | {"history": tuple(known.get("history", ()))})
