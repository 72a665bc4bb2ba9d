"""Test the Serve configuration of deploy/kubernetes/rayservice.yaml on two nodes, deployed as KubeRay does.

The nodes have the environment of the manifest, and the operator's calls go to the same addresses and paths.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml  # type: ignore[import-untyped]
from api import encode_png
from ray_nodes import Nodes, can_make_namespaces, ray_environment
from server import wait_for

from training.dataset import Dataset

pytest.importorskip("ray")

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

READY_S = 300.0
RAYSERVICE = Path(__file__).parents[3] / "deploy" / "kubernetes" / "rayservice.yaml"
SPEC: dict[str, Any] = next(yaml.safe_load_all(RAYSERVICE.read_text()))["spec"]
HEAD: dict[str, Any] = SPEC["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]
(WORKER,) = SPEC["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]["containers"]
PORT: int = WORKER["ports"][0]["containerPort"]


@pytest.fixture(scope="module")
def nodes(published_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A head without processors, and a worker with those of the manifest."""
    if not can_make_namespaces():
        pytest.skip("network namespaces need root and the command ip")
    here = {"CIFAR100_MODELS": str(published_store), "CIFAR100_RUNS": str(tmp_path_factory.mktemp("runs"))}
    with ray_environment(), pytest.MonkeyPatch.context() as environment:
        for variable in HEAD["env"]:
            environment.setenv(variable["name"], here.get(variable["name"], variable["value"]))
        with Nodes([0, int(WORKER["resources"]["limits"]["cpu"])], dashboard=True) as nodes:
            yield nodes


class Operator:
    """The calls of KubeRay: it puts the configuration, and asks for the states of all applications."""

    def __init__(self, nodes: Nodes):
        token = {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
        self._client = httpx.Client(base_url=f"http://{nodes.head.address}:8265", headers=token, timeout=60)

    def deploy(self, configuration: dict[str, Any]) -> None:
        self._client.put("/api/serve/applications/", json=configuration).raise_for_status()

    def list_running(self) -> set[str]:
        """Return the names of the applications if all of them run, which KubeRay waits for, else an empty set."""
        applications = self._client.get("/api/serve/applications/").raise_for_status().json()["applications"]
        return set(applications) if all(each["status"] == "RUNNING" for each in applications.values()) else set()


@pytest.fixture(scope="module")
def operator(nodes: Nodes) -> Operator:
    """An operator that has deployed the configuration of the manifest. The model is one further application."""
    operator = Operator(nodes)
    operator.deploy(yaml.safe_load(SPEC["serveConfigV2"]))
    wait_for(lambda: len(operator.list_running()) == 2, READY_S)
    wait_for(lambda: get_status(nodes.nodes[1].address, WORKER, "readinessProbe") == 200, READY_S)
    return operator


def get_status(address: str, container: dict[str, Any], probe: str) -> int:
    """Return the status that a probe of a container gets at an address, or 0 if there is no answer."""
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    request = container[probe]["httpGet"]
    port = ports.get(request["port"], request["port"])
    try:
        answer = httpx.get(f"http://{address}:{port}{request['path']}", timeout=10)
    except httpx.TransportError:
        return 0
    return answer.status_code


def predict(nodes: Nodes, dataset: Dataset) -> Any:
    answer = httpx.post(f"{url(nodes)}/predict", files={"file": encode_png(dataset, 0)}, timeout=60)
    return answer.raise_for_status().json()


def url(nodes: Nodes) -> str:
    return f"http://{nodes.nodes[1].address}:{PORT}"


def test_the_configuration_runs_the_service_and_its_models(nodes: Nodes, operator: Operator, dataset: Dataset) -> None:
    assert httpx.get(f"{url(nodes)}/health/ready", timeout=60).status_code == 200
    assert predict(nodes, dataset)["model"] == "resnet"


def test_a_changed_configuration_keeps_the_applications_of_the_models(
    nodes: Nodes, operator: Operator, dataset: Dataset
) -> None:
    running, configuration = operator.list_running(), yaml.safe_load(SPEC["serveConfigV2"])
    configuration["applications"][0]["deployments"][0]["autoscaling_config"]["max_replicas"] = 2
    operator.deploy(configuration)
    assert wait_for(operator.list_running, READY_S) == running
    assert predict(nodes, dataset)["model"] == "resnet"


@pytest.mark.usefixtures("operator")
def test_no_request_counts_as_local_although_the_proxy_sees_a_loopback_address(nodes: Nodes) -> None:
    code = f"import httpx; print(httpx.post('http://127.0.0.1:{PORT}/train', json={{'recipe': 'resnet'}}).status_code)"
    command = nodes.nodes[1].command(sys.executable, "-c", code)
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "403"


@pytest.mark.usefixtures("operator")
def test_probes_need_no_token_and_the_api_of_serve_needs_one(nodes: Nodes) -> None:
    head, worker = nodes.nodes
    assert get_status(worker.address, WORKER, "livenessProbe") == 200
    assert [get_status(head.address, HEAD, probe) for probe in ("livenessProbe", "readinessProbe")] == [200, 200]
    assert httpx.get(f"http://{head.address}:8265/api/serve/applications/", timeout=60).status_code == 401
