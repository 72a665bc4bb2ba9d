"""Decide which predictions are refused as soon as their URL is known, because too many images wait."""

import asyncio
from collections.abc import Callable
from functools import lru_cache
from urllib.parse import parse_qsl, unquote_to_bytes

from app.clients import client_network
from app.inference.decoding import Decoders
from app.inference.pool import ModelPool

PREDICT = "/predict"
INFER = "/v2/models/{name}/infer"


class LoadShedder:
    """The decision to refuse a prediction before its body is read.

    Args:
        pool: Models with their queues.
        decoders: Decoders with the shares of their clients.
        is_behind_proxy: True if the service trusts a proxy. The client address is then known only after the request has
            reached the application, so no client exceeds its share here.
        count: Callback with the path of the route and the reason for each refused prediction.
    """

    def __init__(self, pool: ModelPool, decoders: Decoders, is_behind_proxy: bool, count: Callable[[str, str], None]):
        self._pool = pool
        self._decoders = decoders
        self._is_behind_proxy = is_behind_proxy
        self._count = count
        self._arriving = 0

    def should_shed(self, url: bytes, client: str) -> bool:
        """Return True if a request is a prediction that must be refused.

        Call this in the event loop, once per request. Most accepted requests reach the queue in the next iteration of
        the loop. Until then they count as queued. A form that names its model in a text field counts for the default
        model, because its body is not known yet.

        Args:
            url: Path and query of the request.
            client: Address of the client.
        """
        path, _, query = url.partition(b"?")
        # A proxy may put a prefix before the path. Each version has its own queue.
        if path.endswith(b"/predict") and b"version" not in query:
            route, name = PREDICT, _model_name(query)
        elif path.endswith(b"/infer") and b"/v2/models/" in path and b"/versions/" not in path:
            route, name = INFER, _model_in_path(path)
        else:
            return False
        model = self._pool.peek(name)
        if model is None:
            return False
        is_full = model.batcher.queued + self._arriving >= model.batcher.max_queue
        if is_full or self.exceeds_share(client):
            self._count(route, "queue_full" if is_full else "decoders_full")
            return True
        self._arriving += 1
        asyncio.get_running_loop().call_soon(self._count_arrived)
        return False

    def exceeds_share(self, client: str) -> bool:
        """Return True if a client, given by its address, has its full share of images waiting to be decoded."""
        return not self._is_behind_proxy and self._decoders.is_full_for(client_network(client))

    def _count_arrived(self) -> None:
        self._arriving -= 1


@lru_cache(256)
def _model_name(query: bytes) -> str | None:
    return dict(parse_qsl(query.decode("latin-1"))).get("model")


@lru_cache(256)
def _model_in_path(path: bytes) -> str:
    return unquote_to_bytes(path.rsplit(b"/", 2)[-2]).decode("latin-1")
