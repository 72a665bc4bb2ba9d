"""Counters and histograms that every request may update: their values change only when they are flushed.

    inc, observe -> numbers in this process --flush--> values of prometheus_client: memory, or the file of a worker

An update takes a fraction of a microsecond. An update of prometheus_client takes one or two, and more with several
workers, because it writes to a file that is mapped into memory.
"""

import threading
from bisect import bisect_left
from collections.abc import Callable
from typing import TypeVar

from prometheus_client import Counter, Histogram
from typing_extensions import override


class BufferedCounter(Counter):
    """A counter whose increments count after `flush`."""

    @override
    def _metric_init(self) -> None:
        super()._metric_init()
        self._adding = threading.Lock()
        self._pending = 0.0

    @override
    def inc(self, amount: float = 1, exemplar: dict[str, str] | None = None) -> None:
        """Add an amount, which is at least 0."""
        with self._adding:
            self._pending += amount

    def flush(self) -> None:
        """Count the pending amount."""
        with self._adding:
            amount, self._pending = self._pending, 0.0
        self._value.inc(amount)


class BufferedHistogram(Histogram):
    """A histogram whose observations count after `flush`."""

    @override
    def _metric_init(self) -> None:
        super()._metric_init()
        self._adding = threading.Lock()
        self._pending = [0] * len(self._upper_bounds)
        self._pending_sum = 0.0

    @override
    def observe(self, amount: float, exemplar: dict[str, str] | None = None) -> None:
        """Observe an amount."""
        with self._adding:
            self._pending[bisect_left(self._upper_bounds, amount)] += 1
            self._pending_sum += amount

    def flush(self) -> None:
        """Count the pending observations."""
        with self._adding:
            counts, self._pending = self._pending, [0] * len(self._upper_bounds)
            amount, self._pending_sum = self._pending_sum, 0.0
        for bucket, count in zip(self._buckets, counts, strict=True):
            if count:
                bucket.inc(count)
        self._sum.inc(amount)


Child = TypeVar("Child", bound=BufferedCounter | BufferedHistogram)


class Children(dict[tuple[str | int, ...], Child]):
    """The children of a metric by their label values. `MetricWrapperBase.labels` takes a microsecond longer.

    Args:
        find: The method `labels` of a metric.
    """

    def __init__(self, find: Callable[..., Child]):
        super().__init__()
        self._find = find

    def __missing__(self, labels: tuple[str | int, ...]) -> Child:
        child = self[labels] = self._find(*labels)
        return child

    def flush(self) -> None:
        """Flush all children."""
        for child in list(self.values()):  # a thread may add one
            child.flush()
