"""Create the tables of the job database, and migrate the databases of earlier releases.

Input: a database and the version of its schema. Output: the tables of this release with the same jobs.
"""

import json
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Text, cast, func, or_, select
from sqlalchemy.orm import Session

from app.jobs.rows import EVALUATION, MAX_ERROR, TRAINING, Base, JobRow
from training.text import shorten

SCHEMA_VERSION = 3
EVALUATIONS = "evaluations"
"""Folder in which releases before schema version 2 kept evaluations."""

# Changes of each schema version since the first. Version 2 adds evaluation jobs, version 3 several machines. A
# PostgreSQL database begins with version 3.
_MIGRATIONS = {
    2: (
        f"ALTER TABLE jobs ADD COLUMN kind VARCHAR NOT NULL DEFAULT '{TRAINING}'",
        "ALTER TABLE jobs ADD COLUMN result JSON",
    ),
    3: (
        "ALTER TABLE jobs ADD COLUMN device VARCHAR",
        "ALTER TABLE jobs ADD COLUMN runner VARCHAR",
        "ALTER TABLE jobs ADD COLUMN lease DATETIME",
    ),
}

# A request or recipe with more characters than this is shortened. A valid one has at most half as many.
_MAX_JSON = 16 << 10
# Shortened objects keep this many characters of a string, and this many items of a list.
_MAX_TEXT = 200
_MAX_ITEMS = 100


def migrate(session: Session, version: int, runs: Path) -> None:
    """Bring a database to `SCHEMA_VERSION`.

    Args:
        session: A writing transaction.
        version: Present version of the schema; 0 for a new database.
        runs: The runs folder.
    """
    connection = session.connection()
    Base.metadata.create_all(connection)
    for number in range(max(version, 1) + 1, SCHEMA_VERSION + 1) if version else ():
        for statement in _MIGRATIONS[number]:
            connection.exec_driver_sql(statement)
    if version < 2:
        _import_evaluations(session, runs / EVALUATIONS)
    _shorten_rows(session)


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
