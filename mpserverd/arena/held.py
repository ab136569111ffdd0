"""Which bytes of a stream lie in the arena, counted from rows of the chunk table, holes left out.

For many streams at once, as columns: arrays with one value a stream. It reads, and never writes; a chunk that changes
hands while its row is read is left out, and the caller, whose sum is then off, looks again.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from mpserverd.arena.chunks import USED, ChunkTable, used_word
from mpserverd.arena.state import HoleKind, Str

Int64s = npt.NDArray[np.int64]
Rows = npt.NDArray[np.intp]

_BASE_BITS = 48
"""Chunks have at least 4 KiB: no stream has more than 2**51 of them, and none we shall see 2**48."""


class Holes:
    """Both hole slots of each row: ``firsts[slot]``, ``ends[slot]`` and ``kinds[slot]`` are columns."""

    def __init__(self, worker: Int64s) -> None:
        self.firsts = (worker[:, Str.HOLE0_FIRST], worker[:, Str.HOLE1_FIRST])
        self.ends = (worker[:, Str.HOLE0_END], worker[:, Str.HOLE1_END])
        self.kinds = (worker[:, Str.HOLE0_KIND], worker[:, Str.HOLE1_KIND])

    def bytes_above(self, durable: Int64s, kind: HoleKind) -> Int64s:
        """Bytes of the holes of that kind that the storer has not yet counted: those that end above durable."""
        total = np.zeros(len(durable), np.int64)
        for first, end, kinds in zip(self.firsts, self.ends, self.kinds, strict=True):
            total += np.where((end > durable) & (end > first) & (kinds == kind), end - first, 0)
        return total

    def overlap(self, owner: Rows, low: Int64s, high: Int64s) -> Int64s:
        """Bytes of [low, high) that lie in a hole; the i-th range belongs to row ``owner[i]``."""
        total = np.zeros(len(owner), np.int64)
        for first, end in zip(self.firsts, self.ends, strict=True):
            total += np.maximum(np.minimum(high, end[owner]) - np.maximum(low, first[owner]), 0)
        return total


@dataclasses.dataclass(frozen=True, slots=True)
class HeldChunks:
    """The chunks that hold bytes of some streams; ``owner`` is an index into the caller's list of streams."""

    owner: Rows
    bases: Int64s
    firsts: Int64s
    chunk_bytes: int

    @classmethod
    def read(cls, table: ChunkTable, numbers: Int64s) -> HeldChunks:
        if len(numbers) == 1:
            index = np.flatnonzero(table.words == np.uint64(used_word(int(numbers[0]))))
            words = table.words[index]
        else:
            everything = table.words.copy()
            index = np.flatnonzero((everything & np.uint64(3)) == np.uint64(USED))
            words = everything[index]
        bases, firsts, serials = (c[index].astype(np.int64) for c in (table.bases, table.firsts, table.serials))
        owner, mine = _owners(words, numbers)
        mine &= table.words[index] == words  # else it changed hands while its row was read
        owner, bases, firsts, serials = owner[mine], bases[mine], firsts[mine], serials[mine]
        newest = _newest(owner, bases // table.chunk_bytes, serials)
        return cls(owner[newest], bases[newest], firsts[newest], table.chunk_bytes)

    def bytes_between(self, low: Int64s, high: Int64s, holes: Holes) -> Int64s:
        """For each stream the bytes of [low, high) that lie in its chunks, holes left out."""
        owner = self.owner
        start = np.maximum(self.firsts, low[owner])
        end = np.minimum(self.bases + self.chunk_bytes, high[owner])
        some = end > start
        owner, start, end = owner[some], start[some], end[some]
        length = end - start - holes.overlap(owner, start, end)
        return np.bincount(owner, weights=length, minlength=len(low)).astype(np.int64)


def _owners(words: npt.NDArray[np.uint64], numbers: Int64s) -> tuple[Rows, npt.NDArray[np.bool_]]:
    """Index of each chunk's stream in ``numbers``, and whether it is there at all."""
    if not len(numbers):
        return np.zeros(len(words), np.intp), np.zeros(len(words), np.bool_)
    wanted = (words >> np.uint64(2)).astype(np.int64)
    order = np.argsort(numbers)
    place = np.minimum(np.searchsorted(numbers, wanted, sorter=order), len(numbers) - 1)
    owner = order[place]
    return owner, numbers[owner] == wanted


def _newest(owner: Rows, grid: Int64s, serials: Int64s) -> Rows:
    """Of several chunks of one stream at one place of the grid the one with the highest serial; all others as they
    are. Two occur where an idle stream gave its tail back and went on."""
    key = (owner.astype(np.int64) << _BASE_BITS) | grid
    order = np.argsort(key, kind="stable")
    if not np.any(key[order][1:] == key[order][:-1]):
        return order
    order = np.lexsort((serials, key))
    last: npt.NDArray[np.bool_] = np.append(key[order][1:] != key[order][:-1], True)
    newest: Rows = order[last]
    return newest
