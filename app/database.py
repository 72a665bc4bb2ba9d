"""The history of training jobs: one table in SQLite, shared by every process that serves the same runs folder."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, DateTime, Dialect, Engine, create_engine, event
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

from training.store import locked

SCHEMA_VERSION = 1
_BUSY_TIMEOUT_S = 10


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

    Raises:
        NewerDatabase: a newer release has made it.
        sqlalchemy.exc.DatabaseError: the file cannot be opened or written, or is damaged.
    """
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": _BUSY_TIMEOUT_S})

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # transactions begin below, not when the driver thinks fit
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        # A transaction that reads first and then writes would fail if another process wrote in between.
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    # Where several open a new database at once, SQLite does not wait until one of them has changed the journal's mode.
    with locked(path.parent), engine.begin() as connection:
        version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
        if version > SCHEMA_VERSION:
            raise NewerDatabase(f"{path} was made by a newer release (schema {version}, known {SCHEMA_VERSION})")
        Base.metadata.create_all(connection)
        connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")
    return engine
