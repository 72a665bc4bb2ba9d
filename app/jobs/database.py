"""Store training and evaluation jobs in one SQLite table that all server processes on a runs folder share.

Input: rows of jobs. Output: the same rows after a restart, in any of the processes.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, URL, DateTime, Dialect, Engine, Text, cast, create_engine, event, func, or_, select
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.types import TypeDecorator

from app.exceptions import Unavailable
from app.threads import Threads
from training.errors import ReportedError
from training.files import lock_folder
from training.text import shorten

log = logging.getLogger(__name__)

DATABASE = "jobs.sqlite"
SCHEMA_VERSION = 2
TRAINING = "training"
EVALUATION = "evaluation"

_THREADS = 4
# Changes of each schema version since the first. Version 2 adds evaluation jobs.
_MIGRATIONS = {
    2: (
        f"ALTER TABLE jobs ADD COLUMN kind VARCHAR NOT NULL DEFAULT '{TRAINING}'",
        "ALTER TABLE jobs ADD COLUMN result JSON",
    )
}
_EVALUATIONS = "evaluations"  # folder in which releases before schema version 2 kept evaluations
BUSY_TIMEOUT_S = 1.0
"""Seconds that a transaction waits for the lock of another process."""
WRITES: dict[str, Any] = {"begin": "BEGIN IMMEDIATE"}
"""SQLAlchemy execution options of a transaction that writes."""

# A request or recipe with more characters than this is shortened. A valid one has at most half as many.
_MAX_JSON = 16 << 10
# Shortened objects keep this many characters of a string, and this many items of a list.
_MAX_TEXT = 200
_MAX_ITEMS = 100

MAX_ERROR = 2000
"""Largest number of characters in the error of a job."""


class NewerDatabase(ReportedError, RuntimeError):
    """Error for a database that a newer release has created."""


class UtcDateTime(TypeDecorator[datetime]):
    """A column type for points in time. SQLite stores no time zone, so values are stored in UTC."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Convert a time to UTC without a time zone."""
        return value and value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Mark a stored time as UTC."""
        return value and value.replace(tzinfo=UTC)


class Base(DeclarativeBase):
    """The declarative base, which maps Python types to column types."""

    type_annotation_map = {datetime: UtcDateTime, dict[str, Any]: JSON}  # noqa: RUF012  SQLAlchemy declares it so


class JobRow(Base):
    """The row of one job. `TrainingJob` and `EvaluationJob` document the fields."""

    __tablename__ = "jobs"

    sequence: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    kind: Mapped[str] = mapped_column(default=TRAINING, server_default=TRAINING)
    idempotency_key: Mapped[str | None] = mapped_column(unique=True)
    state: Mapped[str] = mapped_column(index=True)
    request: Mapped[dict[str, Any]]
    recipe: Mapped[dict[str, Any]]
    """Recipe of a training job. An evaluation job has an empty one."""
    created: Mapped[datetime]
    started: Mapped[datetime | None]
    finished: Mapped[datetime | None]
    crashes: Mapped[int] = mapped_column(default=0)
    error: Mapped[str | None]
    published: Mapped[dict[str, Any] | None]
    """Publication of a training job."""
    result: Mapped[dict[str, Any] | None]
    """Measures of an evaluation job."""


class Database:
    """The job database of a runs folder. Its methods may be called from any thread.

    Args:
        runs: The runs folder.
    """

    def __init__(self, runs: Path):
        self.runs = runs
        self.threads = Threads("the job database", _THREADS)
        """Threads in which request handlers read or write the database."""
        self._engine: Engine | None = None
        self._fault = ""  # last logged reason why the database cannot be opened

    def open(self) -> bool:
        """Open the database if it is not open yet.

        Returns:
            True if the database is open. If it cannot be opened, the service runs without jobs.
        """
        if self._engine:
            return True
        try:
            self.connect()
        except (OSError, DatabaseError, NewerDatabase) as error:
            if self._fault != str(error):
                self._fault = str(error)
                log.error("jobs are unavailable, because %s cannot be used: %s", self.runs, error)
            return False
        return True

    def connect(self) -> None:
        """Open the database, and create the runs folder and the database if they do not exist.

        Raises:
            OSError: The runs folder cannot be used.
            NewerDatabase: A newer release has created the database.
            sqlalchemy.exc.DatabaseError: The file cannot be used.
        """
        self.runs.mkdir(parents=True, exist_ok=True)
        self._engine = connect(self.runs / DATABASE)

    def close(self) -> None:
        """Close all connections and refuse further calls of `threads`."""
        self.threads.close()
        if self._engine:
            self._engine.dispose()

    @contextmanager
    def transaction(self, options: dict[str, Any] | None = None) -> Iterator[Session]:
        """Open a transaction. It is read-only unless the options are `WRITES`.

        Raises:
            Unavailable: The database or the runs folder cannot be used.
        """
        if not self._engine:
            raise Unavailable(f"jobs are unavailable: {self.runs} cannot be used; see the server's log")
        try:
            engine = self._engine.execution_options(**options or {})
            with Session(engine, expire_on_commit=False) as session, session.begin():
                yield session
        except DatabaseError as error:
            raise Unavailable(f"the job database cannot be used: {error.orig}; try again later") from error
        except OSError as error:
            raise Unavailable(f"{self.runs} cannot be used: {error}") from error


def connect(path: Path) -> Engine:
    """Open the database file, and create it if it does not exist.

    Transactions are read-only unless their connection has the execution options `WRITES`. Readers and a writer do not
    wait for each other.

    Raises:
        NewerDatabase: A newer release has created the database.
        sqlalchemy.exc.DatabaseError: The file cannot be opened or written, is locked, or is damaged.
    """
    # The number of calling threads limits the connections. A bounded pool would raise an error after 30 s.
    engine = create_engine(
        URL.create("sqlite", database=str(path)), connect_args={"timeout": BUSY_TIMEOUT_S}, max_overflow=-1
    )

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # `begin` starts transactions, not the driver
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        # A transaction that reads first and then writes fails if another process writes in between, so a writer takes
        # the lock at once. A reader takes no lock, because it would wait for every writer.
        connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))

    # SQLite does not wait while another process switches a new database to WAL mode, so a file lock serializes them.
    with lock_folder(path.parent), Session(engine.execution_options(**WRITES)) as session, session.begin():
        connection = session.connection()
        version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
        if version > SCHEMA_VERSION:
            raise NewerDatabase(f"{path} was made by a newer release (schema {version}, known {SCHEMA_VERSION})")
        Base.metadata.create_all(connection)
        for number in range(max(version, 1) + 1, SCHEMA_VERSION + 1) if version else ():
            for statement in _MIGRATIONS[number]:
                connection.exec_driver_sql(statement)
        if version < 2:
            _import_evaluations(session, path.with_name(_EVALUATIONS))
        connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")
        _shorten_rows(session)
    shutil.rmtree(path.with_name(_EVALUATIONS), ignore_errors=True)
    return engine


def _import_evaluations(session: Session, folder: Path) -> None:
    """Add the evaluations that an earlier release kept as one JSON file each. Unreadable files are skipped."""
    for file in sorted(folder.glob("*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            saved = json.loads(file.read_bytes())
            created = datetime.fromisoformat(saved["created"])
            is_finished = saved["state"] in ("succeeded", "failed")
            row = JobRow(
                id=saved["id"],
                kind=EVALUATION,
                state=saved["state"] if is_finished else "failed",
                request={key: saved[key] for key in ("model", "version", "engine", "split")},
                recipe={},
                created=created,
                finished=created,
                error=saved["error"] if is_finished else "the server that measured has ended",
                result=saved["result"],
            )
            session.add(row)


def _shorten_rows(session: Session) -> None:
    """Shorten oversized rows of earlier releases, which had no limits. Every list of jobs would repeat their content.

    A waiting job with an oversized recipe cannot be started. Its shortened recipe is invalid, so the job fails with a
    reason.
    """
    stored = (cast(column, Text) for column in (JobRow.request, JobRow.recipe, JobRow.error))
    for row in session.scalars(select(JobRow).where(or_(*(func.length(column) > _MAX_JSON for column in stored)))):
        row.request, row.recipe = _shortened(row.request), _shortened(row.recipe)
        row.error = row.error and shorten(row.error, MAX_ERROR)


def _shortened(values: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a JSON object with shortened strings and lists."""

    def shortened(value: Any) -> Any:
        match value:
            case dict():
                return _shortened(value)
            case str():
                return shorten(value, _MAX_TEXT)
            case list():
                return [shortened(each) for each in value[:_MAX_ITEMS]]
            case _:
                return value

    return {shorten(key, _MAX_TEXT): shortened(value) for key, value in list(values.items())[:_MAX_ITEMS]}
