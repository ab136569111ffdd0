"""A worker's view of the arena: the chunks it has leased, and one stream's place in it.

Rules: a chunk is published as the stream's before bytes are received into it, so a successor finds them; bytes below
OFFERED belong to the storer; a hole is published before its bytes are given up. See arena/chunks.py for who may change
a chunk's word, docs/SYSTEM_ARCHITECTURE.md for the offsets.

Nothing here makes a system call: time, sockets and doorbells are the worker's.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Sequence

from mpserverd.arena.chunks import FREE, LET_GO_ALL, Arena, leased_word
from mpserverd.arena.state import Head, HoleKind, StateTable, Str, StreamFlag

GUARANTEED_CHUNKS = 2
"""A connection may always hold so many; beyond them it shares what is free."""
KEPT_AHEAD = 8
"""Leased chunks that an idle worker keeps, so that the first packets after a pause need no round trip."""
AHEAD_BYTES_MIN = 16 * 1024
"""With less room than this in its chunk a stream takes the next one before it reads."""


class LeasePool:
    """The chunks leased to this worker, derived from the table. The lowest first, so that neighbours stay together."""

    def __init__(self, arena: Arena, state: StateTable, lease: int) -> None:
        self.arena = arena
        self._table = arena.table
        self._words = arena.table.words_view
        self._state_words = state.words
        self._leased_word = leased_word(lease)
        self._lease = lease
        self._stack: list[int] = []
        self._free = 0
        self.taken = self.recycled = 0
        """Chunks given to streams, and chunks that their streams gave back here without the storer."""
        self.refused = False
        """Set when a stream was denied a chunk because none was leased; the worker then asks for more."""
        self.refresh()

    def __len__(self) -> int:
        return len(self._stack)

    def refresh(self) -> None:
        """Look at the table again: after a doorbell, and before deciding that there is nothing."""
        table = self._table
        self._stack = table.leased_to(self._lease)[::-1].tolist()
        self._free = table.free_count() + len(self._stack)
        self.refused = False

    def may_grow(self, held: int) -> bool:
        """Whether a stream that holds ``held`` chunks may take one more: its fair share."""
        if held < GUARANTEED_CHUNKS:
            return True
        free = self._free
        return free > GUARANTEED_CHUNKS * self._state_words[Head.ACTIVE_CONNECTIONS] and held * 2 < free

    def presses(self, held: int) -> bool:
        """Whether ``held`` is past half of what a stream may hold."""
        return held > GUARANTEED_CHUNKS and held * 4 > self._free

    def lease_is_due(self, held: int) -> bool:
        """Whether a stream lacks a chunk only because the supervisor has not leased what is free."""
        self.count_free()
        return not self._stack and self._free > 0 and self.may_grow(held)

    def count_free(self) -> None:
        """Refresh the number that ``may_grow`` goes by; once a pass of the worker's loop."""
        self._free = self._table.free_count() + len(self._stack)

    def pop(self) -> int | None:
        if not self._stack:
            self.refused = True
            return None
        self.taken += 1
        self._free -= 1
        return self._stack.pop()

    def recycle(self, indices: Sequence[int]) -> None:
        """USED -> LEASED by the stream's worker; legal above OFFERED, and for streams that are not stored.

        The lowest chunks are the next to be taken: they are warm, and neighbours are received into and checked as one
        piece. In the order in which they came back each soon was a piece of its own, at Python's price for each.
        """
        for index in indices:
            self._words[index] = self._leased_word
        self._stack.extend(indices)
        self._stack.sort(reverse=True)  # nearly sorted already
        self.recycled += len(indices)
        self._free += len(indices)

    @property
    def used(self) -> int:
        """Chunks that left for good: what has to be leased again sooner or later."""
        return self.taken - self.recycled

    def give_back(self, keep: int) -> int:
        """LEASED -> FREE for all but ``keep`` chunks. Returns how many."""
        extra = self._stack[: max(0, len(self._stack) - keep)]
        for index in extra:
            self._words[index] = FREE
        del self._stack[: len(extra)]
        return len(extra)


@dataclasses.dataclass(slots=True)
class HeldChunk:
    """``at`` is the chunk's first byte in the arena's data, ``base`` in the stream, ``end`` one past its last."""

    index: int
    at: int
    base: int
    end: int
    serial: int


