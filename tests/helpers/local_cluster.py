"""A Ray cluster on this machine, to which this process is connected."""

import gc
import importlib
import secrets
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

CPUS = 2


@contextmanager
def run_cluster() -> Iterator[None]:
    """Start a cluster with two CPUs, and end it. Services in this process use it."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as environment:
        warnings.simplefilter("ignore")
        for name, value in (("RAY_AUTH_TOKEN", secrets.token_hex(32)), ("OMP_NUM_THREADS", "1")):
            environment.setenv(name, value)
        import app.distributed.cluster  # noqa: F401  imports Ray with the variables that it needs

        ray = importlib.import_module("ray")
        handler = signal.getsignal(signal.SIGTERM)
        quiet = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False}
        ray.init(address="local", num_cpus=CPUS, object_store_memory=80 << 20, **quiet)
        try:
            yield
        finally:
            ray.shutdown()
            gc.collect()  # Ray does not wait for its processes, and their objects warn about that
            signal.signal(signal.SIGTERM, handler)
