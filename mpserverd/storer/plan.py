"""What of a stream is written next, and where its bytes lie in the arena. Pure: offsets in, offsets out.

All offsets are stream offsets in bytes. A hole is (first, end, kind); the arena has no bytes for it, and its file bytes
read as zeros.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping, Sequence

from mpserverd.errors import MpserverdError

SEGMENT_BYTES_LEAST = 1 << 20

Hole = tuple[int, int, int]
Extent = tuple[int, int]


class MissingChunkError(MpserverdError):
    """Bytes were offered that no chunk of the arena holds."""


@dataclasses.dataclass(slots=True)
class ChunkList:
    """Chunks of many streams, sorted by stream and base: parallel lists, of which a stream has [low, high).

    ``starts`` are bytes in the arena, ``firsts`` the offset of the first valid byte.
    """

    chunk_bytes: int
    bases: Sequence[int]
    starts: Sequence[int]
    firsts: Sequence[int]

    def index_of(self, offset: int, low: int, high: int) -> int:
        """Index of the chunk that holds ``offset``. Raises MissingChunkError."""
        index = bisect.bisect_right(self.bases, offset, low, high) - 1
        if index < low or offset >= self.bases[index] + self.chunk_bytes:
            raise MissingChunkError(f"no chunk holds offset {offset}")
        return index

    def pieces(self, first: int, end: int, low: int, high: int) -> list[tuple[int, int]]:
        """(start in the arena, length) of the bytes [first, end), neighbours merged. Raises MissingChunkError."""
        bases, starts, size = self.bases, self.starts, self.chunk_bytes
        index = self.index_of(first, low, high)
        within = first - bases[index]
        length = min(size - within, end - first)
        found = [(starts[index] + within, length)]
        at = first + length
        while at < end:
            index += 1
            if index >= high or bases[index] != at:
                raise MissingChunkError(f"no chunk holds offset {at}")
            length = min(size, end - at)
            start, before = found[-1]
            if start + before == starts[index]:
                found[-1] = (start, before + length)
            else:
                found.append((starts[index], length))
            at += length
        return found


def published_holes(words: Sequence[int], durable: int, offered: int) -> list[Hole]:
    """The holes between ``durable`` and ``offered`` of a row's six hole words."""
    pairs = ((words[0], words[1], words[2]), (words[3], words[4], words[5]))
    return sorted(hole for hole in pairs if hole[0] < hole[1] and hole[1] > durable and hole[0] < offered)


def target(durable: int, offered: int, holes: Sequence[Hole], packet_size: int, bytes_max: int) -> int:
    """How far this cycle goes: ``offered``, or a whole packet about ``bytes_max`` further on that is in no hole."""
    if offered - durable <= bytes_max:
        return offered
    end = durable + bytes_max
    end -= end % packet_size
    for first, hole_end, _ in holes:
        if first < end < hole_end:
            end = hole_end
    return end if end > durable else offered


def extents(durable: int, end: int, holes: Sequence[Hole]) -> list[Extent]:
    """The bytes of [durable, end) that are not in a hole, in order."""
    found: list[Extent] = []
    at = durable
    for first, hole_end, _ in holes:
        if first >= end:
            break
        if first > at:
            found.append((at, first))
        at = max(at, hole_end)
    if at < end:
        found.append((at, end))
    return found


def overlap(holes: Sequence[Extent], first: int, end: int) -> int:
    """How many bytes of [first, end) lie in holes."""
    return sum(max(0, min(end, hole_end) - max(first, hole_first)) for hole_first, hole_end in holes)


def segment_bounds(at: int, below: int, segment_bytes: int) -> tuple[int, int]:
    """(first, limit) of a new segment for a byte at ``at``, when everything under ``below`` lies in others.

    It begins on the grid; or at ``below``, when the file that had the bytes under it cannot be written any more, or
    ended on a narrower grid.
    """
    grid = at - at % segment_bytes
    return max(grid, below), grid + segment_bytes


def bounds_as_begun(at: int, bounds: Extent, begun: Mapping[int, int]) -> Extent:
    """``bounds`` of a new segment for a byte at ``at``, beside files that were begun (first: limit) and not committed.

    They may hold the same bytes already. One that is for ``at`` is taken up as it was begun, and none is reached over:
    it would stay, and repair would find two files with the same bytes.
    """
    first, limit = bounds
    for begun_first, begun_limit in begun.items():
        if begun_first <= at < begun_limit:
            return begun_first, begun_limit
        if at < begun_first:
            limit = min(limit, begun_first)
    return first, limit


def fitting_segment_bytes(segment_bytes: int, unit_bytes: int, spool_bytes_max: int, streams: int) -> int:
    """Smaller segments where many streams share a bounded spool: what is being written cannot be retired.

    Halves ``segment_bytes`` until four for each stream fit, but not below 1 MiB.
    """
    size = segment_bytes
    while (
        spool_bytes_max
        and size * 4 * streams > spool_bytes_max
        and size // 2 >= 1 << 20
        and size // 2 % unit_bytes == 0
    ):
        size //= 2
    return size
