"""The open connections of one server process, and which of them makes room for a new one.

Progress is a point in time. It begins when a connection is opened and is renewed by each answer; each 64 KiB received
adds a second. The connection whose progress is the oldest is the slowest.
"""

import asyncio
import heapq
from collections import defaultdict
from operator import attrgetter
from typing import Any, Protocol, cast

from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from app.clients import FairShares, client_network

SLOWEST_BYTES_PER_S = 64 << 10
"""A client that sends at this pace makes progress as fast as time passes."""

_CANDIDATES = 128  # found by one scan of all connections, so that few new connections need a scan
_SCAN_PAUSE_S = 10e-6  # per connection, after a scan that finds fewer; a scan takes a few microseconds per connection
_GAINED_S = 1.0  # progress since the scan that saves a candidate
_STALLED_S = (
    5.0  # without progress, so that a network above its share cannot have its connections replaced all the time
)


class Connection(Protocol):
    """What the table knows of a connection."""

    progress: float
    """Time of the event loop, in seconds: when it was opened or last got an answer, plus what its pace has gained."""

    @property
    def is_busy(self) -> bool:
        """Whether its client waits for the service. If not, the service waits for its client."""

    def evict(self) -> None:
        """Close the connection at once, whatever its client has still to send or to read."""


class ConnectionTable:
    """Admits connections, up to a capacity that client networks share.

    Where a new connection has no place, the network that holds the most connections loses the one with the least
    progress. Connections with a request that the service works on stay. A network never takes the place of one that
    holds fewer. A network above its share gets a new connection only in the place of one that has stalled for 5 s.
    Otherwise a client that reopens each closed connection would make the service accept and close all the time.

    The connections of a trusted proxy count for no network of their own. While a request is under way, its connection
    counts for the client that the proxy names.

    Args:
        capacity: connections that may be open.
        trusted_proxies: addresses and networks, separated by commas, whose X-Forwarded-For names the client.
    """

    def __init__(self, capacity: int, trusted_proxies: str):
        self._shares = FairShares(capacity)
        self._proxies = ProxyHeadersMiddleware(cast(Any, None), trusted_proxies).trusted_hosts
        self._networks: dict[Connection, str | None] = {}
        self._candidates: list[tuple[int, float, Connection]] = []
        self._next_scan = 0.0

    def __len__(self) -> int:
        return len(self._networks)

    def is_proxy(self, host: str) -> bool:
        """Whether an address is that of a trusted proxy."""
        return host in self._proxies

    def admit(self, connection: Connection, host: str) -> bool:
        """Take a connection in, or return false where there is no place for it.

        Args:
            connection: just opened.
            host: address of the other side.
        """
        network = None if host in self._proxies else client_network(host)
        return self._assign(connection, network, len(self) + 1)

    def charge(self, connection: Connection, forwarded_for: str) -> bool:
        """Count a proxy's connection for the client of a request, or return false where it holds too many.

        Args:
            connection: of a trusted proxy, admitted.
            forwarded_for: X-Forwarded-For of the request.
        """
        host, _ = self._proxies.get_trusted_client_address(forwarded_for)
        self.discharge(connection)
        return self._assign(connection, client_network(host), len(self))

    def discharge(self, connection: Connection) -> None:
        """Count a proxy's connection for no client any more."""
        if connection in self._networks:
            self.remove(connection)
            self._networks[connection] = None

    def remove(self, connection: Connection) -> None:
        """Forget a connection, which may have been forgotten before."""
        if network := self._networks.pop(connection, None):
            self._shares.remove(network, 1)

    def _assign(self, connection: Connection, network: str | None, total: int) -> bool:
        held = self._shares.held.get(network, 0) if network else 0
        has_place = self._shares.allows(network, 1, total) if network else total <= self._shares.capacity
        if not has_place:
            is_within_share = network is None or held < self._shares.share(network)
            if not self._make_room(connection, held, 0.0 if is_within_share else _STALLED_S):
                return False
        self._networks[connection] = network
        if network:
            self._shares.add(network, 1)
        return True

    def _make_room(self, newcomer: Connection, held: int, stalled_s: float) -> bool:
        """Close one connection, or return false if there is none that may be closed.

        Args:
            newcomer: gets the place.
            held: connections of its network; networks that hold fewer lose none.
            stalled_s: for how long the connection must have made no progress.
        """
        now = asyncio.get_running_loop().time()
        candidate = self._candidate(newcomer, held)
        if candidate is None and now >= self._next_scan:
            self._candidates = self._scan()
            is_plenty = len(self._candidates) == _CANDIDATES
            candidate = self._candidate(newcomer, held)
            self._next_scan = now if candidate and is_plenty else now + _SCAN_PAUSE_S * len(self)
        if candidate is None or candidate.progress > now - stalled_s:
            return False
        self._candidates.pop()
        self.remove(candidate)
        candidate.evict()
        return True

    def _candidate(self, newcomer: Connection, held: int) -> Connection | None:
        """The first one to close; those that have changed since the scan are dropped."""
        while self._candidates and self._candidates[-1][0] >= held:
            _, progress, candidate = self._candidates[-1]
            has_gained = candidate.progress > progress + _GAINED_S
            if candidate in self._networks and candidate is not newcomer and not has_gained and not candidate.is_busy:
                return candidate
            self._candidates.pop()
        return None

    def _scan(self) -> list[tuple[int, float, Connection]]:
        """The connections to close first, the first one last, each with what its network will hold then."""
        waiting: defaultdict[str | Connection, list[Connection]] = defaultdict(list)
        for connection, network in self._networks.items():
            if not connection.is_busy:
                waiting[network or connection].append(connection)
        ranked = []
        for network_or_one, connections in waiting.items():
            connections.sort(key=attrgetter("progress"))
            held = self._shares.held[network_or_one] if isinstance(network_or_one, str) else 1
            ranked += [(held - place, each.progress, each) for place, each in enumerate(connections)]
        return heapq.nsmallest(_CANDIDATES, ranked, key=lambda entry: (-entry[0], entry[1]))[::-1]
