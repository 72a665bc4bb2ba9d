"""End tasks of the event loop."""

import asyncio
from contextlib import suppress
from typing import Any


async def cancel_and_wait(task: "asyncio.Task[Any] | None") -> None:
    """Cancel a task and wait for its end. None stands for a task that was never started."""
    if task:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
