"""A run folder belongs to one process at a time, whatever becomes of that process."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from training.recipes import recipe
from training.run import Run, RunBusy, RunError

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
    run.create(recipe("resnet", {"validation_images": 0}))
    return run


@pytest.fixture
def other(run: Run) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds the lock."""
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


def test_a_checkpoint_that_does_not_fit_leaves_the_last_one(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save({"epoch": 1})
    (tmp_path / "checkpoint.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        run.save({"epoch": 2, "weights": torch.zeros(1 << 20)})
    assert run.load() == {"epoch": 1}
    assert not (tmp_path / "checkpoint.partial").is_symlink()
