"""The differences between SQLite and PostgreSQL: connections, transactions, the clock and the schema version.

In both, writing transactions run one after the other, and readers do not wait for them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text

from training.files import lock_folder

BUSY_TIMEOUT_S = 1.0
"""Seconds that a transaction waits for the lock of another process."""
WRITES = {"writes": True}
"""SQLAlchemy execution options of a transaction that writes."""

_FILE = "jobs.sqlite"
_STATEMENT_TIMEOUT_S = 10.0
_IDLE_TIMEOUT_S = 10.0  # a process that stops within a transaction loses the lock after this
_CONNECT_TIMEOUT_S = 3
_LOCK = 0x6369666172  # key of the advisory lock of writers; "cifar" in ASCII
_LIVENESS = {  # a machine that no longer answers ends its connections after at most 20 s
    "connect_timeout": _CONNECT_TIMEOUT_S,
    "keepalives_idle": 5,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}


class Backend(ABC):
    """A kind of database."""

    label: str
    """The database in messages, without its password."""
    shared: bool
    """True if processes on several machines use the database, each with its own runs folder."""

    @property
    @abstractmethod
    def exists(self) -> bool:
        """False if the database is certainly missing. `connect` then creates it."""

    @abstractmethod
    def connect(self) -> Engine:
        """Return an engine whose transactions are read-only unless they have the execution options `WRITES`.

        The engine connects when it is first used.
        """

    @abstractmethod
    def setup(self) -> Any:
        """Return a context manager in which one process at a time creates or migrates the database."""

    @abstractmethod
    def read_version(self, connection: Connection) -> int:
        """Return the version of the schema, or 0 for a new database."""

    @abstractmethod
    def write_version(self, connection: Connection, version: int) -> None:
        """Record the version of the schema."""

    @abstractmethod
    def now(self, connection: Connection) -> datetime:
        """Return the time on the clock that all processes share."""


class Sqlite(Backend):
    """A file in the runs folder, for the processes of one machine.

    Args:
        runs: The runs folder.
    """

    shared = False

    def __init__(self, runs: Path):
        self.path = runs / _FILE
        self.label = str(self.path)

    @property
    def exists(self) -> bool:
        """True if there is a file."""
        return self.path.exists()

    def connect(self) -> Engine:
        """Return an engine for the file."""
        # The number of calling threads limits the connections. A bounded pool would raise an error after 30 s.
        url = URL.create("sqlite", database=str(self.path))
        engine = create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S}, max_overflow=-1)

        @event.listens_for(engine, "connect")
        def configure(connection: Any, _: Any) -> None:
            connection.isolation_level = None  # `begin` starts transactions, not the driver
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")

        @event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            # A transaction that reads first and then writes fails if another process writes in between, so a writer
            # takes the lock at once. A reader takes no lock, because it would wait for every writer.
            connection.exec_driver_sql("BEGIN IMMEDIATE" if _writes(connection) else "BEGIN")

        return engine

    @contextmanager
    def setup(self) -> Iterator[None]:
        """Lock the folder, because SQLite does not wait while another process switches a new database to WAL mode."""
        with lock_folder(self.path.parent):
            yield

    def read_version(self, connection: Connection) -> int:
        """Return the version in the header of the file."""
        return int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())

    def write_version(self, connection: Connection, version: int) -> None:
        """Write the version into the header of the file."""
        connection.exec_driver_sql(f"PRAGMA user_version = {version}")

    def now(self, connection: Connection) -> datetime:  # noqa: ARG002
        """Return the time of this machine."""
        return datetime.now(UTC)


class Postgres(Backend):
    """A PostgreSQL database, for processes on several machines. It needs the extra `cloud`.

    Args:
        url: Address with user and password, such as postgresql://user:password@host/name.
    """

    shared = True
    exists = True

    def __init__(self, url: str):
        self._url = make_url(url).set(drivername="postgresql+psycopg")
        self.label = f"the PostgreSQL database {self._url.database} on {self._url.host or 'this machine'}"

    def connect(self) -> Engine:
        """Return an engine whose connections and transactions end when the server does not answer."""
        from app.jobs.postgres_connection import BoundedConnection  # imports psycopg

        engine = create_engine(self._url, connect_args=_LIVENESS, pool_pre_ping=True, max_overflow=-1)

        @event.listens_for(engine, "do_connect")
        def connect(_: Any, __: Any, args: tuple[Any, ...], options: dict[str, Any]) -> BoundedConnection:
            return BoundedConnection.connect(*args, **options)

        @event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            # One lock for all writers serializes them as in SQLite. READ COMMITTED sees what the previous one wrote.
            if _writes(connection):
                start = f"SET LOCAL lock_timeout = '{BUSY_TIMEOUT_S}s'; SELECT pg_advisory_xact_lock({_LOCK})"
            else:
                start = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"
            limits = f"SET LOCAL statement_timeout = '{_STATEMENT_TIMEOUT_S}s'"
            limits += f"; SET LOCAL idle_in_transaction_session_timeout = '{_IDLE_TIMEOUT_S}s'"
            connection.exec_driver_sql(f"{limits}; {start}")

        return engine

    @contextmanager
    def setup(self) -> Iterator[None]:
        """Do nothing, because the lock of writers is enough."""
        yield

    def read_version(self, connection: Connection) -> int:
        """Return the version in a table, which this method creates."""
        connection.exec_driver_sql("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL)")
        return int(connection.exec_driver_sql("SELECT max(version) FROM schema_version").scalar() or 0)

    def write_version(self, connection: Connection, version: int) -> None:
        """Replace the row of the table."""
        connection.exec_driver_sql("DELETE FROM schema_version")
        connection.execute(text("INSERT INTO schema_version VALUES (:version)"), {"version": version})

    def now(self, connection: Connection) -> datetime:
        """Return the time of the database server."""
        time: datetime = connection.exec_driver_sql("SELECT clock_timestamp()").scalar_one()
        return time.astimezone(UTC)


def _writes(connection: Connection) -> bool:
    return "writes" in connection.get_execution_options()
