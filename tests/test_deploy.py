"""Test that the files that deploy the service agree with each other, with the settings and with the repository."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from app.settings import TRAINING_VARIABLES, Settings

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
UNIT = (DEPLOY / "systemd" / "cifar100.service").read_text()
COMPOSE_FILES = ("compose.yaml", "compose.gpu.yaml")


def load_yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


SERVICES: dict[str, Any] = load_yaml("compose.yaml")["services"]


def test_build_context_has_every_file_that_the_dockerfile_copies() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = re.findall(r"^COPY ((?:(?!--from).)+) \S+$", DOCKERFILE, re.MULTILINE)
    sources = {source for line in copied for source in line.split() if not source.startswith("--")}
    assert sources == allowed
    assert all((ROOT / source).exists() for source in sources)


def test_label_of_the_image_has_the_version_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f'image.version="{project["version"]}"' in DOCKERFILE
    assert f'image.description="{project["description"]}"' in DOCKERFILE


@pytest.mark.parametrize("text", [DOCKERFILE, UNIT, *((ROOT / name).read_text() for name in COMPOSE_FILES)])
def test_deployments_use_only_settings_that_exist(text: str) -> None:
    known = {f"CIFAR100_{name.upper()}" for name in Settings.model_fields} | {*TRAINING_VARIABLES}
    used = set(re.findall(r"\bCIFAR100_\w+", text))
    assert used
    assert used <= known


@pytest.mark.parametrize("name", SERVICES)
def test_containers_are_restricted(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {"mem_limit", "pids_limit"} <= set(service)
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert "build" in service or re.search(r":v?\d+\.\d+\.\d+$", service["image"])
    user = re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE)[-1] if "build" in service else service["user"]
    assert re.fullmatch(r"[1-9]\d*:\d+", user)


def test_compose_file_mounts_files_and_volumes_that_exist() -> None:
    mounts = [mount.split(":") for service in SERVICES.values() for mount in service["volumes"]]
    bound = [source for source, *_ in mounts if source.startswith("./")]
    assert bound
    assert [source for source in bound if not (ROOT / source).exists()] == []
    named = {source for source, *_ in mounts if not source.startswith("./")}
    assert named == set(load_yaml("compose.yaml")["volumes"])
    written = {target for source, target, *_ in mounts if source in ("models", "runs", "data")}
    (declared,) = re.findall(r"^VOLUME \[(.+)\]$", DOCKERFILE, re.MULTILINE)
    assert written == set(re.findall(r'"([^"]+)"', declared))


def test_prometheus_scrapes_the_service_and_grafana_reads_prometheus() -> None:
    prometheus = load_yaml("deploy/prometheus/compose.yml")
    (scraped,) = prometheus["scrape_configs"]
    (port,) = re.findall(r"CIFAR100_PORT=(\d+)", DOCKERFILE)
    assert f"EXPOSE {port}\n" in DOCKERFILE
    assert "--config.file=/etc/prometheus/compose.yml" in SERVICES["prometheus"]["command"]
    assert scraped["static_configs"] == [{"targets": [f"cifar100:{port}"]}]
    assert "cifar100" in SERVICES
    assert [name for name in prometheus["rule_files"] if not (DEPLOY / "prometheus" / name).exists()] == []
    (source,) = load_yaml("deploy/grafana/provisioning/datasources/prometheus.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = load_yaml("deploy/grafana/provisioning/dashboards/cifar100.yml")["providers"]
    dashboards = [mount.split(":")[1] for mount in SERVICES["grafana"]["volumes"] if "dashboard.json" in mount]
    assert [Path(path).parent for path in dashboards] == [Path(provider["options"]["path"])]
    assert SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] in dashboards
    for name, own_port in {"prometheus": "9090", "grafana": "3000"}.items():
        assert f"http://127.0.0.1:{own_port}/" in SERVICES[name]["healthcheck"]["test"][-1]
        assert SERVICES[name]["ports"] == [f"127.0.0.1:{own_port}:{own_port}"]


def test_nginx_configuration_uses_the_socket_of_the_unit() -> None:
    (path,) = re.findall(r"CIFAR100_UDS=(\S+)", UNIT)
    assert f"server unix:{path};" in (DEPLOY / "nginx" / "cifar100.conf").read_text()
