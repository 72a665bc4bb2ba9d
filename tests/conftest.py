"""Provide shared fixtures: a small synthetic data set, and a store with one tiny, really trained model."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from local_cluster import run_cluster
from postgres import PostgresServer, find_programs
from pydantic import SecretStr
from s3_server import S3Server, is_installed, run_s3

from training.dataset import Dataset, load_dataset
from training.export import publish
from training.loop import train
from training.recipes import make_recipe
from training.run import Run
from training.store import LocalStore

torch.set_num_threads(1)  # makes results reproducible and suits small machines
SYNTHETIC = "synthetic:4"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ray", action="store_true", help="let a Ray cluster on this machine compute all predictions")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.ray:
        config.addinivalue_line("filterwarnings", "ignore")  # Ray uses deprecated functions


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests of a cluster without --ray. Threads of Ray go on after them and disturb other tests."""
    if not config.option.ray:
        for item in items:
            if item.get_closest_marker("ray"):
                item.add_marker(pytest.mark.skip(reason="needs --ray; see `make test-ray`"))


@pytest.fixture(scope="session", autouse=True)
def surroundings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Set the environment of all tests.

    Features of frozen stages go to a temporary folder, not to the home folder. Services use TorchScript, which starts
    fast. Training jobs have the priority of the services, so they do not starve while other tests keep all CPUs busy.
    All tests compute on the CPU, except with `-m gpu`. Commands write as they do to a pipe, whatever terminal runs the
    tests.
    """
    with pytest.MonkeyPatch.context() as environment:
        for name in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            environment.delenv(name, raising=False)
        environment.setenv("CIFAR100_FEATURES", str(tmp_path_factory.mktemp("features")))
        environment.setenv("CIFAR100_RUNTIME", "torchscript")
        environment.setenv("CIFAR100_TRAINING_NICENESS", "0")
        if request.config.option.markexpr != "gpu":
            environment.setenv("CUDA_VISIBLE_DEVICES", "")  # a GPU would round results differently
        if not request.config.option.ray:
            yield
            return
        environment.setenv("CIFAR100_CLUSTER", "local")
        environment.setenv("CIFAR100_CLUSTER_CPUS", "0.01")
        with run_cluster():
            yield


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server, which the environment names."""
    if not is_installed():
        pytest.skip("needs moto and s3fs")
    with run_s3(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server for all tests of this process."""
    pytest.importorskip("psycopg")
    if not find_programs():
        pytest.skip("initdb of PostgreSQL is missing")
    with PostgresServer() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> SecretStr | None:
    """The URL of a new PostgreSQL database, and None for SQLite."""
    if request.param == "sqlite":
        return None
    server: PostgresServer = request.getfixturevalue("postgres")
    return SecretStr(server.create_database())


@pytest.fixture(scope="session")
def dataset() -> Dataset:
    return load_dataset(SYNTHETIC)


@pytest.fixture(scope="session")
def finished_run(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of one epoch of the network `resnet` at width 8."""
    run = Run(tmp_path_factory.mktemp("run"))
    fields = {"width": 8, "epochs": 1, "batch_size": 16, "learning_rate": 0.05, "validation_images": 100, "int8": False}
    run.create(make_recipe("resnet", fields))
    list(train(run.recipe(), dataset, run, torch.device("cpu")))
    return run


@pytest.fixture(scope="session")
def published_store(finished_run: Run, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which version 1 of resnet is live. Tests share it: use `models` in a test that changes the store."""
    root = tmp_path_factory.mktemp("published")
    publish(finished_run, dataset, LocalStore(root))
    return root


@pytest.fixture
def models(published_store: Path, tmp_path: Path) -> Path:
    """A copy of the store for one test. Version 1 of resnet is live."""
    return shutil.copytree(published_store, tmp_path / "models")
