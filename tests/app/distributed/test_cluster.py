"""Test predictions by replicas in a Ray cluster on this machine."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from api import encode_png
from cascades import add_cascade, add_second_member, copy_version
from fastapi.testclient import TestClient
from local_client import make_local_client, services_of
from server import wait_for

from app.main import create_app
from app.settings import Settings
from training.dataset import Dataset
from training.store import LocalStore

ray = pytest.importorskip("ray")

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

READY_S = 300.0
REPLICAS = 2


@contextmanager
def serve(models: Path, runs: Path, **settings: Any) -> Iterator[TestClient]:
    """Run the service with two replicas of each model, or without a cluster if `cluster` is None."""
    fields: dict[str, Any] = {"cluster": "auto", "cluster_min_replicas": REPLICAS, "cluster_cpus": 0.1}
    fields |= {"models": models, "runs": runs, "data": "synthetic:4", "deadline_s": 120, "store_poll_s": 0.2} | settings
    try:
        with make_local_client(create_app(Settings(**fields))) as client:
            yield client
    finally:
        delete_applications()


def delete_applications() -> None:
    for application in ray.serve.status().applications:
        ray.serve.delete(application)


def ask(client: TestClient, image: bytes, **params: Any) -> Any:
    response = client.post("/predict", files={"file": image}, params=params)
    assert response.status_code == 200, response.text
    answer = response.json()
    del answer["milliseconds"]
    return answer


def list_replicas() -> list[Any]:
    """Return the actors of all replicas."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    replicas = [actor for actor in actors if actor["name"].startswith("SERVE_REPLICA::")]
    return [ray.get_actor(actor["name"], actor["namespace"]) for actor in replicas]


class Load:
    """A thread that sends one request after the other and keeps the answers."""

    def __init__(self, client: TestClient, image: bytes):
        self.answers: list[tuple[int, Any]] = []
        self._client = client
        self._image = image
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.is_set():
            response = self._client.post("/predict", files={"file": self._image})
            self.answers.append((response.status_code, response.json().get("version")))


def test_replicas_answer_exactly_as_the_process_does(published_store: Path, tmp_path: Path, dataset: Dataset) -> None:
    images = [encode_png(dataset, number) for number in range(4)]
    files = [("file", image) for image in images]
    pixels = dataset.test.images[:1].transpose(0, 3, 1, 2)
    tensor = {"name": "pixels", "shape": pixels.shape, "datatype": "UINT8", "data": pixels.ravel().tolist()}

    def collect(client: TestClient) -> list[Any]:
        answers = [ask(client, image, top_k=100) for image in images]
        answers.append(client.post("/v2/models/resnet/infer", json={"inputs": [tensor]}).json())
        answers[-1].pop("id", None)
        explanation = client.post("/explain", files={"file": images[0]}).json()
        explanation.pop("milliseconds")
        return [*answers, explanation]

    with serve(published_store, tmp_path / "a", cluster=None) as client:
        expected = collect(client)
    with serve(published_store, tmp_path / "b") as client:
        assert collect(client) == expected
        assert len(client.post("/predict", files=files).json()["predictions"]) == 4
        metrics = client.get("/metrics").text
        assert client.get("/health").json()["models"]["resnet"]["engine"] == "torchscript-cpu"
    batches = next(line for line in metrics.splitlines() if line.startswith("cifar100_batch_images_sum"))
    assert float(batches.split()[-1]) >= 4 + 1 + 4


def test_a_cascade_combines_the_replicas_of_both_members(models: Path, tmp_path: Path, dataset: Dataset) -> None:
    store, image = LocalStore(models), encode_png(dataset, 0)
    add_second_member(store)
    add_cascade(store)
    with serve(models, tmp_path / "a", cluster=None) as client:
        expected = ask(client, image, familiarity="full")
    with serve(models, tmp_path / "b", cluster_min_replicas=1) as client:
        assert ask(client, image, familiarity="full") == expected
        assert expected["model"] == "cascade"
        assert len(ray.serve.status().applications) == 2


def test_a_promoted_version_replaces_the_old_one_without_a_failed_request(
    models: Path, tmp_path: Path, dataset: Dataset
) -> None:
    store = LocalStore(models)
    with serve(models, tmp_path / "runs", cluster_min_replicas=1, cluster_keep_s=1) as client:
        with Load(client, encode_png(dataset, 0)) as load:
            wait_for(lambda: load.answers, READY_S)
            assert copy_version(store, "resnet", "resnet").version == 2
            wait_for(lambda: load.answers[-1][1] == 2, READY_S)
            wait_for(lambda: len(ray.serve.status().applications) == 1, READY_S)
            count = len(load.answers)
            wait_for(lambda: len(load.answers) > count + 5, READY_S)
        assert {status for status, _ in load.answers} == {200}
        (application,) = ray.serve.status().applications
        assert ".resnet.2." in application
        assert ask(client, encode_png(dataset, 0), model="resnet", version=1)["version"] == 1  # deployed again


def test_a_killed_replica_costs_no_request(published_store: Path, tmp_path: Path, dataset: Dataset) -> None:
    with serve(published_store, tmp_path / "runs") as client, Load(client, encode_png(dataset, 0)) as load:
        wait_for(lambda: len(load.answers) > 5, READY_S)
        replicas = list_replicas()
        assert len(replicas) == REPLICAS
        for replica in replicas:
            ray.kill(replica)  # ends the process at once
            count = len(load.answers)
            wait_for(lambda count=count: len(load.answers) > count + 20, READY_S)  # type: ignore[misc]
            batcher = services_of(client).pool.live()["resnet"].batcher
            wait_for(lambda batcher=batcher: batcher.replicas == REPLICAS, READY_S)  # type: ignore[misc]
    assert {status for status, _ in load.answers} == {200}


def test_an_application_that_was_deleted_is_deployed_again(
    published_store: Path, tmp_path: Path, dataset: Dataset
) -> None:
    with serve(published_store, tmp_path / "runs", cluster_min_replicas=1) as client:
        ((name, before),) = ray.serve.status().applications.items()
        ray.serve.delete(name, _blocking=False)

        def is_new() -> bool:
            now = ray.serve.status().applications.get(name)
            return bool(now and now.status == "RUNNING" and now.last_deployed_time_s > before.last_deployed_time_s)

        wait_for(is_new, READY_S)
        assert ask(client, encode_png(dataset, 0))["model"] == "resnet"


def test_images_beyond_the_queue_are_refused(published_store: Path, tmp_path: Path, dataset: Dataset) -> None:
    with serve(published_store, tmp_path / "runs", cluster_min_replicas=1, max_queue=1) as client:
        batcher = services_of(client).pool.live()["resnet"].batcher
        batcher.queued = 1  # type: ignore[misc]  # a RemoteBatcher has an attribute
        response = client.post("/predict", files={"file": encode_png(dataset, 0)})
        assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
        batcher.queued = 0  # type: ignore[misc]
        assert ask(client, encode_png(dataset, 0))["model"] == "resnet"


def test_a_version_that_the_cluster_cannot_load_is_not_served(models: Path, tmp_path: Path, dataset: Dataset) -> None:
    store = LocalStore(models)
    card = copy_version(store, "resnet", "resnet")
    with serve(models, tmp_path / "runs", cluster_min_replicas=1, runtime="onnx") as client:
        error = client.get("/health").json()["errors"]["resnet"]
    assert f".resnet.{card.version}." in error
