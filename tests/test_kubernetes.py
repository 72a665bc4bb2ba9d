"""Test the manifests of deploy/kubernetes against the published schemas, the settings, the routes and the image.

`kubectl kustomize` renders the folders where it is installed. Without it, the files themselves are tested.
"""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from pydantic import ValidationError

from app.routes import health, metrics
from app.server import serve
from app.settings import Settings

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "deploy" / "kubernetes"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
FOLDERS = ("base", "cloud", "gpu")
VERSIONS = ("1.30", "1.37")
"""Oldest and newest release of Kubernetes whose schemas are used."""

Document = dict[str, Any]


def load_documents() -> dict[str, Document]:
    """Return all documents but those of kustomize, by kind and name."""
    files = [path for path in FOLDER.rglob("*.yaml") if path.name != "kustomization.yaml"]
    documents = [each for path in files for each in yaml.safe_load_all(path.read_text())]
    return {f"{each['kind']}/{each['metadata']['name']}": each for each in documents}


DOCUMENTS = load_documents()
DEPLOYMENT: Document = DOCUMENTS["Deployment/cifar100"]["spec"]
POD: Document = DEPLOYMENT["template"]["spec"]
(CONTAINER,) = POD["containers"]
RAY: Document = DOCUMENTS["RayService/cifar100"]["spec"]["rayClusterConfig"]
RAY_TEMPLATES: list[Document] = [group["template"] for group in (RAY["headGroupSpec"], *RAY["workerGroupSpecs"])]
PODS: list[Document] = [POD, *(template["spec"] for template in RAY_TEMPLATES)]
CUSTOM = {"RayService", "PodMonitor"}

# Fields of the custom resources that the manifests use. They are described in
# https://docs.ray.io/en/latest/cluster/kubernetes/references/api.html and
# https://prometheus-operator.dev/docs/api-reference/api/.
GROUP_FIELDS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
CLUSTER_FIELDS = {"rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions"}
CLUSTER_FIELDS |= {"headGroupSpec", "workerGroupSpecs"}
POD_MONITOR_FIELDS = {"jobLabel", "selector", "podMetricsEndpoints"}