class StreamWindow:
    """The chunks of one stream, as its worker sees them. All offsets are stream offsets in bytes.

    ``position`` is where the next byte of the socket goes. The owner calls ``room`` for places to receive into and
    ``received`` with the count; ``offer`` after it has checked packets; ``drop_oldest`` when there is no room.
    """

    def __init__(self, state: StateTable, pool: LeasePool, row: int) -> None:
        self._words = state.words
        self._base = base = state.stream_base(row)
        self._pool = pool
        self._table = pool.arena.table
        self.data = pool.arena.data
        self.chunk_bytes = pool.arena.chunk_bytes
        self._enough = min(AHEAD_BYTES_MIN, self.chunk_bytes // 4)
        self.number = int(self._words[base + Str.NUMBER])
        self.packet_size = int(self._words[base + Str.PACKET_SIZE])
        flags = self._words[base + Str.FLAGS]
        self.stored = bool(flags & StreamFlag.STORE)
        self.drops = bool(flags & StreamFlag.DROP_OLDEST) and self.stored
        self.position = int(self._words[base + Str.POSITION])
        self.offered = int(self._words[base + Str.OFFERED])
        self.chunks: collections.deque[HeldChunk] = collections.deque()
        self._serial = int(self._words[base + Str.LET_GO])
        self._has_hole = self.drops
        """Whether OFFERED may meet a hole: one that drops made, or one that the client left before its first packet."""
        self._current = 0
        """Index in ``chunks`` of the one that holds ``position``; len(chunks) when none does."""

    # -- taking up

    def adopt(self, position: int) -> None:
        """Find the stream's chunks in the table; ``position`` comes from the kernel. Also for a fresh stream."""
        words, base, table = self._words, self._base, self._table
        let_go = int(words[base + Str.LET_GO])
        size = self.chunk_bytes
        held = [
            HeldChunk(int(i), int(i) * size, int(table.bases[i]), int(table.bases[i]) + size, int(table.serials[i]))
            for i in table.used_by(self.number)
        ]
        floor = self.freed_below()
        self.chunks = collections.deque(c for c in held if c.serial > let_go and c.end > floor)
        if not self.stored:  # given up by a worker that died before it had recycled them; no storer frees them
            self._pool.recycle([c.index for c in held if c.end <= floor])
        self._serial = max([let_go, *(c.serial for c in held)])
        self._has_hole = self.drops or self.growing_hole() is not None
        self.position = position
        words[base + Str.POSITION] = position
        self._current = sum(1 for c in self.chunks if c.end <= position)

    def durable(self) -> int:
        return int(self._words[self._base + Str.DURABLE])

    def freed_below(self) -> int:
        """Chunks that end at or below this are no longer ours to look at."""
        return self.durable() if self.stored else self.offered

    # -- receiving

    def room(self, wanted_bytes: int) -> list[memoryview]:
        """Writable places for the next bytes of the stream, in order; empty when the arena has none for it now."""
        chunks, data, position = self.chunks, self.data, self.position
        end = chunks[-1].end if chunks else position
        enough = self._enough if wanted_bytes <= self.chunk_bytes else wanted_bytes
        if end - position < enough:
            self._forget_freed()
        while end - position < enough:
            if not self._take():
                break
            end = chunks[-1].end
        views: list[memoryview] = []
        start = stop = -1
        for number in range(self._current, len(chunks)):
            chunk = chunks[number]
            first = chunk.at + max(position - chunk.base, 0)
            if first == stop:
                stop = chunk.at + self.chunk_bytes
                continue
            if start >= 0:
                views.append(data[start:stop])
            start, stop = first, chunk.at + self.chunk_bytes
        if start >= 0:
            views.append(data[start:stop])
        return views

    def received(self, count: int) -> None:
        """``count`` bytes were received into what ``room`` gave: publish the new position."""
        self.position = position = self.position + count
        self._words[self._base + Str.POSITION] = position
        chunks, current = self.chunks, self._current
        while current < len(chunks) and chunks[current].end <= position:
            current += 1
        self._current = current

    def held(self) -> int:
        """Chunks that hold bytes not yet durable, or wait for some."""
        self._forget_freed()
        return len(self.chunks)

    def _forget_freed(self) -> None:
        if not self.stored:
            return
        durable, chunks = self._words[self._base + Str.DURABLE], self.chunks
        while chunks and chunks[0].end <= durable:
            chunks.popleft()
            self._current -= 1

    def _take(self) -> bool:
        pool = self._pool
        if not pool.may_grow(len(self.chunks)):
            return False
        index = pool.pop()
        if index is None:
            return False
        self._publish(index)
        return True

    def _publish(self, index: int) -> None:
        """Make a leased chunk the stream's next one."""
        size = self.chunk_bytes
        base = self.position - self.position % size
        if self.chunks:  # its last one may have been dropped a moment ago: then they end below
            base = max(base, self.chunks[-1].end)
        self._serial += 1
        self._table.publish(index, self.number, base, max(base, self.position), self._serial)
        self.chunks.append(HeldChunk(index, index * size, base, base + size, self._serial))

    # -- reading back

    def pieces(self, first: int, end: int) -> list[tuple[int, int]]:
        """Where the bytes [first, end) lie in the arena: (start, length), neighbours merged."""
        found: list[tuple[int, int]] = []
        chunks = self.chunks
        number = min(self._current, len(chunks) - 1)
        while number > 0 and chunks[number].base > first:  # what is read back is the newest: walk from that end
            number -= 1
        for index in range(max(number, 0), len(chunks)):
            chunk = chunks[index]
            if chunk.base >= end:
                break
            start = max(first, chunk.base)
            if chunk.end <= start:
                continue
            at, length = chunk.at + start - chunk.base, min(end, chunk.end) - start
            if found and found[-1][0] + found[-1][1] == at:
                found[-1] = (found[-1][0], found[-1][1] + length)
            else:
                found.append((at, length))
        return found

    # -- offering and giving up

    def _holes(self) -> tuple[tuple[int, int, int], ...]:
        """(slot, first, end) of both hole slots."""
        words, base = self._words, self._base
        return (
            (0, int(words[base + Str.HOLE0_FIRST]), int(words[base + Str.HOLE0_END])),
            (1, int(words[base + Str.HOLE1_FIRST]), int(words[base + Str.HOLE1_END])),
        )

    def growing_hole(self) -> tuple[int, int, int] | None:
        """The hole that OFFERED has not passed yet."""
        for slot, first, end in self._holes():
            if end > first >= self.offered:
                return slot, first, end
        return None

    def offer(self, checked: int, *, closing: bool = False) -> bool:
        """Let the storer have everything up to ``checked`` (whole packets) that the rules allow.

        Returns True when OFFERED moved. Streams that are not stored give their checked chunks up here.
        """
        if not self.stored:
            return self._give_up(checked)
        target = checked
        hole = self.growing_hole() if self._has_hole else None
        if self.drops and not closing:
            target = min(target, self._limit())
        if hole is not None:
            _, first, end = hole
            if self.offered == first and self.durable() == first:
                target = max(min(checked, self._limit_from(end)), end) if self.drops and not closing else checked
            else:
                target = min(target, first)
        if target <= self.offered:
            return False
        self.offered = target
        self._words[self._base + Str.OFFERED] = target
        return True

    def _limit(self) -> int:
        """How far OFFERED may run ahead, so that ``drop_oldest`` still finds something above it."""
        return self._limit_from(self.durable())

    def _limit_from(self, origin: int) -> int:
        size, packet = self.chunk_bytes, self.packet_size
        own_chunk = (origin + packet - 1) // size * size + size
        limit = max(own_chunk, origin + len(self.chunks) // 2 * size)
        return limit - limit % packet

    def _give_up(self, checked: int) -> bool:
        if checked <= self.offered:
            return False
        self.offered = checked
        self._words[self._base + Str.OFFERED] = checked
        chunks = self.chunks
        given_up = []
        while chunks and chunks[0].end <= checked:
            given_up.append(chunks.popleft().index)
        self._current -= len(given_up)
        self._pool.recycle(given_up)
        return True

    def drop_oldest(self) -> int:
        """Give up the oldest chunk that the storer has not been offered, and take its place for what comes next.

        Everything must have been checked and offered as far as allowed. Returns the bytes dropped, whole packets; 0
        when nothing may be dropped, or nothing need be because the supervisor has chunks to lease.
        """
        self._forget_freed()
        if self._pool.lease_is_due(len(self.chunks)):
            return 0
        packet = self.packet_size
        hole = self.growing_hole()
        above = max(self.offered, hole[2] - packet + 1 if hole else 0)
        chunk = next((c for c in itertools.islice(self.chunks, self._current) if c.base >= above), None)
        if chunk is None:
            return 0
        first = hole[1] if hole else chunk.base - chunk.base % packet
        end = -(-chunk.end // packet) * packet
        dropped = end - (hole[2] if hole else first)
        if end > self.position or not self._publish_hole(hole, first, end):
            return 0  # the last packet is incomplete, or the storer has not yet committed an earlier hole
        self.chunks.remove(chunk)
        self._current -= 1
        self._pool.recycle([chunk.index])
        index = self._pool.pop()
        if index is not None:
            self._publish(index)
        return dropped

    def _publish_hole(self, hole: tuple[int, int, int] | None, first: int, end: int) -> bool:
        words, base = self._words, self._base
        if hole is not None:
            words[base + (Str.HOLE0_END, Str.HOLE1_END)[hole[0]]] = end
            return True
        durable = self.durable()
        for slot, _, old_end in self._holes():
            if old_end <= durable:
                words[base + (Str.HOLE0_FIRST, Str.HOLE1_FIRST)[slot]] = first
                words[base + (Str.HOLE0_KIND, Str.HOLE1_KIND)[slot]] = HoleKind.DROPPED
                words[base + (Str.HOLE0_END, Str.HOLE1_END)[slot]] = end
                return True
        return False

    def let_go_tail(self) -> bool:
        """Give back the chunks of an idle stream. Only when every byte of it is durable."""
        if not self.chunks or (self.durable() if self.stored else self.offered) != self.position:
            return False
        if self.stored:
            self._words[self._base + Str.LET_GO] = self._serial
        else:
            self._pool.recycle([chunk.index for chunk in self.chunks])
        self.chunks.clear()
        self._current = 0
        return True

    def close(self, position: int) -> None:
        """The connection is over: ``position`` is its last whole packet; the storer frees whatever is left."""
        self.position = position
        self._words[self._base + Str.POSITION] = position
        if not self.stored:
            self._pool.recycle([chunk.index for chunk in self.chunks])
            self.chunks.clear()
        self._words[self._base + Str.LET_GO] = LET_GO_ALL
