"""Where the bytes of a stream lie: offsets cut into holes, and into runs within one segment file.

Pure functions on values of the catalog. Packets that a hole touches, even in part, belong to the hole, so what is
left are whole packets.

* Segments may overlap where one was set aside after a failed write: from its first byte on, the later segment counts.
* A segment may begin and end anywhere, so a packet may straddle two of them, or more.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mpserverd.errors import DamageError
from mpserverd.streams.catalog_view import Hole, Segment


@dataclass(frozen=True)
class Extent:
    """Stream offsets [first, end) that are stored without a hole."""

    first: int
    end: int


@dataclass(frozen=True)
class Run:
    """Stream offsets [first, end) that lie in one segment file."""

    segment: Segment
    first: int
    end: int


def whole_packets(holes: Sequence[Hole], packet_size: int) -> list[Hole]:
    """The holes widened to packet boundaries; those that then touch the one before only as far as they reach beyond
    it."""
    widened: list[Hole] = []
    for hole in holes:
        packets = hole.indexes(packet_size)
        first, end = packets.start * packet_size, packets.stop * packet_size
        if widened:
            first = max(first, widened[-1].end)
        if first < end:
            widened.append(Hole(first, end, hole.kind))
    return widened


def split_at_holes(first: int, end: int, holes: Sequence[Hole]) -> Iterator[Extent | Hole]:
    """[first, end) in order: what is stored, and the holes (cut to the range) between; ``holes`` are sorted."""
    at = first
    for hole in holes:
        if hole.end <= at:
            continue
        if hole.first >= end:
            break
        if hole.first > at:
            yield Extent(at, hole.first)
        at = max(at, hole.first)
        yield Hole(at, min(hole.end, end), hole.kind)
        at = min(hole.end, end)
    if at < end:
        yield Extent(at, end)


def find_run(segments: Sequence[Segment], offset: int, durable: int) -> Run:
    """The segment that holds the byte at ``offset``, and how far it counts. Raises DamageError if none does."""
    index = bisect.bisect_right(segments, offset, key=lambda segment: segment.first)
    limit = segments[index].first if index < len(segments) else durable
    while index > 0:
        index -= 1
        segment = segments[index]
        end = durable if segment.end is None else min(segment.end, durable)
        if offset < end:
            return Run(segment, offset, min(end, limit))
    raise DamageError(f"no segment of the catalog holds offset {offset}; run mpserverctl verify")


def stored_bytes(first: int, end: int, holes: Sequence[Hole]) -> int:
    """Bytes of [first, end) that are not in a hole."""
    return sum(item.end - item.first for item in split_at_holes(first, end, holes) if isinstance(item, Extent))
