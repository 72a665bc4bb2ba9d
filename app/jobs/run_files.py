"""The files of a job's run, as clients see them: recipe, metrics, publication, output and pictures.

    run folder of the runner --push--> table job_files --MirroredFiles--> any process
                     ^-----------------restore----------------+   a runner that takes over the job

With SQLite, all processes read the run folder itself. With a shared database, the runner copies the files that change
into the database, and all processes read them there.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.jobs.database import Database
from app.jobs.rows import FileRow
from training.files import write_durably
from training.run import OUTPUT, Run, parse_metrics

Metrics = tuple[int, dict[str, Any]]
"""The number of a line of metrics, counted from 1, and its values."""

_MAX_OUTPUT_BYTES = 1 << 20  # only the end of a longer output is copied
_PICTURE = ".png"


class RunFiles(Protocol):
    """The files of a run."""

    def names(self) -> list[str]:
        """List the names of the existing files."""

    def read(self, name: str) -> bytes:
        """Return the content of one of `names`."""

    def metrics(self, after: int = 0) -> list[Metrics]:
        """List the lines of metrics whose number is greater than `after`, oldest first."""

    def latest_metrics(self) -> dict[str, Any] | None:
        """Return the last line of metrics, or None."""

    def metrics_revision(self) -> object:
        """Return a value that differs after the metrics have changed."""


class FolderFiles:
    """The files in a run folder of this machine.

    Args:
        run: The folder.
    """

    def __init__(self, run: Run):
        self._run = run

    def names(self) -> list[str]:
        """List the names of the existing files."""
        return list(self._run.files())

    def read(self, name: str) -> bytes:
        """Return the content of one of `names`."""
        return self._run.files()[name].read_bytes()

    def metrics(self, after: int = 0) -> list[Metrics]:
        """List the lines of metrics whose number is greater than `after`, oldest first."""
        return list(self._run.numbered_metrics(after))

    def latest_metrics(self) -> dict[str, Any] | None:
        """Return the last line of metrics, or None."""
        return self._run.latest_metrics()

    def metrics_revision(self) -> object:
        """Return the size of the metrics in bytes."""
        file = self._run.metrics_file
        return file.stat().st_size if file.exists() else 0


class MirroredFiles:
    """The files of a run in a shared database.

    Args:
        database: The database.
        run: The run folder, which may be on another machine. Only its names are used.
    """

    def __init__(self, database: Database, run: Run):
        self._database = database
        self._job_id = run.path.name
        self._metrics = run.metrics_file.name

    def names(self) -> list[str]:
        """List the names of the copied files, pictures last."""
        with self._database.transaction() as session:
            names = session.scalars(select(FileRow.name).where(FileRow.job_id == self._job_id)).all()
        return sorted(names, key=lambda name: (name.endswith(_PICTURE), name))

    def read(self, name: str) -> bytes:
        """Return the content of one of `names`."""
        with self._database.transaction() as session:
            row = session.get(FileRow, (self._job_id, name))
        return row.content if row else b""

    def metrics(self, after: int = 0) -> list[Metrics]:
        """List the lines of metrics whose number is greater than `after`, oldest first."""
        return list(parse_metrics(self.read(self._metrics).decode().splitlines(), after))

    def latest_metrics(self) -> dict[str, Any] | None:
        """Return the last line of metrics, or None."""
        return next((metrics for _, metrics in reversed(self.metrics())), None)

    def metrics_revision(self) -> object:
        """Return the revision of the copied metrics."""
        revision = select(FileRow.revision).where(FileRow.job_id == self._job_id, FileRow.name == self._metrics)
        with self._database.transaction() as session:
            return session.scalar(revision)


def open_files(database: Database, run: Run) -> RunFiles:
    """Return the files of the run of a job."""
    return MirroredFiles(database, run) if database.shared else FolderFiles(run)


def changed_files(session: Session, run: Run) -> list[Path]:
    """List the files of a run folder that differ from their copies in a shared database."""
    copied = select(FileRow.name, FileRow.revision).where(FileRow.job_id == run.path.name)
    known = {row.name: row.revision for row in session.execute(copied)}
    return [file for file in run.files().values() if known.get(file.name) != _revision(file)]


def push(session: Session, run: Run, files: Iterable[Path]) -> None:
    """Copy files of a run folder into a shared database, in a writing transaction."""
    for file in files:
        revision, content = _revision(file), file.read_bytes()
        if file.name == OUTPUT:
            content = content[-_MAX_OUTPUT_BYTES:]
        session.merge(FileRow(job_id=run.path.name, name=file.name, revision=revision, content=content))


def restore(database: Database, run: Run) -> None:
    """Bring the run of a job that another machine has begun into the run folder of this one.

    A folder with a checkpoint does not change: it is on a volume of both machines, or the run continues there. Without
    a checkpoint, the run begins again. Its metrics keep their numbers, so that clients can follow the events.
    """
    if not database.shared or run.checkpoint_file.exists():
        return
    with database.transaction() as session:
        copies = session.scalars(select(FileRow).where(FileRow.job_id == run.path.name)).all()
    for copy in copies:
        folder = run.pictures if copy.name.endswith(_PICTURE) else run.path
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / copy.name, copy.content)


def _revision(file: Path) -> str:
    status = file.stat()
    return f"{status.st_mtime_ns} {status.st_size}"
