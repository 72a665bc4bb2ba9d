"""Count the requests and batches of one loaded model version, for the statistics of the Open Inference Protocol.

The event loop counts requests and the engine thread counts batches. The counts begin when the version is loaded, and
are those of one server process.
"""

import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import ClassVar

from pydantic import ConfigDict

from app.inference.batching import BatchTimes


@dataclass(slots=True)
class Duration:
    """A number of events and the total time that they took."""

    __pydantic_config__: ClassVar = ConfigDict(use_attribute_docstrings=True)

    count: int = 0
    """Number of events."""
    ns: int = 0
    """Total time in nanoseconds."""

    def add(self, seconds: float, count: int = 1) -> None:
        """Count events that took `seconds` together."""
        self.count += count
        self.ns += round(seconds * 1e9)


@dataclass(slots=True)
class BatchSizeStatistics:
    """The batches of one size."""

    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)


class ModelStatistics:
    """Requests, batches and their times. Each batch counts its times once for each of its requests."""

    def __init__(self) -> None:
        self.last_inference_ms = 0
        """Time of the last successful request in milliseconds since 1970, 0 if there was none."""
        self.images = 0
        """Number of images of successful requests."""
        self.batches = 0
        self.success = Duration()
        self.fail = Duration()
        self.queue = Duration()
        self.compute_input = Duration()
        """Decoding, and the wait for a decoder."""
        self.compute_infer = Duration()
        self.by_size: defaultdict[int, BatchSizeStatistics] = defaultdict(BatchSizeStatistics)
        self._lock = threading.Lock()

    def count_batch(self, times: BatchTimes) -> None:
        """Count a batch that the engine has computed."""
        requests = len(times.waiting_s)
        with self._lock:
            self.batches += 1
            self.queue.add(sum(times.waiting_s), requests)
            self.compute_input.add(times.decoding_s * requests, requests)
            self.compute_infer.add(times.computing_s * requests, requests)
            by_size = self.by_size[times.images]
            by_size.compute_input.add(times.decoding_s)
            by_size.compute_infer.add(times.computing_s)

    def count_success(self, images: int, seconds: float, decoding_s: float) -> None:
        """Count a request.

        Args:
            images: Number of its images.
            seconds: Time from the end of its body to its scores.
            decoding_s: The part of it in which images were decoded before they joined a batch.
        """
        with self._lock:
            self.last_inference_ms = time.time_ns() // 1_000_000
            self.images += images
            self.success.add(seconds)
            self.compute_input.add(decoding_s, count=0)  # the batch counts the request

    def count_failure(self, seconds: float) -> None:
        """Count a request that has got an error."""
        with self._lock:
            self.fail.add(seconds)
