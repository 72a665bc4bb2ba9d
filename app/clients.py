"""Identifies clients by their network, and divides a scarce capacity fairly among them."""

import ipaddress
from collections import defaultdict
from functools import lru_cache

UNIX_CLIENT = "unix"
"""Name of every client that connects over a unix socket, because it has no address."""

_CONTESTED = 0.75  # fraction of the capacity above which shares apply


@lru_cache(4096)
def client_network(host: str) -> str:
    """Return the network that counts as one client.

    Args:
        host: Address of the client, or the name that a trusted proxy gives it.

    Returns:
        An IPv4 address, or the /64 network of an IPv6 address, because providers assign a /64 to one customer. For a
        name, the name itself. For an empty host, "unknown".
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host or "unknown"
    address = getattr(address, "ipv4_mapped", None) or address
    return str(ipaddress.ip_network((address, 64), strict=False)) if address.version == 6 else str(address)


class FairShares:
    """A capacity and the amount of it that each client network holds.

    While at most 75 % of the capacity is in use, a network may take any amount. Above 75 %, each network is limited to
    an equal share. One share is reserved for a network that comes later, so a single network never holds everything.

    Args:
        capacity: Total amount, in any unit.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.total = 0
        self.held: defaultdict[str, int] = defaultdict(int)
        """Amount held by each network, without networks that hold nothing."""

    def allows(self, network: str, amount: int, total: int) -> bool:
        """Return whether a network may take a further amount.

        Args:
            network: Client network from `client_network`.
            amount: Further amount, in the unit of the capacity.
            total: Amount that all networks would hold, including `amount`.
        """
        if total <= self.capacity * _CONTESTED:
            return True
        return total <= self.capacity and self.held.get(network, 0) + amount <= self.share(network)

    def exceeds_share(self, network: str, amount: int) -> bool:
        """Return whether a further amount puts a network above its share while over 75 % of the capacity is in use.

        Unlike `allows`, this accepts the first amount of every network, even above the capacity.
        """
        held = self.held.get(network, 0)
        if not held or self.total + amount <= self.capacity * _CONTESTED:
            return False
        return held + amount > self.share(network)

    def share(self, network: str) -> int:
        """Return the equal share of a network, which may hold nothing yet."""
        networks = len(self.held) + (network not in self.held)
        return max(1, self.capacity // (networks + 1))

    def add(self, network: str, amount: int) -> None:
        """Count an amount for a network."""
        self.total += amount
        self.held[network] += amount

    def remove(self, network: str, amount: int) -> None:
        """Stop counting an amount for a network, which must hold it."""
        self.total -= amount
        self.held[network] -= amount
        if not self.held[network]:
            del self.held[network]
