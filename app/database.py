"""The history of training jobs: one table in SQLite, shared by every process that serves the same runs folder."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, DateTime, Dialect, Engine, Text, cast, create_engine, event, func, or_, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.types import TypeDecorator

from training.store import locked
from training.text import shorten

SCHEMA_VERSION = 1
BUSY_TIMEOUT_S = 1.0
"""A transaction waits this long for a lock of another process."""
WRITES: dict[str, Any] = {"begin": "BEGIN IMMEDIATE"}
"""Execution options of a transaction that writes."""

# A request or recipe of more characters is shortened. A valid one has at most half as many.
_MAX_JSON = 16 << 10
# Shortened objects keep this many characters of a string, and this many items of a list.
_MAX_TEXT = 200
_MAX_ITEMS = 100

MAX_ERROR = 2000
"""The error of a job has at most this many characters."""


class NewerDatabase(RuntimeError):
    """A database that a newer release has made."""


class UtcDateTime(TypeDecorator[datetime]):
    """A point in time; SQLite keeps no time zone, so it is stored in UTC."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        return value and value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        return value and value.replace(tzinfo=UTC)


class Base(DeclarativeBase):
    """Python types and how they are stored."""

    type_annotation_map = {datetime: UtcDateTime, dict[str, Any]: JSON}  # noqa: RUF012  as SQLAlchemy declares it


class JobRow(Base):
    """One training job; see `app.jobs.Job` for what the fields mean."""

    __tablename__ = "jobs"

    sequence: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    idempotency_key: Mapped[str | None] = mapped_column(unique=True)
    state: Mapped[str] = mapped_column(index=True)
    request: Mapped[dict[str, Any]]
    recipe: Mapped[dict[str, Any]]
    created: Mapped[datetime]
    started: Mapped[datetime | None]
    finished: Mapped[datetime | None]
    crashes: Mapped[int] = mapped_column(default=0)
    error: Mapped[str | None]
    published: Mapped[dict[str, Any] | None]


def connect(path: Path) -> Engine:
    """Open the database, creating it where there is none.

    Transactions only read unless their connection has the execution options `WRITES`. Readers and a writer do not wait
    for each other.

    Raises:
        NewerDatabase: a newer release has made it.
        sqlalchemy.exc.DatabaseError: the file cannot be opened or written, is locked, or is damaged.
    """
    # The callers' threads bound the number of connections. A bounded pool would raise an error after 30 s.
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": BUSY_TIMEOUT_S}, max_overflow=-1)

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # transactions begin below, not when the driver thinks fit
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        # A transaction that reads first and then writes would fail if another process wrote in between, so a writer
        # takes the lock at once. A reader takes none: it would wait for every writer.
        connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))

    # Where several open a new database at once, SQLite does not wait until one of them has changed the journal's mode.
    with locked(path.parent), Session(engine.execution_options(**WRITES)) as session, session.begin():
        connection = session.connection()
        version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
        if version > SCHEMA_VERSION:
            raise NewerDatabase(f"{path} was made by a newer release (schema {version}, known {SCHEMA_VERSION})")
        Base.metadata.create_all(connection)
        connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")
        _shorten_rows(session)
    return engine


def _shorten_rows(session: Session) -> None:
    """Shorten oversized rows of earlier releases, which had no bounds. Every list of jobs repeats them.

    A waiting job with such a recipe could not be started. Its shortened recipe is invalid, so it fails with a reason.
    """
    stored = (cast(column, Text) for column in (JobRow.request, JobRow.recipe, JobRow.error))
    for row in session.scalars(select(JobRow).where(or_(*(func.length(column) > _MAX_JSON for column in stored)))):
        row.request, row.recipe = _shortened(row.request), _shortened(row.recipe)
        row.error = row.error and shorten(row.error, MAX_ERROR)


def _shortened(values: dict[str, Any]) -> dict[str, Any]:
    """A copy of a JSON object with shortened strings and lists."""

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
