"""Test traces: the spans of predictions, the W3C context, the export over OTLP, and that nothing is loaded if off."""

import io
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from cascades import add_cascade, add_second_member
from fastapi.testclient import TestClient
from local_client import make_local_client
from PIL import Image

from app.main import create_app
from app.observability.tracing import Tracing, tracing_from_environment
from app.settings import Settings
from training.store import LocalStore

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"


def test_nothing_of_the_sdk_is_loaded_while_traces_are_off(tmp_path: Path) -> None:
    code = """
import sys
from app.main import create_app
from app.settings import Settings
app = create_app(Settings(models=sys.argv[1], runs=sys.argv[1]))
assert app.state.services.tracing is None
print([name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))])
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("variables", "fault"),
    [
        ({}, None),
        ({"OTEL_SERVICE_NAME": "web"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_SDK_DISABLED": "true"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_TRACES_EXPORTER": "none"}, None),
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER=zipkin is not supported"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "protocol grpc is not supported"),
    ],
)
def test_traces_are_off_unless_the_environment_asks_for_them(
    variables: dict[str, str], fault: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert tracing_from_environment("1") is None
    assert (fault in caplog.text) if fault else not caplog.records


def test_a_missing_extra_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    assert tracing_from_environment("1") is None
    assert "pip install 'cifar100[otel]'" in caplog.text


class Traced:
    """A client of a service with a cascade, whose spans stay in memory.

    Args:
        client: The client.
        exporter: The exporter with the finished spans.
    """

    def __init__(self, client: TestClient, exporter: Any):
        self.client = client
        self._exporter = exporter

    def predict(self, image: bytes, traceparent: str = SAMPLED, model: str = "resnet") -> list[Any]:
        """Predict an image, and return the spans of the request in the order of their starts."""
        self._exporter.clear()
        headers = {"traceparent": traceparent, "Content-Type": "image/png"}
        self.client.post("/predict", content=image, headers=headers, params={"model": model})
        return sorted(self._exporter.get_finished_spans(), key=lambda span: span.start_time)


@pytest.fixture(scope="module")
def traced(published_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    folder = tmp_path_factory.mktemp("traced")
    store = LocalStore(shutil.copytree(published_store, folder / "models"))
    add_second_member(store)
    add_cascade(store)
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    settings = Settings(models=store.root, runs=folder / "runs", deadline_s=600)
    with make_local_client(create_app(settings, Tracing(provider))) as client:
        yield Traced(client, exporter)


def test_a_prediction_has_a_span_for_each_of_its_parts(traced: Traced, image: bytes) -> None:
    request, queue, decode, engine = traced.predict(image)
    assert [span.name for span in (request, queue, decode, engine)] == ["POST /predict", "queue", "decode", "engine"]
    assert {f"{span.context.trace_id:032x}" for span in (request, queue, decode, engine)} == {TRACE}
    assert f"{request.parent.span_id:016x}" == PARENT
    assert {span.parent.span_id for span in (queue, decode, engine)} == {request.context.span_id}
    assert request.attributes["http.request.method"] == "POST"
    assert request.attributes["http.route"] == "/predict"
    assert request.attributes["http.response.status_code"] == 200
    assert decode.attributes == {"cifar100.decoder.lane": "batch"}
    assert engine.attributes == {
        "cifar100.model.name": "resnet",
        "cifar100.model.version": 1,
        "cifar100.engine": "torchscript-cpu",
        "cifar100.batch.images": 1,
    }
    assert request.start_time <= queue.start_time <= queue.end_time == decode.start_time
    assert decode.end_time == engine.start_time < engine.end_time <= request.end_time


def test_the_second_part_of_a_cascade_has_a_span_of_its_own(traced: Traced, image: bytes) -> None:
    request, *first, cascade, queue, engine = traced.predict(image, model="cascade")
    assert [span.name for span in first] == ["queue", "decode", "engine"]
    assert (cascade.name, cascade.parent.span_id) == ("cascade", request.context.span_id)
    assert [span.name for span in (queue, engine)] == ["queue", "engine"]
    assert {span.parent.span_id for span in (queue, engine)} == {cascade.context.span_id}
    assert engine.attributes["cifar100.model.name"] == "resnet18"


def test_an_image_that_is_decoded_in_a_thread_has_a_span_before_its_batch(traced: Traced) -> None:
    content = io.BytesIO()
    Image.new("RGB", (300, 200)).save(content, "PNG")
    _, decode, queue, engine = traced.predict(content.getvalue())
    assert (decode.name, decode.attributes) == ("decode", {"cifar100.decoder.lane": "quick"})
    assert [span.name for span in (queue, engine)] == ["queue", "engine"]


def test_requests_that_are_not_sampled_and_probes_have_no_spans(traced: Traced, image: bytes) -> None:
    assert traced.predict(image, UNSAMPLED) == []
    for path in ("/health/live", "/health/ready", "/metrics"):
        assert traced.client.get(path).status_code == 200
    assert traced.predict(image, UNSAMPLED) == []


def test_the_log_line_of_a_request_has_its_trace(
    traced: Traced, image: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    traced.predict(image)
    (line,) = (record for record in caplog.records if record.message == "POST /predict 200")
    assert line.__dict__["trace_id"] == TRACE


class Collector(BaseHTTPRequestHandler):
    """A collector of OpenTelemetry, which keeps the bodies of its requests."""

    received: ClassVar[list[bytes]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if (self.path, self.headers["Content-Type"]) == ("/v1/traces", "application/x-protobuf"):
            self.received.append(body)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


def test_spans_are_exported_over_otlp(
    models: Path, tmp_path: Path, image: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=tests")
        with make_local_client(create_app(Settings(models=models, runs=tmp_path / "runs"))) as client:
            client.post("/predict", files={"file": image}, headers={"traceparent": SAMPLED})
        collector.shutdown()
    (body,) = Collector.received  # the service exports the remaining spans when it stops
    (exported,) = service.ExportTraceServiceRequest.FromString(body).resource_spans
    resource = {each.key: each.value.string_value for each in exported.resource.attributes}
    assert (resource["service.name"], resource["deployment.environment.name"]) == ("cifar100", "tests")
    spans = [span for scope in exported.scope_spans for span in scope.spans]
    assert sorted(span.name for span in spans) == ["POST /predict", "decode", "engine", "queue"]
    assert {span.trace_id.hex() for span in spans} == {TRACE}
