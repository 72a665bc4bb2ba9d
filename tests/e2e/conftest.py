"""No training process outlives its test, even one that failed."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from server import processes_of


@pytest.fixture(autouse=True)
def no_process_left(tmp_path: Path) -> Iterator[None]:
    yield
    for process in processes_of(tmp_path):
        os.kill(process, signal.SIGKILL)
