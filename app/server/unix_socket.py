"""Listens on a unix socket. It replaces the file of a server that was killed, and removes its own file at exit."""

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from typing_extensions import override

from app.server.startup import BACKLOG, StartupError

_MODE = 0o666  # connecting needs permission to write


class UnixListener(socket.socket):
    """A listening, nonblocking unix socket that removes its file when it is closed.

    Every user of the machine may connect, as to a TCP port. The permissions of the folder restrict this.

    Args:
        path: Path of the socket file, which must not exist.

    Raises:
        OSError: The file exists or cannot be created, or its path is too long.
    """

    def __init__(self, path: Path):
        super().__init__(socket.AF_UNIX)
        self._path = path
        self._file: os.stat_result | None = None
        try:
            self.bind(os.fspath(path))
            self._file = path.stat()
            path.chmod(_MODE)
            self.listen(BACKLOG)
            self.setblocking(False)
        except BaseException:
            self.close()
            raise

    @override
    def close(self) -> None:
        """Remove the file and close the socket. While the socket is open, no other server replaces the file."""
        if self._file:
            with suppress(OSError):  # the file has been removed
                if os.path.samestat(self._path.lstat(), self._file):
                    self._path.unlink()
            self._file = None
        super().close()


def listen_on_unix_socket(path: Path) -> UnixListener:
    """Listen on a unix socket.

    Raises:
        StartupError: Another server listens on the path, the path has a file that is not a socket, or no socket can be
            created there.
    """
    try:
        with _lock(path.parent):
            _remove_stale_file(path)
            return UnixListener(path)
    except OSError as error:
        raise StartupError(
            f"cannot listen on unix:{path}: {error.strerror or error}; choose another path by CIFAR100_UDS"
        ) from None


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Lock a folder, so that of two servers that find the same stale file only one replaces it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # some network file systems cannot lock a folder
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_stale_file(path: Path) -> None:
    """Remove the socket file of a server that has ended.

    Raises:
        OSError: A server listens on the socket, or the file is not a socket.
    """
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(errno.EEXIST, "the file exists and is not a socket")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            try:
                probe.connect(os.fspath(path))
            except ConnectionRefusedError:
                path.unlink()
                return
            except BlockingIOError:  # many connections wait to be accepted
                pass
        raise OSError(errno.EADDRINUSE, "another server listens on it")
