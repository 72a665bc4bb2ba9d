"""Cancel the work for a request when its client disconnects, because no one would receive its result."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar, cast

from starlette.requests import ClientDisconnect, Request

from app.server.protocol import ON_DISCONNECT

Result = TypeVar("Result")


async def run_until_disconnect(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Run the work for a request. Cancel it if the client disconnects.

    Raises:
        ClientDisconnect: The client has disconnected.
        Exception: The error that the work raises.
    """
    task, has_left = cast("asyncio.Task[None]", asyncio.current_task()), False

    def cancel() -> None:
        nonlocal has_left
        has_left = True
        task.cancel()

    request.scope[ON_DISCONNECT] = cancel
    try:
        return await work
    except asyncio.CancelledError:
        if not has_left:
            raise
        task.uncancel()
        raise ClientDisconnect from None
    finally:
        del request.scope[ON_DISCONNECT]
