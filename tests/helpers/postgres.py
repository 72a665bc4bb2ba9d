"""A real PostgreSQL server for tests, with the programs of a Debian package or of the PATH."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self
from uuid import uuid4

from processes import list_children

_PACKAGES = Path("/usr/lib/postgresql")
_USER = "postgres" if os.geteuid() == 0 else None  # the server refuses to run as root


def find_programs() -> Path | None:
    """Return the folder of initdb and pg_ctl of the newest version, or None."""
    found = sorted(_PACKAGES.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    path = str(found[-1]) if found else shutil.which("initdb")
    return Path(path).parent if path else None


class PostgresServer:
    """A server with its data in a temporary folder, which listens on a unix socket only.

    As a context manager, it starts the server, and stops it at exit.
    """

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="pg-"))  # short, because the path of a socket has at most 107 bytes
        if _USER:
            shutil.chown(self._folder, _USER)
        self._data = self._folder / "data"

    def __enter__(self) -> Self:
        try:
            self._run("initdb", "-D", self._data, "-U", "postgres", "--auth=trust", "--no-sync", "-E", "UTF8")
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        with suppress(subprocess.CalledProcessError):  # a test has stopped it
            self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        options = f"-c listen_addresses='' -k {self._folder} -c max_connections=300"
        self._run("pg_ctl", "start", "-w", "-D", self._data, "-l", self._folder / "log", "-o", options)

    def stop(self) -> None:
        """Stop the server, which ends all connections."""
        self._run("pg_ctl", "stop", "-w", "-m", "fast", "-D", self._data)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop all processes of the server, which keep their connections but do not answer."""
        main = int((self._data / "postmaster.pid").read_text().split()[0])
        processes = [main, *list_children(main)]
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        try:
            yield
        finally:
            for process in processes:
                os.kill(process, signal.SIGCONT)

    def create_database(self) -> str:
        """Create an empty database, and return its URL."""
        name = f"test_{uuid4().hex}"
        self._run("createdb", "-h", self._folder, "-U", "postgres", name)
        return f"postgresql://postgres:secret-of-the-database@/{name}?host={self._folder}"

    def _run(self, program: str, *arguments: str | Path) -> None:
        """Run a program as the user of the server. Its output goes to a file, which the server may keep open."""
        folder = find_programs()
        assert folder is not None
        command = [str(folder / program), *map(str, arguments)]
        with (self._folder / "output").open("ab") as output:
            subprocess.run(
                command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, check=True, cwd="/", user=_USER
            )
