"""A connection to PostgreSQL that gives up on a server that does not answer. This module needs the extra `cloud`.

The server ends long statements itself. This limit is for a server that is stopped or stalls while its machine still
acknowledges packets. Without it, threads would wait forever, and the service could not exit.
"""

import time
from collections.abc import Generator
from typing import Any

import psycopg

_ANSWER_S = 15.0  # longer than the timeout of statements in the server


class BoundedConnection(psycopg.Connection[Any]):
    """A connection that closes itself if the server does not answer within 15 s."""

    def wait(self, gen: Generator[Any, Any, Any], *args: Any, **kwargs: Any) -> Any:
        """Wait for an answer. psycopg calls this for every request.

        Raises:
            psycopg.OperationalError: There is no answer in time.
        """
        return super().wait(self._limit(gen), *args, **kwargs)

    def _limit(self, steps: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """Run the steps of a request. Between them, psycopg waits for the socket, or for a short time without data."""
        deadline, ready = time.monotonic() + _ANSWER_S, None
        while True:
            try:
                wanted = steps.send(ready)
            except StopIteration as end:
                return end.value
            ready = yield wanted
            if not ready and time.monotonic() > deadline:
                self.pgconn.finish()
                raise psycopg.OperationalError(f"the server has not answered within {_ANSWER_S:g} s")
