"""The tables of the job database."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, DateTime, Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

TRAINING = "training"
EVALUATION = "evaluation"

MAX_ERROR = 2000
"""Largest number of characters in the error of a job."""


class UtcDateTime(TypeDecorator[datetime]):
    """A column type for points in time. Values are stored in UTC without a time zone."""

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
    device: Mapped[str | None]
    """Device that runs the job, or has run it last. None before, and for a job that a Ray cluster runs."""
    runner: Mapped[str | None]
    """Id of the `Database` object whose process runs the job, or has run it last. None before."""
    lease: Mapped[datetime | None]
    """Time until which only `runner` may work on the job, on the clock of the database.

    None in SQLite, before the first runner, and when the runner has ended its work.
    """


class FileRow(Base):
    """A file of a run, as its runner has copied it into a database that several machines share."""

    __tablename__ = "job_files"

    job_id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    revision: Mapped[str]
    """Modification time and size of the file."""
    content: Mapped[bytes]
