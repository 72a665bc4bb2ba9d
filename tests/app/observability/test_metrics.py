"""Test /metrics: its counts and formats, and that the documentation, the dashboard and the alerts fit."""

import io
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api import encode_png
from fastapi.testclient import TestClient
from local_client import make_local_client, services_of
from PIL import Image
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from app.exceptions import Unavailable
from app.main import create_app
from app.observability.buffered import BufferedCounter, BufferedHistogram
from app.settings import Settings
from training.dataset import Dataset

ROOT = Path(__file__).parents[3]
KEY = "a-key-of-the-tests"
ROW = re.compile(r"^\| `((?:cifar100|process)_\w+)` \| (\w+) \|([\w, ]*)\|", re.MULTILINE)


class Service:
    """A client, and the metrics as they were after some calls.

    Args:
        client: Client of the service.
    """

    def __init__(self, client: TestClient):
        self.client = client
        self.families: dict[str, Metric] = {}

    def read(self) -> None:
        self.families = {family.name: family for family in parse_text(self.client.get("/metrics").text)}

    def value(self, name: str, **labels: str) -> float:
        """Return the value of a sample, 0 if there is none with these labels."""
        samples = (sample for family in self.families.values() for sample in family.samples)
        return next((each.value for each in samples if (each.name, each.labels) == (name, labels)), 0.0)


