"""Count and time every request."""

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import REFUSAL
from app.middleware.request_log import CLIENT_CLOSED_REQUEST
from app.observability.metrics import Metrics


class MetricsMiddleware:
    """ASGI middleware that counts and times every request, and counts refusals by their reasons."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, then count it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        status = CLIENT_CLOSED_REQUEST
        metrics = self.metrics
        metrics.in_progress += 1

        async def send_and_note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_note_status)
        finally:
            metrics.in_progress -= 1
            # The label is the route's pattern, not the path, so that the number of label values is bounded.
            route = getattr(scope.get("route"), "path", "unknown")
            metrics.count_request(scope["method"], route, status, time.perf_counter() - started)
            if refusal := scope.get(REFUSAL):
                metrics.count_refusal(refusal)
