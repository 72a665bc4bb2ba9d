"""A replica: one process of the cluster that computes one version of a model, with a `Batcher` of its own.

Input: pixels from several HTTP processes. Output: logits, and the times of the batch that computed them.
"""

import sys
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch

from app.exceptions import Unavailable
from app.inference.batching import Batcher, BatchTimes, Images, Logits, Probabilities
from app.inference.model_check import check_fit
from training.runtimes import Device, Runtime, selection
from training.store import MODEL, open_store


@dataclass(frozen=True)
class ReplicaOptions:
    """The version that a replica loads, and the sizes of its batches."""

    models: str
    """Location of the model store, see `training.store.make_store`. Every node of the cluster can open it."""
    name: str
    """Name of the model."""
    version: int
    """Version of the model, which is no cascade."""
    device: Device
    """See `Settings.device`."""
    runtime: Runtime
    """See `Settings.runtime`."""
    threads: int
    """Number of threads that compute on a CPU."""
    max_batch: int
    """Largest number of images in a batch."""
    max_requests: int
    """Largest number of requests that the cluster sends to the replica at the same time."""


class Answer(NamedTuple):
    """The logits of one request, and the times of its batch."""

    logits: Logits
    """float32 [N, classes]."""
    queue_s: float
    """Seconds that the request waited in the queue of the replica."""
    times: BatchTimes
    """Times of the batch. `started` is a time of the replica's clock."""
    is_first: bool
    """True for the first request of the batch. Its HTTP process counts the batch in the metrics."""


class Refusal(NamedTuple):
    """The reason why a replica has not computed a request."""

    detail: str


class EngineReplica:
    """The engine of one version of a model, and its queue.

    Args:
        options: The version and the sizes.

    Raises:
        StoreError: The node does not have the store, or the version is missing, damaged or does not fit its card.
        EngineError: No runtime can compute the version.
    """

    def __init__(self, options: ReplicaOptions):
        store = open_store(options.models)
        card = store.card(options.name, options.version)
        torch.set_num_threads(options.threads)
        model = store.verify(card) / MODEL
        engine = selection.load(model, options.device, options.runtime, threads=options.threads)
        check_fit(card, engine)
        # The HTTP processes bound the images in flight, and the cluster bounds the requests of a replica.
        self._batcher = Batcher(engine, options.max_batch, max_queue=sys.maxsize)

    def engine_name(self) -> str:
        """Return the name of the engine, such as openvino-int8."""
        return self._batcher.engine_name

    async def infer(self, pixels: Images, timeout_s: float | None) -> Answer | Refusal:
        """Compute the logits of images.

        Args:
            pixels: At most `max_batch` images, uint8 [N, 3, 32, 32].
            timeout_s: Seconds until the request is refused if its batch has not started. None for no limit.
        """
        arrived = time.perf_counter()
        try:
            # Ray delivers read-only arrays in shared memory, which PyTorch warns about.
            scores = await self._batcher.run(pixels.copy(), _deadline(timeout_s), accepted=True)
        except Unavailable as error:
            return Refusal(error.detail)
        times = scores.output.times
        assert times, "an engine has computed the batch"  # noqa: S101
        return Answer(scores.logits, times.started - arrived, times, scores.rows.start == 0)

    async def infer_in_background(self, pixels: Images, timeout_s: float | None) -> Probabilities | Refusal:
        """Compute the probabilities of any number of images with low priority, see `Batcher.run_in_background`.

        Args:
            pixels: uint8 [N, 3, 32, 32].
            timeout_s: Seconds until batches that have not started are refused. None for no limit.
        """
        try:
            return await self._batcher.run_in_background(pixels.copy(), _deadline(timeout_s))
        except Unavailable as error:
            return Refusal(error.detail)


def _deadline(timeout_s: float | None) -> float | None:
    return None if timeout_s is None else time.monotonic() + timeout_s
