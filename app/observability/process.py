"""The metrics of the server processes under their usual names, such as `process_cpu_seconds_total`.

With several workers, each metric has the sum over the workers, and the start time is that of the oldest one. CPU time
of workers that have ended counts as well. The supervisor and training processes are left out. Linux only: elsewhere
only the number of processes is known.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector
from prometheus_client.metrics_core import Metric

_CPU = "process_cpu_seconds"
_START = "process_start_time_seconds"


class ProcessMetrics:
    """The metrics of this process, which `MultiProcessCollector` adds to those of other workers.

    Args:
        registry: Registry of the metrics.
    """

    def __init__(self, registry: CollectorRegistry):
        self._collector = ProcessCollector(registry=None)
        self._cpu_s = 0.0
        self._cpu: Counter | None = None
        self._gauges: dict[str, Gauge] = {}
        for metric in self._collector.collect():
            if metric.name == _CPU:
                self._cpu = Counter(_CPU, metric.documentation, registry=registry)
            else:
                self._gauges[metric.name] = Gauge(
                    metric.name,
                    metric.documentation,
                    registry=registry,
                    multiprocess_mode="livemin" if metric.name == _START else "livesum",
                )
        Gauge("cifar100_workers", "Server processes.", registry=registry, multiprocess_mode="livesum").set(1)
        Counter("cifar100_worker_starts", "Server processes that have started.", registry=registry).inc()

    def sample(self) -> None:
        """Read the current values from the operating system."""
        for metric in self._collector.collect():
            value = _value(metric)
            if metric.name in self._gauges:
                self._gauges[metric.name].set(value)
            elif self._cpu:
                self._cpu.inc(max(0.0, value - self._cpu_s))
                self._cpu_s = value


def _value(metric: Metric) -> float:
    return float(metric.samples[0].value)
