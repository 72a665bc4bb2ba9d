"""Collects Prometheus metrics: requests by route and status, latency, queues, batches, live versions.

Several workers write their metrics to files in one folder. The worker that gets the request for /metrics sums them.
"""

import asyncio
import os
import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.exceptions import Unavailable
from app.inference.batching import BatchTimes
from app.inference.pool import ModelPool
from app.middleware.request_log import CLIENT_CLOSED_REQUEST
from app.server.workers import METRICS

_SAMPLE_S = 1.0
_BUCKETS_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)
_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """The metrics of one application and their registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.version = Gauge(
            "cifar100_live_version",
            "Version that is served.",
            ("model",),
            registry=self.registry,
            multiprocess_mode="livemostrecent",
        )
        self.queued = Gauge(
            "cifar100_queued_images",
            "Images waiting for the engine.",
            ("model",),
            registry=self.registry,
            multiprocess_mode="livesum",
        )
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

        self.batch_images = Histogram(
            "cifar100_batch_images",
            "Images that were computed together.",
            ("model",),
            buckets=_BUCKETS_IMAGES,
            registry=self.registry,
        )
        self.batch_seconds = Histogram(
            "cifar100_batch_seconds",
            "Time that the engine took for a batch.",
            ("model",),
            buckets=_BUCKETS_S,
            registry=self.registry,
        )

        self.cascade_images = Counter(
            "cifar100_cascade_images", "Images that a cascade has received.", ("model",), registry=self.registry
        )
        self.sent_on_images = Counter(
            "cifar100_sent_on_images",
            "Images that a cascade has sent on to its second member.",
            ("model",),
            registry=self.registry,
        )

    def observe_batch(self, model: str, times: BatchTimes) -> None:
        """Count a batch that an engine has computed."""
        self.batch_images.labels(model).observe(times.images)
        self.batch_seconds.labels(model).observe(times.computing_s)

    def observe_cascade(self, model: str, images: int, sent_on: int) -> None:
        """Count the images of a request to a cascade, and those that are sent on to its second member."""
        self.cascade_images.labels(model).inc(images)
        self.sent_on_images.labels(model).inc(sent_on)

    def count_shed(self, route: str) -> None:
        """Count a prediction that was refused with 503 before it reached the application, by the path of its route."""
        self.requests.labels("POST", route, str(Unavailable.status.value)).inc()

    def render(self, pool: ModelPool) -> bytes:
        """Return the metrics of all workers in the Prometheus text format."""
        self._sample(pool)
        registry = self.registry
        if METRICS in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)
        return generate_latest(registry)

    async def sample_periodically(self, pool: ModelPool) -> None:
        """Update the gauges of this process every second, so that other workers can read them."""
        while True:
            self._sample(pool)
            await asyncio.sleep(_SAMPLE_S)

    def _sample(self, pool: ModelPool) -> None:
        for name, model in pool.live().items():
            self.version.labels(name).set(model.card.version)
            self.queued.labels(name).set(model.batcher.waiting)


class MetricsMiddleware:
    """ASGI middleware that counts and times every request."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, then count it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        status = CLIENT_CLOSED_REQUEST

        async def send_and_note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_note_status)
        finally:
            # The label is the route's pattern, not the path, so that the number of label values is bounded.
            route = getattr(scope.get("route"), "path", "unknown")
            self.metrics.requests.labels(scope["method"], route, str(status)).inc()
            self.metrics.latency.labels(scope["method"], route).observe(time.perf_counter() - started)
