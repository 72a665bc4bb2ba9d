"""A tracker records one run in a tool that compares experiments. This module defines the interface.

Input: the events of the run, and its publication.
Output: records in the tool.
"""

from pathlib import Path
from typing import Literal, Protocol

from training.loop import Event
from training.run import Publication

Status = Literal["finished", "stopped", "failed"]
"""The end of the work on a run. A run that was stopped or has failed can be resumed."""


class Tracker(Protocol):
    """The records of one run in one tool. A resumed run continues its records.

    A method never raises an error of a remote service and never waits for one, except `close`.
    """

    def log_event(self, event: Event) -> None:
        """Record an event. It is in the run's metrics already."""
        ...

    def log_publication(self, published: Publication, version: Path) -> None:
        """Record the published version and the pictures of the run.

        Args:
            published: The publication.
            version: Folder of the version in the model store.
        """
        ...

    def close(self, status: Status) -> None:
        """Complete the records. No other call follows."""
        ...
