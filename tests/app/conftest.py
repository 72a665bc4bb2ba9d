"""Fixtures of the tests of the service."""

import pytest
from api import encode_png

from training.dataset import Dataset


@pytest.fixture(scope="session")
def image(dataset: Dataset) -> bytes:
    """The first image of the test set as a PNG."""
    return encode_png(dataset, 0)
