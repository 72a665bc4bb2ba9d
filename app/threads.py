"""Separate threads for each kind of work that may block: the job database, the model store, measurements.

A slow disk or a locked database holds up only its own kind of work. Everything else shares the event loop's default
threads and those of anyio, which store uploads and read static files.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Any, ParamSpec, TypeVar

from fastapi import Response
from pydantic_core import to_json

from app.exceptions import Unavailable

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class Threads:
    """A few threads with a bounded queue. Called from the event loop.

    Args:
        name: what the threads work on, such as "the job database". Error messages begin with it.
        count: how many calls run at the same time.
        max_waiting: how many calls wait for a thread. A further call is refused at once.
        patience_s: how long a call waits before it is refused, in seconds.
    """

    def __init__(self, name: str, count: int, max_waiting: int = 64, patience_s: float = 2.0):
        self._name = name
        self._count = count
        self._max_waiting = max_waiting
        self._patience_s = patience_s
        self._executor = ThreadPoolExecutor(count, name)
        self._calls = 0  # running and waiting

    async def run(
        self, function: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Result:
        """Call a function in one of the threads. A cancelled call that has not begun never does.

        Raises:
            Unavailable: too many calls wait, or this one has waited for too long.
            Exception: what the function raises.
        """
        return await self._call(partial(function, *args, **kwargs), abandon=False)

    async def read(
        self, function: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Result:
        """Call a function that changes nothing. Unlike `run`, a call that has begun is refused as well if it is late.

        Raises: as for `run`.
        """
        return await self._call(partial(function, *args, **kwargs), abandon=True)

    async def _call(self, function: Callable[[], Result], abandon: bool) -> Result:
        if self._calls >= self._count + self._max_waiting:
            raise Unavailable(f"{self._name} is busy: {self._max_waiting} calls are waiting; try again later")
        call = self._executor.submit(copy_context().run, function)  # the context has the request's id, for log lines
        result = asyncio.wrap_future(call)
        self._calls += 1
        try:
            done, _ = await asyncio.wait([result], timeout=self._patience_s)
            if not done and (call.cancel() or abandon):
                raise Unavailable(f"{self._name} does not answer within {self._patience_s:g} s; try again later")
            return await result
        finally:
            result.cancel()  # cancels a call that has not begun, and drops the result of a late one
            self._calls -= 1

    def close(self) -> None:
        """Take no further calls; those that run end on their own."""
        self._executor.shutdown(wait=False, cancel_futures=True)


def json_response(value: Any) -> Response:
    """A JSON response of pydantic models. Call it in a thread: a long list would hold up the event loop."""
    return Response(to_json(value, inf_nan_mode="null"), media_type="application/json")
