"""Provide an image to send, and kill the training processes that a test leaves behind, even when the test fails."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from service import list_processes

from training.dataset import Dataset


@pytest.fixture(autouse=True)
def no_process_left(tmp_path: Path) -> Iterator[None]:
    yield
    for process in list_processes(tmp_path):
        os.kill(process, signal.SIGKILL)


@pytest.fixture
def image(tmp_path: Path, dataset: Dataset) -> Path:
    path = tmp_path / "image.png"
    Image.fromarray(dataset.test.images[0]).save(path)
    return path
