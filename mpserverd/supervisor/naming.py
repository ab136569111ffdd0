"""Names of peers and of the streams that are named after them. Pure."""

from __future__ import annotations

import datetime
import ipaddress

from mpserverd.net.allowlist import Address, plain_address

_V4_MAPPED_PREFIX = 0xFFFF << 32


def normal_address(text: str) -> Address:
    """The address of a peer as the kernel gives it; IPv4 behind ::ffff: is IPv4, a scope is dropped."""
    return plain_address(ipaddress.ip_address(text))


def split_address(address: Address) -> tuple[int, int]:
    """PEER_HIGH and PEER_LOW of a connection row: the 16 bytes of the (v4-mapped) IPv6 address as two words."""
    number = int(address) | _V4_MAPPED_PREFIX if address.version == 4 else int(address)
    return number >> 64, number & ((1 << 64) - 1)


def join_address(high: int, low: int) -> Address:
    """The inverse of ``split_address``."""
    return plain_address(ipaddress.IPv6Address(high << 64 | low))


def peer_text(address: Address, port: int) -> str:
    """For people: ``192.0.2.1:4711``, ``[2001:db8::1]:4711``."""
    return f"{address}:{port}" if address.version == 4 else f"[{address}]:{port}"


def peer_stream_name(address: Address, port: int, unix_ns: int) -> str:
    """``<address>-<port>-<YYYYmmddTHHMMSS.ffffffZ>``, colons as dashes; no two connections share all three."""
    seconds, rest_ns = divmod(unix_ns, 1_000_000_000)
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return f"{str(address).replace(':', '-')}-{port}-{moment:%Y%m%dT%H%M%S}.{rest_ns // 1000:06d}Z"
