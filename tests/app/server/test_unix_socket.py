"""Test unix sockets: stale files are replaced, all others are left, and a server removes its own file only."""

import os
import socket
import stat
from pathlib import Path

import pytest

from app.server.startup import StartupError
from app.server.unix_socket import UnixListener, listen_on_unix_socket


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of a socket, relative because the path of a socket is short."""
    monkeypatch.chdir(tmp_path)
    return Path("service.sock")


def accepts(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(os.fspath(path)) == 0


def leave_stale(path: Path) -> None:
    """Leave the file of a server that was killed."""
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(os.fspath(path))
        killed.listen()


def test_every_user_may_connect_and_the_file_goes_with_the_socket(path: Path) -> None:
    listening = listen_on_unix_socket(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666
    assert accepts(path)
    assert not listening.getblocking()
    listening.close()
    assert not path.exists()
    listening.close()


def test_file_of_a_killed_server_is_replaced(path: Path) -> None:
    leave_stale(path)
    with listen_on_unix_socket(path):
        assert accepts(path)
    assert not path.exists()


def test_socket_of_a_live_server_is_left(path: Path) -> None:
    with listen_on_unix_socket(path):
        message = (
            "^cannot listen on unix:service.sock: another server listens on it; choose another path by CIFAR100_UDS$"
        )
        with pytest.raises(StartupError, match=message):
            listen_on_unix_socket(path)
        assert accepts(path)


def test_socket_of_a_live_server_whose_queue_is_full_is_left(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as first:
        busy.bind(os.fspath(path))
        busy.listen(0)
        first.connect(os.fspath(path))
        with pytest.raises(StartupError, match="another server listens on it"):
            listen_on_unix_socket(path)
        assert path.exists()


def test_other_files_are_left(path: Path) -> None:
    target = Path("target")
    leave_stale(target)
    for make in (lambda: path.write_text("kept"), path.mkdir, lambda: path.symlink_to(target)):
        make()
        with pytest.raises(StartupError, match=r"service\.sock: the file exists and is not a socket; choose another"):
            listen_on_unix_socket(path)
        assert path.lstat()
        path.rmdir() if path.is_dir() else path.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(os.fspath(path))
        with pytest.raises(StartupError, match=r"cannot listen on unix:service\.sock: "):
            listen_on_unix_socket(path)


@pytest.mark.parametrize(("path", "reason"), [("no/such.sock", "No such file"), ("a" * 200, "path too long")])
def test_path_that_cannot_be_a_socket_is_refused_in_one_line(
    path: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StartupError, match=f"^cannot listen on unix:{path}: .*{reason}") as refused:
        listen_on_unix_socket(Path(path))
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_file_of_another_server_is_not_removed(path: Path) -> None:
    with listen_on_unix_socket(path) as first:
        path.unlink()  # an operator did this
        with listen_on_unix_socket(path) as second:
            first.close()
            assert accepts(path)
            assert isinstance(second, UnixListener)
        assert not path.exists()
