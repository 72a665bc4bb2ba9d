"""Provide separate threads for each kind of blocking work: the job database, the model store, measurements.

A slow disk or a locked database delays only its own kind of work. All other blocking work shares the default threads of
the event loop and of anyio, which store uploads and read static files.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import ParamSpec, TypeVar

from app.exceptions import Unavailable

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class Threads:
    """A few threads with a bounded queue. Its methods are called from the event loop.

    Args:
        name: Subject of the work, such as "the job database". Error messages begin with it.
        count: Number of calls that run at the same time.
        max_waiting: Number of calls that may wait for a thread. A further call is refused at once.
        patience_s: Seconds that a call waits before it is refused.
    """

    def __init__(self, name: str, count: int, max_waiting: int = 64, patience_s: float = 2.0):
        self._name = name
        self._count = count
        self._max_waiting = max_waiting
        self._patience_s = patience_s
        self._executor = ThreadPoolExecutor(count, name)
        self._calls = 0  # number of running and waiting calls

    async def run(
        self, function: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Result:
        """Call a function in one of the threads. A call that is cancelled before it begins does not run.

        Raises:
            Unavailable: Too many calls wait, or this call has not begun after `patience_s`.
            Exception: The error that the function raises.
        """
        return await self._call(partial(function, *args, **kwargs), abandon=False)

    async def read(
        self, function: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Result:
        """Call a function that has no side effects. Unlike `run`, this also gives up on a call that has begun.

        Raises:
            Unavailable: Too many calls wait, or this call has not ended after `patience_s`.
            Exception: The error that the function raises.
        """
        return await self._call(partial(function, *args, **kwargs), abandon=True)

    async def _call(self, function: Callable[[], Result], abandon: bool) -> Result:
        if self._calls >= self._count + self._max_waiting:
            raise Unavailable(f"{self._name} is busy: {self._max_waiting} calls are waiting; try again later")
        call = self._executor.submit(copy_context().run, function)  # log lines take the request id from the context
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
        """Refuse further calls. Running calls finish, waiting calls are cancelled."""
        self._executor.shutdown(wait=False, cancel_futures=True)
