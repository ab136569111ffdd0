"""What a client of ``mpload chaos`` says it sent: streams, the connections that they are made of, and their hashes."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

ENDED, RESET = "ended", "reset"
"""How a connection ended when its client wanted it to; any other word is how the peer ended it."""


@dataclasses.dataclass(frozen=True)
class SentConnection:
    """``begin`` and ``end`` are stream offsets, of whole packets; ``torn_bytes`` came after them.

    From ``opened_ns`` (the connect was done) to ``closed_ns``, monotonic. ``how``: ENDED, RESET, or how it broke.
    """

    port: int
    begin: int
    end: int
    torn_bytes: int
    opened_ns: int
    closed_ns: int
    how: str

    @property
    def is_broken(self) -> bool:
        return self.how not in (ENDED, RESET)


@dataclasses.dataclass(frozen=True)
class SentStream:
    """What must be stored: ``whole_bytes`` of the stream ``number`` of ``client``, with this hash.

    ``name`` "": named by the daemon, after ``address`` and ``port``; port 0: any.
    """

    client: int
    number: int
    name: str
    address: str
    packet_size: int
    whole_bytes: int
    sha256: str
    connections: tuple[SentConnection, ...]

    @property
    def port(self) -> int:
        return self.connections[-1].port

    @property
    def broken(self) -> str:
        """How the peer ended a connection; what is stored may then be a beginning of the stream."""
        here = [each.how for each in self.connections if each.is_broken]
        return here[-1] if here else ""

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Offsets of what must be stored, a range for each connection."""
        return [(each.begin, each.end) for each in self.connections if each.end > each.begin]

    @property
    def wanted_bytes(self) -> int:
        return sum(end - begin for begin, end in self.ranges)


def from_plain(fields: dict[str, Any]) -> SentStream:
    """Of what ``dataclasses.asdict`` made, after a way through JSON."""
    connections = tuple(SentConnection(**each) for each in fields["connections"])
    return SentStream(**{**fields, "connections": connections})


class StreamHash:
    """Hash of the whole packets of a stream; what a connection leaves of a packet at its end is not part of it."""

    def __init__(self, packet_size: int) -> None:
        self._size, self._rest = packet_size, b""
        self._hash = hashlib.sha256()
        self.whole_bytes = 0

    def add(self, content: memoryview) -> None:
        total = self._rest + content
        whole = len(total) - len(total) % self._size
        self._hash.update(memoryview(total)[:whole])
        self._rest = total[whole:]
        self.whole_bytes += whole

    def cut(self) -> int:
        """The connection is over; returns the bytes of the packet that was cut."""
        cut, self._rest = len(self._rest), b""
        return cut

    def hexdigest(self) -> str:
        return self._hash.hexdigest()
