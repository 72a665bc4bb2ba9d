"""Test the service on a cluster of two nodes, which an operator has started, each in a network namespace of its own."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from api import encode_png
from cascades import copy_version
from ray_nodes import Nodes, can_make_namespaces, ray_environment
from server import Server, wait_for
from uvicorn.config import STARTUP_FAILURE

from training.dataset import Dataset
from training.store import LocalStore

pytest.importorskip("ray")

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

READY_S = 300.0


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    if not can_make_namespaces():
        pytest.skip("network namespaces need root and the command ip")
    with ray_environment(), Nodes([1, 1]) as nodes:
        yield nodes


def serve(nodes: Nodes, models: Path, folder: Path, **settings: str) -> Server:
    chosen = {"host": nodes.head.address, "cluster": "auto", "cluster_cpus": "0.6", "deadline_s": "60"} | settings
    return Server(models, folder / "runs", folder / "log", tuple(nodes.head.command()), **chosen)


def test_workers_share_replicas_and_promote_under_load_and_a_killed_node_costs_no_request(
    nodes: Nodes, models: Path, tmp_path: Path, dataset: Dataset
) -> None:
    image, store = encode_png(dataset, 0), LocalStore(models)
    with serve(nodes, models, tmp_path, workers="2", cluster_keep_s="1") as server:
        url = str(server.address)

        def ask() -> int:
            answer = httpx.post(f"{url}/predict", files={"file": image}, timeout=60)
            assert answer.status_code == 200, answer.text
            return int(answer.json()["version"])

        wait_for(lambda: httpx.get(f"{url}/health/ready").status_code == 200, READY_S, server.log)
        assert ask() == 1
        copy_version(store, "resnet", "resnet")
        wait_for(lambda: {ask() for _ in range(8)} == {2}, READY_S, server.log)
        replicas = [node for node in nodes.nodes if node.processes("ray::ServeReplica")]
        wait_for(lambda: sum(len(node.processes("ray::ServeReplica")) for node in nodes.nodes) == 1, READY_S)
        assert replicas
        worker = nodes.nodes[1]
        worker.kill()
        for _ in range(20):  # the replica is on the head, or is started there
            assert ask() == 2
        worker.start()


def test_a_version_without_room_in_the_cluster_is_reported_and_others_are_served(
    nodes: Nodes, models: Path, tmp_path: Path, dataset: Dataset
) -> None:
    nodes.delete_applications()
    copy_version(LocalStore(models), "resnet", "resnet18")
    settings = {"cluster_cpus": "1", "cluster_min_replicas": "2"}  # the replicas of one model fill both nodes
    with serve(nodes, models, tmp_path, **settings) as server:
        health = httpx.get(f"{server.address}/health").json()
        assert list(health["models"]) == ["resnet"]
        assert "has no replica yet" in health["errors"]["resnet18"]
        assert httpx.get(f"{server.address}/health/ready").status_code == 503


def test_a_cluster_that_cannot_be_reached_ends_the_start_with_one_line(models: Path, tmp_path: Path) -> None:
    server = Server(models, tmp_path / "runs", tmp_path / "log", cluster="127.0.0.1:1")
    assert server.process.wait(120) == STARTUP_FAILURE
    text = (tmp_path / "log").read_text()
    assert "CIFAR100_CLUSTER: cannot connect to the Ray cluster 127.0.0.1:1: " in text
    assert "Traceback" not in text
