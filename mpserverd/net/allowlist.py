"""Who may connect: allow and deny lists of networks, and the table that names clients by their address.

Pure. Rules: deny wins; an empty allow list admits everyone; an IPv4 peer of a dual-stack socket (``::ffff:192.0.2.1``)
is judged as the IPv4 address that it is, and networks written in that form are too.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Generic, TypeVar

from mpserverd.config.kinds import Network, plain_network

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
T = TypeVar("T")


def plain_address(address: Address) -> Address:
    """An IPv4 address for a v4-mapped one, and an IPv6 address without its scope; anything else as it is."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return ipaddress.IPv6Address(int(address)) if address.scope_id else address


class AddressTable(Generic[T]):
    """Values by network; the longest prefix wins. A look-up costs one dictionary access a prefix length in use."""

    def __init__(self, entries: Iterable[tuple[Network | str, T]] = ()) -> None:
        """Raises ValueError for text that is no network."""
        self._values: dict[tuple[int, int, int], T] = {}
        for network, value in entries:
            plain = plain_network(ipaddress.ip_network(network))
            self._values[(plain.version, plain.prefixlen, int(plain.network_address))] = value
        self._prefixes = {
            version: sorted({prefix for family, prefix, _ in self._values if family == version}, reverse=True)
            for version in (4, 6)
        }

    def find(self, address: Address) -> T | None:
        """The value of the smallest network that holds ``address``, or None."""
        plain = plain_address(address)
        number, bits = int(plain), plain.max_prefixlen
        for prefix in self._prefixes[plain.version]:
            shift = bits - prefix
            value = self._values.get((plain.version, prefix, number >> shift << shift))
            if value is not None:
                return value
        return None


class AddressFilter:
    """A compiled pair of lists; it holds no state and may be asked from anywhere."""

    def __init__(self, allow: Iterable[Network | str] = (), deny: Iterable[Network | str] = ()) -> None:
        allowed = [(network, True) for network in allow]
        self._everyone = not allowed
        self._allow = AddressTable(allowed)
        self._deny = AddressTable((network, True) for network in deny)

    def permits(self, ip: Address) -> bool:
        if self._deny.find(ip):
            return False
        return self._everyone or self._allow.find(ip) is not None
