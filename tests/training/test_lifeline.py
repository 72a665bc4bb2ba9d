"""Test that a training process ends with the service that owns its job."""

import subprocess
import sys
import time

from training.console import STOPPED
from training.lifeline import Lifeline

CODE = "import sys, time; from training.lifeline import watch; watch(int(sys.argv[1])); time.sleep(600)"
FOREVER_S = 600.0


def start(lifeline: Lifeline) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", CODE, str(lifeline.child_end)]
    return subprocess.Popen(command, pass_fds=(lifeline.child_end,), stderr=subprocess.PIPE)


def assert_ends(process: "subprocess.Popen[bytes]") -> None:
    _, output = process.communicate(timeout=60)
    assert process.returncode == STOPPED
    assert b"no longer owns its job" in output


def test_process_ends_when_its_service_dies() -> None:
    with Lifeline() as lifeline:
        lifeline.extend(time.monotonic() + FOREVER_S)
        process = start(lifeline)
        assert process.poll() is None
    assert_ends(process)


def test_process_ends_at_the_last_deadline_that_it_was_sent() -> None:
    with Lifeline() as lifeline:
        lifeline.extend(time.monotonic() + FOREVER_S)
        lifeline.extend(0.0)  # an earlier deadline is not sent
        process = start(lifeline)
        with Lifeline() as other:
            other.extend(time.monotonic() - 1)
            assert_ends(start(other))
        assert process.poll() is None
    assert_ends(process)
