"""Settings that cannot be, and how many processors there are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from app import workers


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("CIFAR100_PORT", "http", "CIFAR100_PORT: Input should be a valid integer"),
        ("CIFAR100_MAX_QUEUE", "0", "CIFAR100_MAX_QUEUE: Input should be greater than 0"),
        ("CIFAR100_API_KEYS", "short-secret", "CIFAR100_API_KEYS_0: Value should have at least 16 items"),
        ("CIFAR100_PREDICT_NEEDS_KEY", "yes", "CIFAR100_PREDICT_NEEDS_KEY needs CIFAR100_API_KEYS"),
    ],
)
def test_a_setting_that_cannot_be_is_named_in_one_line_without_its_value(name: str, value: str, fault: str) -> None:
    command = [sys.executable, "-m", "app", "--port", "0"]
    done = subprocess.run(command, env=os.environ | {name: value}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert fault in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "short-secret" not in done.stderr


@pytest.mark.parametrize(
    ("limit", "processors"), [("max 100000", 8), ("150000 100000", 2), ("1600000 100000", 8), ("", 8)]
)
def test_a_container_has_the_processors_that_it_may_use(
    limit: str, processors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(workers, "_CPU_MAX", tmp_path / "cpu.max")
    (tmp_path / "cpu.max").write_text(limit)
    assert workers.processors() == processors
