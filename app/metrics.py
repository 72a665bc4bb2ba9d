"""Prometheus metrics: requests by route and status, latency, queues, live versions."""

import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.pool import Pool

_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """The registry of one application."""

    def __init__(self, pool: Pool):
        self.registry = CollectorRegistry()
        self.registry.register(_Models(pool))
        self.requests = Counter(
            "cifar100_requests", "HTTP requests.", ("method", "route", "status"), registry=self.registry
        )
        self.latency = Histogram(
            "cifar100_request_seconds",
            "Time from a request's headers to the end of its answer.",
            ("method", "route"),
            buckets=_BUCKETS_S,
            registry=self.registry,
        )

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


class _Models(Collector):
    def __init__(self, pool: Pool):
        self.pool = pool

    def collect(self) -> Iterable[Metric]:
        version = GaugeMetricFamily("cifar100_live_version", "Version that is served.", labels=("model",))
        queued = GaugeMetricFamily("cifar100_queued_images", "Images waiting for the engine.", labels=("model",))
        for name, model in self.pool.live().items():
            version.add_metric((name,), model.card.version)
            queued.add_metric((name,), model.batcher.queued)
        yield version
        yield queued


class Measured:
    """ASGI middleware: counts and times every request."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            # The route's pattern, not the path: the number of label values stays bounded.
            route = getattr(scope.get("route"), "path", "unknown")
            self.metrics.requests.labels(scope["method"], route, str(status)).inc()
            self.metrics.latency.labels(scope["method"], route).observe(time.perf_counter() - started)
