"""The metrics that are read from the state of the service when Prometheus asks: models, jobs, versions of software.

With several workers, the worker that gets the request describes the models that it serves. All workers, and all servers
on the same runs folder, have the same jobs.
"""

import platform
from collections.abc import Iterable, Iterator
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import get_args

from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from app.inference.pool import ModelPool
from app.jobs.overview import KINDS, JobOverview
from app.jobs.queue import State
from training.run import RunPhase

_Sample = tuple[Iterable[object], float]  # label values and value


def describe_build() -> Iterator[Metric]:
    """Yield the versions of the service and of the libraries that compute."""
    names = ("version", "python", "torch", "openvino")
    yield _gauge("cifar100_build_info", "Versions of the service and its libraries; 1.", names, [(_build(), 1)])


def describe_models(pool: ModelPool) -> Iterator[Metric]:
    """Yield the versions, engines and accuracies of the live models."""
    live = sorted(pool.live().items())
    cards = {name: model.card for name, model in live}
    yield _gauge(
        "cifar100_live_version",
        "Version that is served.",
        ("model",),
        [((name,), card.version) for name, card in cards.items()],
    )
    yield _gauge(
        "cifar100_model_info",
        "Version, engine and recipe of a live model; 1.",
        ("model", "version", "engine", "recipe"),
        [
            ((name, model.card.version, model.batcher.engine_name, model.card.recipe.get("name", "unknown")), 1)
            for name, model in live
        ],
    )
    yield _gauge(
        "cifar100_model_loaded_timestamp_seconds",
        "Time at which the live version was loaded.",
        ("model",),
        [((name,), model.loaded.timestamp()) for name, model in live],
    )
    yield _gauge(
        "cifar100_model_accuracy_ratio",
        "Accuracy of the live version on the test set, as recorded in its card.",
        ("model",),
        [((name,), card.test.top1) for name, card in cards.items()],
    )
    yield _gauge(
        "cifar100_unserved_models",
        "Models whose live version is not served; GET /health has the reasons.",
        (),
        [((), len(pool.errors))],
    )


def describe_jobs(overview: JobOverview | None) -> Iterator[Metric]:
    """Yield the states, progress and results of jobs.

    Args:
        overview: The jobs. None if the job database cannot be read.
    """
    yield _gauge(
        "cifar100_job_database_up", "1 if the job database can be read, else 0.", (), [((), overview is not None)]
    )
    if overview is None:
        return
    running, succeeded = overview.running.items(), overview.succeeded.items()
    yield _gauge(
        "cifar100_jobs",
        "Jobs by kind and state.",
        ("kind", "state"),
        [((kind, state), overview.counts.get((kind, state), 0)) for kind in KINDS for state in State],
    )
    yield _gauge(
        "cifar100_job_phase",
        "1 for the phase of the running job, else 0.",
        ("kind", "phase"),
        [((kind, phase), phase == job.phase) for kind, job in running for phase in get_args(RunPhase)],
    )
    yield _gauge(
        "cifar100_job_progress_ratio",
        "Part of the epochs or images of the running job that is done.",
        ("kind",),
        [((kind,), job.progress) for kind, job in running],
    )
    yield _gauge(
        "cifar100_job_elapsed_seconds",
        "Time since the running job first ran.",
        ("kind",),
        [((kind,), job.elapsed_s) for kind, job in running],
    )
    yield _gauge(
        "cifar100_job_remaining_seconds",
        "Estimated time until the end of the running job.",
        ("kind",),
        [((kind,), job.remaining_s) for kind, job in running if job.remaining_s is not None],
    )
    yield _gauge(
        "cifar100_job_duration_seconds",
        "Duration of the latest job that has succeeded.",
        ("kind",),
        [((kind,), job.duration_s) for kind, job in succeeded],
    )
    yield _gauge(
        "cifar100_job_success_timestamp_seconds",
        "End of the latest job that has succeeded.",
        ("kind",),
        [((kind,), job.finished.timestamp()) for kind, job in succeeded],
    )
    yield _gauge(
        "cifar100_evaluation_accuracy_ratio",
        "Accuracy that the latest evaluation of all images of a source has measured.",
        ("model", "version", "split"),
        [((each.model, each.version, each.split), each.top1) for each in overview.accuracies],
    )


def _gauge(name: str, documentation: str, labels: Iterable[str], samples: Iterable[_Sample]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, documentation, labels=tuple(labels))
    for values, value in samples:
        family.add_metric([str(each) for each in values], value)
    return family


@lru_cache(1)
def _build() -> tuple[str, ...]:
    """Return the versions of the service, Python, PyTorch and OpenVINO; "none" for one that is not installed."""
    return (_installed("cifar100"), platform.python_version(), _installed("torch"), _installed("openvino"))


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
