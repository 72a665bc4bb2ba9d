"""Threads of their own for each kind of work that may block: the job database, the model store, measurements.

A slow disk or a locked database then holds up its own kind of work only. The event loop's default threads and those of
anyio, which take uploads and read static files, are shared by everything else.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Any, ParamSpec, TypeVar

from fastapi import Response
from pydantic_core import to_json

from app.errors import Unavailable

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class Threads:
    """A few threads with a bounded queue. Called from the event loop.

    Args:
        name: of the work, as in "the job database": for messages and thread names.
        count: calls that run at the same time.
        max_waiting: calls that wait for a thread; a further one is refused at once.
        patience_s: a call that has not begun after this time is refused.
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
        """As `run`, for a function that changes nothing: it is not waited for either where it takes too long itself."""
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
            result.cancel()  # and the call with it, unless it has begun; its error is not missed then
            self._calls -= 1

    def close(self) -> None:
        """Take no further calls; those that run end on their own."""
        self._executor.shutdown(wait=False, cancel_futures=True)


def json_response(value: Any) -> Response:
    """A response of models, made in the thread that read them: a long list would hold up the event loop."""
    return Response(to_json(value, inf_nan_mode="null"), media_type="application/json")
