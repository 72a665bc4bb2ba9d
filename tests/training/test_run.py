"""Test run folders: one process at a time holds a folder, however that process ends."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from training.recipes import make_recipe
from training.run import Publication, Run, RunBusy, RunError, write_pid
from training.store import LocalStore

pytestmark = pytest.mark.slow

HOLD = """
import sys, time
from pathlib import Path
from training.run import Run
with Run(Path(sys.argv[1])).lock():
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    run.create(make_recipe("resnet", {"validation_images": 0}))
    return run


@pytest.fixture
def other(run: Run) -> Iterator["subprocess.Popen[str]"]:
    """A separate process that holds the lock of the run."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_kept_out_and_told_who_is_in(run: Run, other: "subprocess.Popen[str]") -> None:
    assert run.holder() == other.pid
    with pytest.raises(RunBusy, match=f"process {other.pid} is working in"), run.lock():
        pass
    command = [sys.executable, "-m", "training", "train", "resnet", "--run", str(run.path), "--resume"]
    done = subprocess.run([*command, "--data", "synthetic:1"], capture_output=True, text=True, check=False)
    assert done.returncode == os.EX_TEMPFAIL
    assert f"process {other.pid}" in done.stderr


def test_the_lock_is_free_again_however_its_holder_has_ended(run: Run, other: "subprocess.Popen[str]") -> None:
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert run.holder() is None
    with run.lock():
        assert run.holder() == os.getpid()
    assert run.holder() is None


def test_a_folder_that_does_not_exist_is_not_locked(tmp_path: Path) -> None:
    assert Run(tmp_path / "none").holder() is None
    with pytest.raises(RunError, match="there is no run in"), Run(tmp_path / "none").lock():
        pass


@pytest.mark.parametrize("left", [b"", b"\0" * 100, b"{"])
def test_a_damaged_file_is_an_error_naming_it(tmp_path: Path, left: bytes) -> None:
    run = Run(tmp_path)
    for file, read in (
        (run.recipe_file, run.recipe),
        (run.checkpoint_file, run.load),
        (run.publication_file, run.publication),
        (run.teacher_file, lambda: run.teacher_logits("resnet/1", "data")),
        (run.logits_file, run.test_logits),
    ):
        file.write_bytes(left)
        with pytest.raises(RunError, match=f"{file.name} is damaged"):
            read()


def test_metrics_that_a_crash_has_damaged_are_left_out(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.record({"event": "tick", "epoch": 1})
    with run.metrics_file.open("a") as file:
        file.write('{"event": "ti\n')
    run.record({"event": "epoch", "epoch": 1})
    assert [metrics["event"] for metrics in run.metrics()] == ["tick", "epoch"]
    assert run.latest_metrics() == {"event": "epoch", "epoch": 1}
    with run.metrics_file.open("a") as file:
        file.write("\n" * 100 + '{"event": "ti')
    assert run.latest_metrics() == {"event": "epoch", "epoch": 1}


def test_numbers_of_forgotten_metrics_are_not_given_again(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for event, epoch in (("tick", 1), ("epoch", 1), ("tick", 2), ("tick", 2)):
        run.record({"event": event, "epoch": epoch})
    run.drop_metrics_after(1)
    run.record({"event": "epoch", "epoch": 2})
    numbered = [(number, metrics["event"], metrics["epoch"]) for number, metrics in run.numbered_metrics(after=1)]
    assert numbered == [(2, "epoch", 1), (5, "epoch", 2)]
    run.drop_metrics_after(0)
    assert list(run.metrics()) == []
    assert run.latest_metrics() is None


def test_what_an_earlier_epoch_has_become_is_not_the_outcome(published_store: Path, tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.create(make_recipe("resnet", {"epochs": 2}))
    test = LocalStore(published_store).card("resnet", 1).test
    run.record_publication(Publication(model="resnet", version=1, live=True, test=test, epoch=1))
    assert run.publication() is not None
    assert run.outcome() is None
    run.record_publication(published := Publication(model="resnet", version=2, live=True, test=test, epoch=2))
    assert run.outcome() == published


def test_who_only_looks_whether_a_run_is_locked_does_not_hinder_one_that_starts(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.lock_file.touch()
    with run.lock_file.open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        with pytest.raises(RunBusy, match="unknown"), run.lock():
            pass
        threading.Timer(0.1, fcntl.flock, (looking, fcntl.LOCK_UN)).start()
        with run.lock():
            assert run.holder() == os.getpid()


def test_a_checkpoint_that_does_not_fit_leaves_the_last_one(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save({"epoch": 1})
    (tmp_path / "checkpoint.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        run.save({"epoch": 2, "weights": torch.zeros(1 << 20)})
    assert run.load() == {"epoch": 1}
    assert not (tmp_path / "checkpoint.partial").is_symlink()


ADOPT = """
import sys
from pathlib import Path
from training.run import Run
sys.stdin.readline()  # the time that a child takes to load its libraries
with Run(Path(sys.argv[1])).lock(int(sys.argv[2])):
    print("locked", flush=True)
    sys.stdin.readline()
"""


def test_child_holds_the_lock_before_it_has_begun_and_until_it_ends(run: Run) -> None:
    with run.lock_for_child() as lock:
        child = subprocess.Popen(
            [sys.executable, "-c", ADOPT, str(run.path), str(lock.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            pass_fds=(lock.fileno(),),
        )
        write_pid(lock, child.pid)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        assert run.holder() == child.pid  # the parent has closed the lock file, the child has not opened it yet
        with pytest.raises(RunBusy, match=f"process {child.pid}"), run.lock():
            pass
        with pytest.raises(RunBusy), run.lock_for_child():
            pass
        assert run.holder() == child.pid
        child.stdin.write("\n")
        assert child.stdout.readline() == "locked\n"
        assert run.holder() == child.pid
    finally:
        child.kill()
        child.communicate()
    assert run.holder() is None
    with run.lock():
        pass


def test_holder_that_has_not_written_its_number_yet_is_waited_for(run: Run) -> None:
    with run.lock_for_child() as lock:
        assert run.holder(wait_s=0) is None
        threading.Timer(0.1, write_pid, (lock, 4711)).start()
        assert run.holder() == 4711
    assert run.holder() is None


def test_inherited_descriptor_of_another_file_is_refused(run: Run, tmp_path: Path) -> None:
    with (tmp_path / "other").open("w") as other:
        with pytest.raises(RunError, match="is not that of"), run.lock(os.dup(other.fileno())):
            pass
        closed = os.dup(other.fileno())
        os.close(closed)
        with pytest.raises(RunError, match="cannot be used: Bad file descriptor"), run.lock(closed):
            pass
    with run.lock():
        pass
