"""Clients as the service counts them: by network, with a fair share of what is scarce."""

import ipaddress
from collections import defaultdict
from functools import lru_cache

_CONTESTED = 0.75  # of the capacity


@lru_cache(4096)
def client_network(host: str) -> str:
    """The network that counts as one client.

    Args:
        host: address of the client, or the name that a trusted proxy gives it.

    Returns:
        An IPv4 address, or the /64 network of an IPv6 address, which is what one customer gets.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host or "unknown"
    address = getattr(address, "ipv4_mapped", None) or address
    return str(ipaddress.ip_network((address, 64), strict=False)) if address.version == 6 else str(address)


class FairShares:
    """A capacity and how much of it each client network holds.

    Up to 75 % of the capacity a network may hold any part of it. Above that, a network that holds an equal share gets
    nothing more. One share is kept for a network that comes later, so a single network never holds all.

    Args:
        capacity: in any unit.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.total = 0
        self.held: defaultdict[str, int] = defaultdict(int)
        """Amount of each network that holds anything."""

    def allows(self, network: str, amount: int, total: int) -> bool:
        """Whether a network may hold a further amount.

        Args:
            network: of `client_network`.
            amount: in the unit of the capacity.
            total: held by all, with the further amount.
        """
        if total <= self.capacity * _CONTESTED:
            return True
        return total <= self.capacity and self.held.get(network, 0) + amount <= self.share(network)

    def exceeds_share(self, network: str, amount: int) -> bool:
        """Whether a network that holds something would get more than its share where much of the capacity is held.

        In contrast to `allows`, the first amount of each network is always within its share, even above the capacity.
        """
        held = self.held.get(network, 0)
        if not held or self.total + amount <= self.capacity * _CONTESTED:
            return False
        return held + amount > self.share(network)

    def share(self, network: str) -> int:
        """The equal share of a network, which may hold nothing yet."""
        networks = len(self.held) + (network not in self.held)
        return max(1, self.capacity // (networks + 1))

    def add(self, network: str, amount: int) -> None:
        self.total += amount
        self.held[network] += amount

    def remove(self, network: str, amount: int) -> None:
        self.total -= amount
        self.held[network] -= amount
        if not self.held[network]:
            del self.held[network]
