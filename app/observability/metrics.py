"""The metrics that events change: requests, images, batches, loads of models. `app.observability.state` adds the rest.

Several workers write their metrics to files in one folder. The worker that gets the request for /metrics sums them.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Literal

from prometheus_client import CollectorRegistry, Gauge, disable_created_metrics
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from app.exceptions import Unavailable
from app.inference.batching import BatchTimes
from app.inference.decoding import Lane
from app.observability.buffered import BufferedCounter, BufferedHistogram, Children
from app.observability.process import ProcessMetrics
from app.server.workers import METRICS

OPEN_METRICS = openmetrics.CONTENT_TYPE_LATEST
"""Media type of the OpenMetrics format."""

TEXT = CONTENT_TYPE_PLAIN_0_0_4
"""Media type of the Prometheus text format."""

ImageOutcome = Literal["predicted", "rejected", "refused", "failed", "abandoned"]
"""The end of an image of a prediction.

rejected: the client is at fault; refused: the service is overloaded, not ready or over a rate limit; failed: an
unexpected error; abandoned: the client has disconnected.
"""

_TYPES = tuple(each.partition(";")[0] for each in (OPEN_METRICS, TEXT))

_BUCKETS_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)
_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_SHORT_BUCKETS_S = (0.0001, 0.00025, 0.0005, *_BUCKETS_S)
_LOAD_BUCKETS_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
_BUCKETS_RATIO = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


class Metrics:
    """The metrics of one application and their registry."""

    def __init__(self) -> None:
        disable_created_metrics()  # several workers have no such series
        self.registry = CollectorRegistry()
        self.in_progress = 0
        """Number of requests in progress."""
        self._buffered: list[Children[BufferedCounter] | Children[BufferedHistogram]] = []
        self._process = ProcessMetrics(self.registry)
        self._requests = self._counter("cifar100_requests", "HTTP requests.", "method", "route", "status")
        self._request_seconds = self._histogram(
            "cifar100_request_seconds",
            "Time from a request's headers to the end of its answer.",
            _BUCKETS_S,
            "method",
            "route",
        )
        self._requests_in_progress = Gauge(
            "cifar100_requests_in_progress",
            "HTTP requests in progress, including this one.",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self._refusals = self._counter("cifar100_refusals", "Requests that are refused.", "reason")
        self._images = self._counter("cifar100_images", "Images of predictions.", "model", "outcome")
        self._confidence = self._histogram(
            "cifar100_confidence_ratio",
            "Probability of the most probable class of a predicted image.",
            _BUCKETS_RATIO,
            "model",
        )
        self._unfamiliar = self._counter(
            "cifar100_unfamiliar_images", "Predicted images that are probably none of the classes.", "model"
        )
        self._queue_seconds = self._histogram(
            "cifar100_queue_seconds", "Time that a request has waited for its batch.", _SHORT_BUCKETS_S, "model"
        )
        self._queued = Gauge(
            "cifar100_queued_images",
            "Images waiting for the engine.",
            ("model",),
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self._decode_seconds = self._histogram(
            "cifar100_decode_seconds",
            "Time from the request for an image's pixels to the pixels; in the lane batch, of all images of a batch.",
            _SHORT_BUCKETS_S,
            "lane",
        )
        self._undecoded = Gauge(
            "cifar100_undecoded_images",
            "Images of current requests that are not decoded yet.",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self._batch_images = self._histogram(
            "cifar100_batch_images", "Images that were computed together.", _BUCKETS_IMAGES, "model"
        )
        self._batch_seconds = self._histogram(
            "cifar100_batch_seconds", "Time that the engine took for a batch.", _BUCKETS_S, "model"
        )
        self._cascade_images = self._counter("cifar100_cascade_images", "Images that a cascade has received.", "model")
        self._sent_on_images = self._counter(
            "cifar100_sent_on_images", "Images that a cascade has sent on to its second member.", "model"
        )
        self._load_seconds = self._histogram(
            "cifar100_model_load_seconds", "Time to load a version and compare its engine.", _LOAD_BUCKETS_S, "model"
        )
        self._load_failures = self._counter(
            "cifar100_model_load_failures", "Versions that could not be loaded.", "model"
        )
        self._ready = Gauge(
            "cifar100_ready",
            "1 if every server process should get requests, else 0.",
            registry=self.registry,
            multiprocess_mode="livemin",
        )

    def count_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request and its time."""
        self._requests[method, route, status].inc()
        self._request_seconds[method, route].observe(seconds)

    def count_refusal(self, reason: str) -> None:
        """Count a refused request."""
        self._refusals[reason,].inc()

    def count_shed(self, route: str, reason: str) -> None:
        """Count a prediction that was refused with 503 before it reached the application, by the path of its route."""
        self._requests["POST", route, Unavailable.status.value].inc()
        self.count_refusal(reason)

    def count_predictions(self, model: str, confidence: Sequence[float], unfamiliar: int) -> None:
        """Count the predicted images of a request.

        Args:
            model: Name of the model.
            confidence: Probability of the most probable class of each image.
            unfamiliar: Number of images that are probably none of the classes.
        """
        self._images[model, "predicted"].inc(len(confidence))
        observe = self._confidence[model,].observe
        for probability in confidence:
            observe(probability)
        if unfamiliar:
            self._unfamiliar[model,].inc(unfamiliar)

    def count_images(self, model: str, outcome: ImageOutcome, images: int) -> None:
        """Count images that were not predicted."""
        self._images[model, outcome].inc(images)

    def observe_decoding(self, lane: Lane | Literal["batch"], seconds: float) -> None:
        """Count a decoded image, or the small images of a batch, which are decoded in the thread that computes it."""
        self._decode_seconds[lane,].observe(seconds)

    def observe_batch(self, model: str, times: BatchTimes) -> None:
        """Count a batch that an engine has computed."""
        self._batch_images[model,].observe(times.images)
        self._batch_seconds[model,].observe(times.computing_s)
        observe = self._queue_seconds[model,].observe
        for waiting_s in times.waiting_s:
            observe(waiting_s)
        if times.has_decoded:
            self.observe_decoding("batch", times.decoding_s)

    def observe_cascade(self, model: str, images: int, sent_on: int) -> None:
        """Count the images of a request to a cascade, and those that are sent on to its second member."""
        self._cascade_images[model,].inc(images)
        self._sent_on_images[model,].inc(sent_on)

    def observe_load(self, model: str, seconds: float) -> None:
        """Count a version that was loaded."""
        self._load_seconds[model,].observe(seconds)

    def count_load_failure(self, model: str) -> None:
        """Count a version that could not be loaded."""
        self._load_failures[model,].inc()

    def sample(self, ready: bool, queued: Mapping[str, int], undecoded: int) -> None:
        """Set the gauges of this process, and flush its counts. Other workers read both from its files.

        Args:
            ready: True if this process should get requests.
            queued: Number of images that wait for the engine, by model.
            undecoded: Number of images that wait for a decoder.
        """
        self._ready.set(ready)
        self._requests_in_progress.set(self.in_progress)
        self._undecoded.set(undecoded)
        for model, images in queued.items():
            self._queued.labels(model).set(images)
        self._process.sample()
        self.flush()

    def flush(self) -> None:
        """Flush the counters and histograms of this process."""
        for children in self._buffered:
            children.flush()

    def render(self, accepted: str, state: Iterable[Metric]) -> tuple[bytes, str]:
        """Return the metrics of all workers, and their media type.

        Args:
            accepted: Header Accept of the request. The format is OpenMetrics if it names that before the text format.
            state: Further metrics.
        """
        events: Collector = MultiProcessCollector(None) if METRICS in os.environ else self.registry
        everything = _Snapshot(chain(events.collect(), state))
        types = (each.partition(";")[0].strip() for each in accepted.split(","))
        if next((each for each in types if each in _TYPES), None) == _TYPES[0]:
            return openmetrics.generate_latest(everything), OPEN_METRICS
        return generate_latest(everything), TEXT

    def _counter(self, name: str, documentation: str, *labels: str) -> Children[BufferedCounter]:
        children = Children(BufferedCounter(name, documentation, labels, registry=self.registry).labels)
        self._buffered.append(children)
        return children

    def _histogram(
        self, name: str, documentation: str, buckets: Sequence[float], *labels: str
    ) -> Children[BufferedHistogram]:
        histogram = BufferedHistogram(name, documentation, labels, buckets=buckets, registry=self.registry)
        children = Children(histogram.labels)
        self._buffered.append(children)
        return children


class _Snapshot(Collector):
    """A collector of metrics that were collected already."""

    def __init__(self, metrics: Iterable[Metric]):
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Return the metrics."""
        yield from self._metrics
