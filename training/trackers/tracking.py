"""`track` opens the trackers of a run: TensorBoard always, MLflow if there is a server."""

import logging
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from training.dataset import Dataset
from training.loop import Event
from training.run import Publication, Run
from training.trackers.mlflow import MlflowTracker
from training.trackers.tensorboard import TensorBoardTracker
from training.trackers.tracker import Status, Tracker

log = logging.getLogger(__name__)


class Tracking(Tracker):
    """All trackers of a run."""

    def __init__(self, trackers: Iterable[Tracker]):
        self._trackers = list(trackers)

    def follow(self, events: Iterable[Event]) -> Generator[Event, None, None]:
        """Pass the events of a run on, and record each of them."""
        for event in events:
            self.log_event(event)
            yield event

    def log_event(self, event: Event) -> None:
        """Record an event, see `Tracker`."""
        for tracker in self._trackers:
            tracker.log_event(event)

    def log_publication(self, published: Publication, version: Path) -> None:
        """Record a publication, see `Tracker`."""
        for tracker in self._trackers:
            tracker.log_publication(published, version)

    def close(self, status: Status) -> None:
        """Complete the records. A second call has no effect."""
        while self._trackers:
            self._trackers.pop().close(status)


@contextmanager
def track(run: Run, dataset: Dataset, mlflow: str | None) -> Iterator[Tracking]:
    """Open the trackers of a run, and close them: as finished, or as stopped or failed after an exception.

    Args:
        run: The run.
        dataset: Data set of the run.
        mlflow: Tracking URI of an MLflow server. None or an empty text means none.
    """
    trackers: list[Tracker] = [TensorBoardTracker(run, len(dataset.classes))]
    if mlflow and find_spec("mlflow"):
        trackers.append(MlflowTracker(run, mlflow, dataset.fingerprint))
    elif mlflow:
        log.warning("MLflow is not installed, so it does not record this run; pip install 'cifar100[mlflow]' adds it")
    tracking = Tracking(trackers)
    try:
        yield tracking
    except BaseException as error:
        tracking.close("stopped" if isinstance(error, KeyboardInterrupt) else "failed")
        raise
    tracking.close("finished")
