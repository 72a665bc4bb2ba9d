"""Store training and evaluation jobs in one database that all server processes share.

Input: rows of jobs. Output: the same rows after a restart, in any of the processes. The database is a SQLite file in
the runs folder, or a PostgreSQL database that processes on several machines share.
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from pydantic import SecretStr
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from app.exceptions import Unavailable
from app.jobs.backends import WRITES, Postgres, Sqlite
from app.jobs.migrations import EVALUATIONS, SCHEMA_VERSION, migrate
from app.threads import Threads
from training.errors import ReportedError

log = logging.getLogger(__name__)

_THREADS = 4


class NewerDatabase(ReportedError, RuntimeError):
    """Error for a database that a newer release has created."""


class Database:
    """The job database. Its methods may be called from any thread.

    Args:
        runs: The runs folder.
        url: Address of a PostgreSQL database. None for a SQLite file in the runs folder.
        lease_s: Seconds for which a process of a shared database owns a job without renewing its lease.
    """

    def __init__(self, runs: Path, url: SecretStr | None = None, lease_s: float = 30.0):
        self.runs = runs
        self.backend = Postgres(url.get_secret_value()) if url else Sqlite(runs)
        self.owner = uuid4().hex
        """Id of this process among all processes that run jobs."""
        self.lease_s = lease_s
        self.threads = Threads("the job database", _THREADS)
        """Threads in which request handlers read or write the database."""
        self._engine: Engine | None = None
        self._fault = ""  # last logged reason why the database cannot be used

    @property
    def shared(self) -> bool:
        """True if processes on several machines use the database, each with its own runs folder."""
        return self.backend.shared

    def open(self) -> bool:
        """Open the database if it is not open yet.

        Returns:
            True if the database is open. If it cannot be opened, the service runs without jobs.
        """
        try:
            self.connect()
        except (OSError, DBAPIError, NewerDatabase) as error:
            self._report(str(error))
            return False
        return True

    def connect(self) -> None:
        """Open the database if it is not open yet, and create the runs folder and the tables if they do not exist.

        Raises:
            OSError: The runs folder cannot be used.
            NewerDatabase: A newer release has created the database.
            sqlalchemy.exc.DBAPIError: The database cannot be opened or written, is locked, or is damaged.
        """
        if self._engine:
            return
        self.runs.mkdir(parents=True, exist_ok=True)
        engine = self.backend.connect()
        try:
            with self.backend.setup(), Session(engine.execution_options(**WRITES)) as session, session.begin():
                connection = session.connection()
                version = self.backend.read_version(connection)
                if version > SCHEMA_VERSION:
                    raise NewerDatabase(
                        f"{self.backend.label} was made by a newer release (schema {version}, known {SCHEMA_VERSION})"
                    )
                migrate(session, version, self.runs)
                self.backend.write_version(connection, SCHEMA_VERSION)
        except BaseException:
            engine.dispose()
            raise
        shutil.rmtree(self.runs / EVALUATIONS, ignore_errors=True)
        self._engine = engine

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
            raise Unavailable(f"jobs are unavailable: {self.backend.label} cannot be used; see the server's log")
        try:
            engine = self._engine.execution_options(**options or {})
            with Session(engine, expire_on_commit=False) as session, session.begin():
                yield session
            self._fault = ""
        except DBAPIError as error:
            raise Unavailable(f"the job database cannot be used: {self._reason(error)}; try again later") from error
        except OSError as error:
            raise Unavailable(f"{self.runs} cannot be used: {error}") from error

    def _reason(self, error: DBAPIError) -> str:
        """Return the reason of an error for clients. A reason of PostgreSQL names hosts and users, so it is logged."""
        if not self.shared:
            return str(error.orig)
        self._report(str(error.orig))
        return "the server's log has the reason"

    def _report(self, fault: str) -> None:
        """Log why the database cannot be used, once for each reason."""
        if self._fault != fault:
            self._fault = fault
            log.error("jobs are unavailable, because %s cannot be used: %s", self.backend.label, fault)

    def now(self, session: Session) -> datetime:
        """Return the time on the clock that all processes share."""
        return self.backend.now(session.connection())

    def new_lease(self, session: Session) -> datetime | None:
        """Return the end of a lease that begins now. None if the database is not shared."""
        return self.now(session) + timedelta(seconds=self.lease_s) if self.shared else None