@pytest.fixture(scope="module")
def service(published_store: Path, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service after calls of many kinds."""
    settings: dict[str, Any] = {"models": published_store, "runs": tmp_path_factory.mktemp("runs"), "api_keys": KEY}
    settings |= {"data": "synthetic:4", "max_predict_bytes": 100_000}
    small, photo = encode_png(dataset, 0), io.BytesIO()
    Image.new("RGB", (300, 200)).save(photo, "PNG")
    with make_local_client(create_app(Settings(**settings))) as client, pytest.MonkeyPatch.context() as patch:
        assert client.post("/predict", files={"file": small}).status_code == 200
        assert client.post("/predict", files=[("file", small), ("file", photo.getvalue())]).status_code == 200
        assert client.post("/predict", files={"file": b"no image"}).status_code == 415
        assert client.post("/predict", files=[("file", small)], params={"model": "vgg"}).status_code == 404
        assert client.post("/predict", content=bytes(200_000)).status_code == 413
        assert client.post("/train", json={"recipe": "resnet"}).status_code == 401
        measured = client.post("/evaluate", headers={"Authorization": f"Bearer {KEY}"}).json()
        assert measured["state"] == "succeeded"
        assert client.get("/static/main.js").status_code == 200
        assert client.get("/static/nothing.js").status_code == 404
        assert client.get("/nowhere").status_code == 404

        async def refuse(*_: Any) -> None:
            raise Unavailable("full", "queue_full")

        patch.setattr(services_of(client).pool.live()["resnet"].batcher, "run", refuse)
        assert client.post("/predict", files={"file": small}).status_code == 503
        service = Service(client)
        service.read()
        yield service


def test_images_count_by_model_and_outcome(service: Service) -> None:
    images = {
        (each.labels["model"], each.labels["outcome"]): each.value
        for each in service.families["cifar100_images"].samples
    }
    assert images == {
        ("resnet", "predicted"): 3,
        ("resnet", "rejected"): 1,
        ("resnet", "refused"): 1,
        ("unknown", "rejected"): 1,
    }
    assert service.value("cifar100_confidence_ratio_count", model="resnet") == 3


def test_refusals_count_by_reason(service: Service) -> None:
    refusals = {each.labels["reason"]: each.value for each in service.families["cifar100_refusals"].samples}
    assert refusals == {"too_large": 1, "unauthorized": 1, "queue_full": 1}


def test_every_request_counts_its_wait_and_every_image_its_decoding(service: Service) -> None:
    batches = service.value("cifar100_batch_seconds_count", model="resnet")
    assert service.value("cifar100_queue_seconds_count", model="resnet") == batches  # no two requests at once
    assert service.value("cifar100_decode_seconds_count", lane="batch") == 1
    assert service.value("cifar100_decode_seconds_count", lane="quick") == 2


def test_files_of_the_page_have_a_label_of_their_own(service: Service) -> None:
    for status in ("200", "404"):
        assert service.value("cifar100_requests_total", method="GET", route="/static", status=status) == 1
    assert service.value("cifar100_requests_total", method="GET", route="unknown", status="404") == 1


def test_models_jobs_and_process_are_described(service: Service) -> None:
    (info,) = service.families["cifar100_model_info"].samples
    assert info.labels == {"model": "resnet", "version": "1", "engine": "torchscript-cpu", "recipe": "resnet"}
    recorded = service.client.get("/models/resnet/1").json()["test"]["top1"]
    assert service.value("cifar100_model_accuracy_ratio", model="resnet") == recorded
    assert service.value("cifar100_evaluation_accuracy_ratio", model="resnet", version="1", split="test") == recorded
    assert service.value("cifar100_jobs", kind="evaluation", state="succeeded") == 1
    assert service.value("cifar100_model_load_seconds_count", model="resnet") == 1
    assert service.value("cifar100_requests_in_progress") == service.value("cifar100_ready") == 1
    assert service.value("process_cpu_seconds_total") > 0


def test_the_format_is_the_one_that_the_client_accepts_first(service: Service) -> None:
    def get(accept: str) -> httpx.Response:
        answer: httpx.Response = service.client.get("/metrics", headers={"Accept": accept})
        return answer

    prometheus = "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
    answer = get(prometheus)
    assert answer.headers["content-type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert {family.name for family in parse_openmetrics(answer.text)} == service.families.keys()
    for accept in ("text/plain, application/openmetrics-text", "*/*", "", "application/json;version=x"):
        answer = get(accept)
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert answer.headers["vary"] == "Accept"
        assert "# EOF" not in answer.text


def documented() -> dict[str, tuple[str, set[str]]]:
    """Return the type and the labels of every metric in the table of the documentation."""
    rows = ROW.findall((ROOT / "docs/operations.md").read_text())
    return {name: (kind, set(labels.replace(",", " ").split())) for name, kind, labels in rows}


def test_the_table_of_the_documentation_has_all_metrics(service: Service) -> None:
    table = documented()
    exposed = {f"{name}_total" if each.type == "counter" else name: each for name, each in service.families.items()}
    assert {name: kind for name, (kind, _) in table.items()} == {name: each.type for name, each in exposed.items()}
    for name, family in exposed.items():
        for sample in family.samples:
            assert sample.labels.keys() - {"le"} == table[name][1], name


def promtool(*arguments: str, given: str = "") -> str:
    """Return the output of promtool. It is part of Prometheus."""
    if not shutil.which("promtool"):
        pytest.skip("needs promtool")
    done = subprocess.run(["promtool", *arguments], input=given, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_promtool_finds_no_fault_in_the_metrics(service: Service) -> None:
    assert promtool("check", "metrics", given=service.client.get("/metrics").text) == ""


def test_promtool_finds_no_fault_in_the_alerts() -> None:
    promtool("check", "config", str(ROOT / "deploy/prometheus/prometheus.yml"))
    promtool("test", "rules", str(ROOT / "deploy/prometheus/alerts_test.yml"))


def test_every_alert_is_tested_and_has_a_section_in_the_documentation() -> None:
    rules, tests = (ROOT / f"deploy/prometheus/{name}.yml" for name in ("alerts", "alerts_test"))
    alerts = re.findall(r"alert: (\w+)", rules.read_text())
    assert alerts == sorted(set(re.findall(r"alertname: (\w+)", tests.read_text())), key=alerts.index)
    assert alerts == re.findall(r"^### (Cifar100\w+)$", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    assert re.findall(r"runbook: docs/operations.md#(\w+)", rules.read_text()) == [each.lower() for each in alerts]


def test_the_dashboard_and_the_alerts_use_only_metrics_and_labels_that_exist() -> None:
    labels = {"up": {"job", "instance"}}
    for name, (kind, own) in documented().items():
        parts = [f"{name}_{part}" for part in ("bucket", "sum", "count")] if kind == "histogram" else [name]
        labels |= dict.fromkeys(parts, own | {"job", "instance", "le"})
    for path in ("deploy/prometheus/alerts.yml", "deploy/grafana/dashboard.json"):
        text = (ROOT / path).read_text().replace('\\"', '"')
        used = re.findall(r"\b((?:cifar100_|process_|up\b)\w*)(?:\{([^}]*)\})?", text)
        assert used
        for name, selector in used:
            assert name in labels, path
            assert set(re.findall(r"(\w+) *(?:=|!)", selector)) <= labels[name], (path, name)


def test_the_dashboard_can_be_imported() -> None:
    dashboard = json.loads((ROOT / "deploy/grafana/dashboard.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert {each["name"] for each in dashboard["templating"]["list"]} == {"datasource", "job", "instance", "model"}
    cells = list[tuple[int, int]]()
    for panel in panels:
        place, targets = panel["gridPos"], panel.get("targets", [])
        assert all(each["datasource"]["uid"] == "${datasource}" for each in targets), panel["title"]
        assert place["x"] + place["w"] <= 24
        cells += [(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])]
    assert len(cells) == len(set(cells))


def test_no_update_is_lost_while_others_flush() -> None:
    registry, rounds = CollectorRegistry(), 5000
    counter = BufferedCounter("counted", "Updates.", registry=registry)
    histogram = BufferedHistogram("observed", "Updates.", buckets=(1, 2), registry=registry)

    def update() -> None:
        for _ in range(rounds):
            counter.inc(2)
            histogram.observe(1)
            histogram.observe(1.5)

    threads = [threading.Thread(target=update) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        counter.flush()
        histogram.flush()
    counter.flush()
    histogram.flush()
    assert registry.get_sample_value("counted_total") == 8 * rounds
    assert registry.get_sample_value("observed_bucket", {"le": "1.0"}) == 4 * rounds
    assert registry.get_sample_value("observed_count") == 8 * rounds
    assert registry.get_sample_value("observed_sum") == 10 * rounds
