"""Tracks the open connections of one server process, and closes slow ones to make room for new ones.

The progress of a connection is a point in time. It starts as the time when the connection opens. Each response resets
it to the current time. Each 64 KiB received adds one second. The connection with the oldest progress is the slowest.
"""

import asyncio
import heapq
from collections import defaultdict
from operator import attrgetter
from typing import Any, Protocol, cast

from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from app.clients import FairShares, client_network

SLOWEST_BYTES_PER_S = 64 << 10
"""Rate at which the progress of a sending client keeps up with the clock: 64 KiB/s."""

_CANDIDATES = 128  # connections that one scan finds, so that few new connections need a scan
# Pause per open connection, after a scan that finds fewer. A scan takes a few microseconds per connection.
_SCAN_PAUSE_S = 10e-6
_GAINED_S = 1.0  # a candidate with more progress than this since the scan stays open
# Seconds without progress. They keep a network above its share from replacing its connections all the time.
_STALLED_S = 5.0


class Connection(Protocol):
    """The interface of a connection in the table."""

    progress: float
    """Event loop time in seconds of the opening or the latest response, plus 1 s for each 64 KiB received."""

    @property
    def is_busy(self) -> bool:
        """True if the client waits for the service, False if the service waits for the client."""

    def evict(self) -> None:
        """Close the connection at once and drop all data that is still to be sent or read."""


class ConnectionTable:
    """The open connections of one process, up to a capacity that client networks share.

    When the table is full, a new connection replaces another one: the network with the most connections loses its
    slowest connection. A connection whose request is being processed is never closed. A network never replaces a
    connection of a network that holds fewer. A network above its share can only replace a connection that has stalled
    for 5 s. Without this rule, a client that reopens every closed connection would make the service accept and close
    connections all the time.

    Connections of a trusted proxy do not count for the proxy's network. While a request is in progress, its connection
    counts for the client that the proxy names.

    Args:
        capacity: Maximum number of open connections.
        trusted_proxies: Addresses and networks, separated by commas, whose X-Forwarded-For names the client.
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
        """Return whether an address belongs to a trusted proxy."""
        return host in self._proxies

    def admit(self, connection: Connection, host: str) -> bool:
        """Add a connection, or return False if there is no room for it.

        Args:
            connection: Connection that was just opened.
            host: Address of the peer.
        """
        network = None if host in self._proxies else client_network(host)
        return self._assign(connection, network, len(self) + 1)

    def charge(self, connection: Connection, forwarded_for: str) -> bool:
        """Count a proxy's connection for the client of a request, or return False if that client holds too many.

        Args:
            connection: Admitted connection of a trusted proxy.
            forwarded_for: X-Forwarded-For header of the request.
        """
        host, _ = self._proxies.get_trusted_client_address(forwarded_for)
        self.discharge(connection)
        return self._assign(connection, client_network(host), len(self))

    def discharge(self, connection: Connection) -> None:
        """Stop counting a proxy's connection for a client."""
        if connection in self._networks:
            self.remove(connection)
            self._networks[connection] = None

    def remove(self, connection: Connection) -> None:
        """Remove a connection. Do nothing if it is not in the table."""
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
        """Close one connection, or return False if none may be closed.

        Args:
            newcomer: New connection that needs room.
            held: Number of connections of its network. Networks that hold fewer lose none.
            stalled_s: Minimum time in seconds without progress of the connection to close.
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
        """Return the next connection to close, and drop candidates that have changed since the scan."""
        while self._candidates and self._candidates[-1][0] >= held:
            _, progress, candidate = self._candidates[-1]
            has_gained = candidate.progress > progress + _GAINED_S
            if candidate in self._networks and candidate is not newcomer and not has_gained and not candidate.is_busy:
                return candidate
            self._candidates.pop()
        return None

    def _scan(self) -> list[tuple[int, float, Connection]]:
        """Rank the connections to close.

        Returns:
            Up to 128 tuples, the first one to close last: connections that its network holds before it is closed,
            progress, connection.
        """
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
