"""Store the history of training jobs in one SQLite table that all server processes on a runs folder share."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, DateTime, Dialect, Engine, Text, cast, create_engine, event, func, or_, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.types import TypeDecorator

from training.store import lock_folder
from training.text import shorten

SCHEMA_VERSION = 1
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


class NewerDatabase(RuntimeError):
    """Error for a database that a newer release has created."""


class UtcDateTime(TypeDecorator[datetime]):
    """A column type for points in time. SQLite stores no time zone, so values are stored in UTC."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        return value and value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        return value and value.replace(tzinfo=UTC)


class Base(DeclarativeBase):
    """The declarative base, which maps Python types to column types."""

    type_annotation_map = {datetime: UtcDateTime, dict[str, Any]: JSON}  # noqa: RUF012  SQLAlchemy declares it so


class JobRow(Base):
    """The row of one training job. `app.jobs.Job` documents the fields."""

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
    """Open the database file, and create it if it does not exist.

    Transactions are read-only unless their connection has the execution options `WRITES`. Readers and a writer do not
    wait for each other.

    Raises:
        NewerDatabase: A newer release has created the database.
        sqlalchemy.exc.DatabaseError: The file cannot be opened or written, is locked, or is damaged.
    """
    # The number of calling threads limits the connections. A bounded pool would raise an error after 30 s.
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": BUSY_TIMEOUT_S}, max_overflow=-1)

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
        connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")
        _shorten_rows(session)
    return engine


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
