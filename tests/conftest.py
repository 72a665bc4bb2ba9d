"""What tests share: a small synthetic data set and a store with one tiny model, trained and published for real."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from training import data
from training.export import publish
from training.loop import train
from training.recipes import recipe
from training.run import Run
from training.store import Store

torch.set_num_threads(1)  # reproducible, and the machine may be small
SYNTHETIC = "synthetic:4"


@pytest.fixture(scope="session", autouse=True)
def surroundings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test leaves features of frozen stages in the home folder; services start fast, and all compute on the CPU but
    with `-m gpu`."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CIFAR100_FEATURES", str(tmp_path_factory.mktemp("features")))
        environment.setenv("CIFAR100_RUNTIME", "torchscript")
        if request.config.option.markexpr != "gpu":
            environment.setenv("CUDA_VISIBLE_DEVICES", "")  # another device would compute other last bits
        yield


@pytest.fixture(scope="session")
def dataset() -> data.Dataset:
    return data.load(SYNTHETIC)


@pytest.fixture(scope="session")
def finished_run(dataset: data.Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of one epoch."""
    run = Run(tmp_path_factory.mktemp("run"))
    fields = {"width": 8, "epochs": 1, "batch_size": 16, "learning_rate": 0.05, "validation_images": 100, "int8": False}
    run.create(recipe("resnet", fields))
    list(train(run.recipe(), dataset, run, torch.device("cpu")))
    return run


@pytest.fixture(scope="session")
def published_store(finished_run: Run, dataset: data.Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with resnet version 1, live. Not to be changed: take `models` for that."""
    root = tmp_path_factory.mktemp("published")
    publish(finished_run, dataset, Store(root))
    return root


@pytest.fixture
def models(published_store: Path, tmp_path: Path) -> Path:
    """A store of one's own with resnet version 1, live."""
    return shutil.copytree(published_store, tmp_path / "models")
