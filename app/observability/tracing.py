"""Traces of requests for OpenTelemetry, if the environment asks for them and the extra `otel` is installed.

    HTTP request --+-- decode
                   +-- queue, decode, engine    the batch that had the request's images
                   +-- cascade                  the images that are sent on
                        +-- queue, engine       their batch for the second member

FastAPI makes the span of the HTTP request, and continues the trace that the header `traceparent` names. Nothing of the
SDK is imported unless it is needed.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from app.inference.batching import BatchTimes

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

log = logging.getLogger(__name__)

_SERVICE = "cifar100"
_PROTOCOL = "http/protobuf"
_CLOSE_S = 3.0  # by default, the exporter retries for 10 s


class Tracing:
    """The spans of the parts of a request. A request that is not sampled has none.

    Args:
        provider: Source of the tracer. `close` shuts it down.
    """

    def __init__(self, provider: "TracerProvider"):
        from opentelemetry import trace

        self.provider = provider
        self._tracer = provider.get_tracer(_SERVICE)
        self._current = trace.get_current_span

    @contextmanager
    def span(self, name: str, images: int) -> Iterator[None]:
        """Make a span of the current request. Its status is an error if the body raises an exception.

        Args:
            name: Name of the span.
            images: Number of images that it is about.
        """
        if not self._current().is_recording():
            yield
            return
        with self._tracer.start_as_current_span(name, attributes=_prefix({"images": images})):
            yield

    def record_decoding(self, lane: str, started: float, ended: float) -> None:
        """Record that an image of the current request was decoded, by times of `time.perf_counter`."""
        if self._current().is_recording():
            self._record("decode", _clock(started), _clock(ended), {"decoder.lane": lane})

    def record_batch(self, model: str, version: int, engine: str, arrived: float, times: BatchTimes) -> None:
        """Record the way of the current request through a batch.

        Args:
            model: Name of the model.
            version: Version of the model.
            engine: Name of its engine.
            arrived: Time of `time.perf_counter` at which the request joined the queue.
            times: Times of the batch.
        """
        if not self._current().is_recording():
            return
        of_model: dict[str, str | int] = {"model.name": model, "model.version": version}
        of_batch = of_model | {"engine": engine, "batch.images": times.images}
        started = _clock(times.started)
        decoded = started + round(times.decoding_s * 1e9)
        self._record("queue", _clock(arrived), started, of_model)
        if times.has_decoded:
            self._record("decode", started, decoded, {"decoder.lane": "batch"})
        self._record("engine", decoded, decoded + round(times.computing_s * 1e9), of_batch)

    def _record(self, name: str, started_ns: int, ended_ns: int, attributes: dict[str, str | int]) -> None:
        span = self._tracer.start_span(name, attributes=_prefix(attributes), start_time=started_ns)
        span.end(ended_ns)

    def trace_id(self) -> str:
        """Return the id of the current trace, 32 hexadecimal digits. It is 0 for a request without a trace."""
        return f"{self._current().get_span_context().trace_id:032x}"

    def close(self) -> None:
        """Export the finished spans. A collector that does not answer within 3 s loses them."""
        thread = threading.Thread(target=self.provider.shutdown, name="tracing", daemon=True)
        thread.start()
        thread.join(_CLOSE_S)


def _clock(performance_s: float) -> int:
    """Return a time of `time.perf_counter` as nanoseconds since 1970."""
    return time.time_ns() - time.perf_counter_ns() + round(performance_s * 1e9)


def _prefix(attributes: dict[str, str | int]) -> dict[str, str | int]:
    return {f"{_SERVICE}.{name}": value for name, value in attributes.items()}


def tracing_from_environment(version: str) -> Tracing | None:
    """Return tracing as the standard variables `OTEL_...` configure it, or None if they do not ask for it.

    Traces are off unless `OTEL_TRACES_EXPORTER` is otlp, or an endpoint for OTLP is given. A request that cannot be
    met is logged, and the service runs without traces.

    Args:
        version: Version of the service.
    """
    fault = _find_fault() if _is_wanted() else ""
    if fault is None:
        try:
            return Tracing(_create_provider(version))
        except ImportError as error:
            fault = f"{error}; install the extra: pip install 'cifar100[otel]'"
    if fault:
        log.warning("the environment asks for traces, but there are none: %s", fault)
    return None


def _is_wanted() -> bool:
    exporter, endpoint = os.environ.get("OTEL_TRACES_EXPORTER", ""), _variable("ENDPOINT")
    is_off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or exporter == "none"
    return bool(exporter or endpoint) and not is_off


def _find_fault() -> str | None:
    """Return why the traces that the environment asks for cannot be exported, or None."""
    exporter, protocol = os.environ.get("OTEL_TRACES_EXPORTER") or "otlp", _variable("PROTOCOL") or _PROTOCOL
    if exporter != "otlp":
        return f"OTEL_TRACES_EXPORTER={exporter} is not supported; use otlp"
    if protocol != _PROTOCOL:
        return f"the protocol {protocol} is not supported; set OTEL_EXPORTER_OTLP_PROTOCOL={_PROTOCOL}"
    return None


def _variable(name: str) -> str:
    """Return a variable of the exporter for traces, or else that for all signals."""
    own = os.environ.get(f"OTEL_EXPORTER_OTLP_TRACES_{name}", "")
    return own or os.environ.get(f"OTEL_EXPORTER_OTLP_{name}", "")


def _create_provider(version: str) -> "TracerProvider":
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.name": _SERVICE, "service.version": version})
    resource = resource.merge(OTELResourceDetector().detect())  # the environment has the last word
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