def read_settings(folder: str) -> dict[str, str]:
    lines = (FOLDER / folder / "settings.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if not line.startswith("#"))


def render(folder: str) -> list[Document]:
    """Return the documents that `kubectl apply --kustomize` would send."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    done = subprocess.run(["kubectl", "kustomize", FOLDER / folder], capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(done.stdout))


def render_one(folder: str, kind: str) -> Document:
    (document,) = (each for each in render(folder) if each["kind"] == kind)
    return document


def check_schema(document: Document, version: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    kubernetes_validate.validate(document, version, strict=True)


def to_bytes(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([MG]i)", quantity).groups()  # type: ignore[union-attr]
    return int(number) << {"Mi": 20, "Gi": 30}[unit]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name.split("/")[0] not in CUSTOM])
def test_manifests_satisfy_the_schemas_of_kubernetes(name: str, version: str) -> None:
    check_schema(DOCUMENTS[name], version)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_rendered_folders_satisfy_the_schemas_of_kubernetes(folder: str, version: str) -> None:
    for document in render(folder):
        check_schema(document, version)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("template", RAY_TEMPLATES, ids=["head", "workers"])
def test_pods_of_ray_satisfy_the_schemas_of_kubernetes(template: Document, version: str) -> None:
    pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "ray"}, "template": template}
    check_schema(pod, version)


def test_custom_resources_use_only_known_fields() -> None:
    assert set(DOCUMENTS["RayService/cifar100"]["spec"]) == {
        "excludeHeadPodFromServeSvc",
        "serveConfigV2",
        "rayClusterConfig",
    }
    assert set(RAY) <= CLUSTER_FIELDS
    assert set(RAY["headGroupSpec"]) <= {"rayStartParams", "template"}
    assert all(set(group) <= GROUP_FIELDS for group in RAY["workerGroupSpecs"])
    assert set(RAY["autoscalerOptions"]) <= {"idleTimeoutSeconds", "securityContext", "volumeMounts"}
    assert set(DOCUMENTS["PodMonitor/cifar100"]["spec"]) <= POD_MONITOR_FIELDS


def test_serve_configuration_satisfies_the_schema_of_ray() -> None:
    schema = pytest.importorskip("ray.serve.schema")
    schema.ServeDeploySchema.model_validate(yaml.safe_load(DOCUMENTS["RayService/cifar100"]["spec"]["serveConfigV2"]))


SECRET: dict[str, str] = DOCUMENTS["Secret/cifar100"]["stringData"]
SETTINGS = {
    "base": read_settings("base"),
    "cloud": read_settings("base") | read_settings("cloud") | SECRET | {"CIFAR100_API_KEYS": "0123456789abcdef"},
    "ray": {each["name"]: each["value"] for each in RAY_TEMPLATES[0]["spec"]["containers"][0]["env"]},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_service_accepts_the_settings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "ray":
        pytest.importorskip("ray")
    for variable, value in SETTINGS[name].items():
        monkeypatch.setenv(variable, value)
    Settings()


def test_the_service_refuses_the_key_of_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFAR100_API_KEYS", SECRET["CIFAR100_API_KEYS"])
    with pytest.raises(ValidationError, match="at least 16"):
        Settings()


def test_probes_and_metrics_are_routes_of_the_port_of_the_image() -> None:
    (port,) = re.findall(r"CIFAR100_PORT=(\d+)", DOCKERFILE)
    assert CONTAINER["ports"] == [{"name": "http", "containerPort": int(port)}]
    routes = {route.path for route in health.router.routes}  # type: ignore[attr-defined]
    probes = {name: CONTAINER[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert {probe["path"] for probe in probes.values()} <= routes
    assert probes["readiness"]["path"] == "/health/ready"
    assert {probe["port"] for probe in probes.values()} == {"http"}
    assert DOCUMENTS["Service/cifar100"]["spec"]["ports"][0]["targetPort"] == "http"
    assert DOCUMENTS["NetworkPolicy/cifar100"]["spec"]["ingress"][0]["ports"] == [{"port": "http"}]
    (endpoint,) = DOCUMENTS["PodMonitor/cifar100"]["spec"]["podMetricsEndpoints"]
    assert endpoint["path"] in {route.path for route in metrics.router.routes}  # type: ignore[attr-defined]
    assert endpoint["port"] == "http"


@pytest.mark.parametrize("pod", PODS, ids=["deployment", "head", "workers"])
def test_pods_have_no_privileges_and_write_only_to_their_volumes(pod: Document) -> None:
    user, group = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)[-1]
    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": int(user),
        "runAsGroup": int(group),
        "fsGroup": int(group),
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert "memory" in container["resources"]["limits"]
    assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"] for volume in pod["volumes"]]
    (declared,) = re.findall(r"^VOLUME \[(.+)\]$", DOCKERFILE, re.MULTILINE)
    written = {*re.findall(r'"([^"]+)"', declared), "/tmp"} - {"/srv/cifar100/models"}  # noqa: S108
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == written


def test_selectors_match_the_pods() -> None:
    labels = DEPLOYMENT["template"]["metadata"]["labels"]
    (spread,) = POD["topologySpreadConstraints"]
    selectors = [DEPLOYMENT["selector"], spread["labelSelector"], DOCUMENTS["PodMonitor/cifar100"]["spec"]["selector"]]
    selectors += [DOCUMENTS["PodDisruptionBudget/cifar100"]["spec"]["selector"]]
    selectors += [DOCUMENTS[f"NetworkPolicy/{name}"]["spec"]["podSelector"] for name in ("cifar100", "cifar100-cloud")]
    assert [selector for selector in selectors if selector != {"matchLabels": labels}] == []
    assert DOCUMENTS["Service/cifar100"]["spec"]["selector"] == labels
    ray = DOCUMENTS["NetworkPolicy/cifar100-ray"]["spec"]["podSelector"]["matchLabels"]
    assert all(template["metadata"]["labels"] == ray for template in RAY_TEMPLATES)
    (ray_spread,) = RAY_TEMPLATES[1]["spec"]["topologySpreadConstraints"]
    assert ray_spread["labelSelector"]["matchLabels"] == ray


def test_a_pod_that_stops_has_time_to_drain_and_to_finish_requests() -> None:
    drain_s = float(read_settings("base")["CIFAR100_DRAIN_S"])
    readiness = CONTAINER["readinessProbe"]
    assert drain_s > readiness["periodSeconds"] * readiness["failureThreshold"]
    assert POD["terminationGracePeriodSeconds"] > drain_s + serve._STOP_S + serve._LEAVE_S


def test_updates_and_disruptions_leave_a_pod() -> None:
    scaler = DOCUMENTS["HorizontalPodAutoscaler/cifar100"]["spec"]
    assert scaler["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "cifar100"}
    assert "replicas" not in DEPLOYMENT
    assert DEPLOYMENT["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert scaler["minReplicas"] > DOCUMENTS["PodDisruptionBudget/cifar100"]["spec"]["maxUnavailable"] == 1


def test_pods_request_the_memory_that_the_soak_measured() -> None:
    table = (ROOT / "tests" / "stress" / "results" / "soak.md").read_text()
    (row,) = re.findall(r"^\| memory in equal intervals, MiB \| ([\d, ]+) \|", table, re.MULTILINE)
    measured = max(map(int, row.split(", "))) << 20
    memory = {name: to_bytes(CONTAINER["resources"][name]["memory"]) for name in ("requests", "limits")}
    pending = int(read_settings("base")["CIFAR100_MAX_PENDING_BYTES"])
    assert measured < memory["requests"]
    assert measured + pending + (384 << 20) < memory["limits"], "SECURITY.md: a costly image takes up to 384 MiB"


def test_images_have_the_version_of_the_project_and_the_cluster_that_of_ray() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    (image,) = yaml.safe_load((FOLDER / "base" / "kustomization.yaml").read_text())["images"]
    assert image["newTag"] == version
    images = {container["image"] for pod in PODS[1:] for container in pod["containers"]}
    assert images == {f"{image['newName']}:{version}-ray"}
    assert f"\nray=={RAY['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()


def test_cloud_needs_the_secret_and_has_memory_for_training() -> None:
    (container,) = render_one("cloud", "Deployment")["spec"]["template"]["spec"]["containers"]
    assert [source["secretRef"]["optional"] for source in container["envFrom"] if "secretRef" in source] == [False]
    assert to_bytes(container["resources"]["limits"]["memory"]) > to_bytes(CONTAINER["resources"]["limits"]["memory"])


def test_gpu_pods_have_one_gpu_and_its_batch_size() -> None:
    (container,) = render_one("gpu", "Deployment")["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    gpu: Document = yaml.safe_load((ROOT / "compose.gpu.yaml").read_text())["services"]["cifar100"]
    assert render_one("gpu", "ConfigMap")["data"].items() > gpu["environment"].items()
