"""A Ray cluster on this machine, to which this process is connected."""

import gc
import importlib
import os
import secrets
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

CPUS = 2


@contextmanager
def run_cluster() -> Iterator[None]:
    """Start a cluster with two CPUs, and end it. Services in this process use it."""
    with warnings.catch_warnings(), mock.patch.dict(os.environ, RAY_AUTH_TOKEN=secrets.token_hex(32)):
        warnings.simplefilter("ignore")
        import app.distributed.cluster  # noqa: F401  imports Ray with the variables that it needs

        ray = importlib.import_module("ray")
        handler = signal.getsignal(signal.SIGTERM)
        quiet = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False}
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""):
            ray.init(address="local", num_cpus=CPUS, object_store_memory=80 << 20, **quiet)
        try:
            yield
        finally:
            ray.shutdown()
            gc.collect()  # Ray does not wait for its processes, and their objects warn about that
            signal.signal(signal.SIGTERM, handler)
