"""What a stream's window promises, against a storer that does only what the contract allows."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest

from mpserverd.arena.chunks import FREE, LET_GO_ALL, Arena, used_word, word_state
from mpserverd.arena.state import Head, StateTable, Str, StreamFlag, StreamState
from mpserverd.arena.window import LeasePool, StreamWindow

CHUNK = 4096
LEASE = 7


def content(offset: int, length: int) -> bytes:
    """What the sender has at each stream offset: different everywhere, so that a misplaced byte shows."""
    numbers = np.arange(offset, offset + length, dtype=np.uint64)
    return ((numbers * np.uint64(2654435761)) >> np.uint64(11)).astype(np.uint8).tobytes()


class Bench:
    """One stream, its worker's window, and a storer that follows the rules."""

    def __init__(self, *, chunks: int, packet: int, flags: StreamFlag, start: int = 0) -> None:
        self.arena = Arena.create(size_bytes=chunks * CHUNK, chunk_bytes=CHUNK)
        self.state = StateTable.create(connections=4, streams=4, slots=4)
        for fd in (self.state.fd, self.arena.table.fd, self.arena.data_fd):
            os.close(fd)  # the maps keep what they need
        self.packet = packet
        base = self.state.stream_base(0)
        words = self.state.words
        words[base + Str.NUMBER] = 99
        words[base + Str.PACKET_SIZE] = packet
        words[base + Str.FLAGS] = flags
        words[base + Str.STATE] = StreamState.OPEN
        words[Head.ACTIVE_CONNECTIONS] = 1
        for column in (Str.POSITION, Str.OFFERED, Str.STORED, Str.DURABLE, Str.STARTED_AT):
            words[base + column] = start
        self.base = base
        self.position = start
        self.stored: dict[int, bytes] = {}
        self.holes: list[tuple[int, int]] = []
        self.lease_all()
        self.adopt()

    def word(self, column: int) -> int:
        return int(self.state.words[self.base + column])

    def lease_all(self) -> None:
        self.arena.table.lease(LEASE, self.arena.count)

    def adopt(self) -> None:
        """A successor takes over: it knows the tables and the kernel's position, nothing else."""
        self.pool = LeasePool(self.arena, self.state, LEASE)
        self.window = StreamWindow(self.state, self.pool, 0)
        self.window.adopt(self.position)

    def checked(self) -> int:
        return self.position - self.position % self.packet

    def receive(self, length: int) -> int:
        """As ``recv`` would: fill what there is room for, at most ``length``. Returns how much."""
        taken = 0
        for place in self.window.room(length):
            part = min(len(place), length - taken)
            place[:part] = content(self.position + taken, part)
            taken += part
        self.window.received(taken)
        self.position += taken
        assert self.window.position == self.position
        return taken

    def published_holes(self) -> list[tuple[int, int]]:
        pairs = (
            (self.word(Str.HOLE0_FIRST), self.word(Str.HOLE0_END)),
            (self.word(Str.HOLE1_FIRST), self.word(Str.HOLE1_END)),
        )
        return sorted((first, end) for first, end in pairs if end > first)

    def commit(self, target: int | None = None) -> None:
        """Store and free as the storer does: below OFFERED, around holes, from the chunk with the highest serial."""
        table, words, durable = self.arena.table, self.state.words, self.word(Str.DURABLE)
        let_go, offered = self.word(Str.LET_GO), self.word(Str.OFFERED)
        target = offered if target is None else min(target, offered)
        holes = [(a, b) for a, b in self.published_holes() if b > durable and a < offered]
        for first, end in holes:
            if first < target < end:
                target = first
        at = durable
        while at < target:
            hole = next(((a, b) for a, b in holes if a <= at < b), None)
            if hole is not None:
                self.holes.append(hole)
                at = hole[1]
                continue
            stop = min([target, at - at % CHUNK + CHUNK, *(a for a, _ in holes if a > at)])
            mine = [i for i in table.used_by(99) if int(table.bases[i]) == at - at % CHUNK]
            index = int(mine[-1])
            assert int(table.firsts[index]) <= at, "a byte below the chunk's first valid one"
            start = index * CHUNK + at % CHUNK
            self.stored[at] = bytes(self.arena.data[start : start + stop - at])
            at = stop
        words[self.base + Str.STORED] = words[self.base + Str.DURABLE] = at
        position = self.word(Str.POSITION)
        for index in table.used_by(99):
            end = int(table.bases[index]) + CHUNK
            if end <= at or (int(table.serials[index]) <= let_go and min(end, position) <= at):
                table.words[index] = FREE
        self.lease_all()
        self.pool.refresh()

    def assert_stored_is_what_was_sent(self) -> None:
        at = 0 if not self.stored else min(self.stored)
        for first in sorted(self.stored):
            for hole_first, hole_end in self.holes:
                if at == hole_first:
                    at = hole_end
            assert first == at, f"bytes {at} to {first} are missing"
            assert self.stored[first] == content(first, len(self.stored[first]))
            at = first + len(self.stored[first])

    def assert_no_chunk_is_lost(self) -> None:
        words = self.arena.table.words
        states = [word_state(int(word)) for word in words]
        assert len(states) == self.arena.count
        assert all(int(w) == used_word(99) for w, s in zip(words, states, strict=True) if s == 2)


@pytest.mark.parametrize("packet", [1, 7, 16, 24, 1500, 5000])
@pytest.mark.parametrize("flags", [StreamFlag.STORE, StreamFlag.STORE | StreamFlag.DROP_OLDEST])
@pytest.mark.parametrize("seed", range(8))
def test_every_byte_offered_is_the_byte_received_whatever_happens(packet: int, flags: StreamFlag, seed: int) -> None:
    rng = random.Random(f"{packet} {flags} {seed}")
    bench = Bench(chunks=12, packet=packet, flags=flags)
    for _ in range(400):
        action = rng.random()
        if action < 0.5 and not bench.receive(rng.choice([1, 100, 804 * 16, 20000])):
            bench.window.offer(bench.checked())
            bench.window.drop_oldest() if bench.window.drops else bench.commit()
        elif action < 0.7:
            bench.window.offer(bench.checked())
        elif action < 0.85:
            bench.commit(rng.choice([None, bench.word(Str.DURABLE) + rng.randrange(1, 9000)]))
        elif action < 0.95:
            bench.adopt()
        else:
            bench.window.let_go_tail()
        bench.assert_no_chunk_is_lost()
        assert bench.word(Str.OFFERED) % packet == 0
        assert bench.word(Str.DURABLE) <= bench.word(Str.OFFERED) <= bench.position
    for _ in range(10):
        bench.window.offer(bench.checked(), closing=True)
        bench.commit()
    assert bench.word(Str.DURABLE) == bench.checked()
    bench.assert_stored_is_what_was_sent()
    stored = sum(map(len, bench.stored.values()))
    assert stored + sum(b - a for a, b in bench.holes) == bench.checked()


def test_dropping_takes_the_oldest_packets_above_offered_and_whole_ones() -> None:
    bench = Bench(chunks=8, packet=24, flags=StreamFlag.STORE | StreamFlag.DROP_OLDEST)
    while bench.receive(CHUNK):
        pass
    bench.window.offer(bench.checked())
    offered = bench.word(Str.OFFERED)
    dropped = bench.window.drop_oldest()
    (hole,) = bench.published_holes()
    assert dropped == hole[1] - hole[0] > 0
    assert dropped % 24 == hole[0] % 24 == 0
    assert offered <= hole[0] < offered + CHUNK + 24
    assert bench.receive(CHUNK) > 0


def test_dropping_on_and_on_makes_one_growing_hole() -> None:
    bench = Bench(chunks=8, packet=16, flags=StreamFlag.STORE | StreamFlag.DROP_OLDEST)
    for _ in range(100):
        if not bench.receive(CHUNK):
            bench.window.offer(bench.checked())
            assert bench.window.drop_oldest() == CHUNK
    assert len(bench.published_holes()) == 1


def test_a_stream_that_does_not_drop_only_waits() -> None:
    bench = Bench(chunks=8, packet=16, flags=StreamFlag.STORE)
    while bench.receive(CHUNK):
        pass
    position = bench.position
    assert bench.receive(CHUNK) == 0
    bench.window.offer(bench.checked())
    bench.commit()
    assert bench.receive(CHUNK) > 0
    assert bench.position > position


def test_one_stream_leaves_room_for_the_others() -> None:
    bench = Bench(chunks=60, packet=16, flags=StreamFlag.STORE)
    bench.state.words[Head.ACTIVE_CONNECTIONS] = 5
    while bench.receive(CHUNK):
        pass
    assert bench.window.held() <= 21
    assert len(bench.pool) >= 2 * 5


def test_two_chunks_are_granted_even_when_little_is_free() -> None:
    bench = Bench(chunks=3, packet=16, flags=StreamFlag.STORE)
    bench.state.words[Head.ACTIVE_CONNECTIONS] = 50
    while bench.receive(CHUNK):
        pass
    assert bench.window.held() == 2


def test_an_idle_durable_stream_gives_its_tail_back_and_goes_on() -> None:
    bench = Bench(chunks=8, packet=16, flags=StreamFlag.STORE)
    bench.receive(160)
    assert not bench.window.let_go_tail(), "nothing of it is durable yet"
    bench.window.offer(bench.checked())
    bench.commit()
    assert bench.window.let_go_tail()
    bench.commit()
    assert len(bench.arena.table.used_by(99)) == 0
    bench.receive(320)
    bench.window.offer(bench.checked())
    bench.commit()
    bench.assert_stored_is_what_was_sent()


def test_a_stream_that_is_not_stored_recycles_its_own_chunks() -> None:
    bench = Bench(chunks=8, packet=7, flags=StreamFlag(0))
    for _ in range(200):
        bench.receive(5000)
        bench.window.offer(bench.checked())
        assert bench.window.held() <= 4
    assert bench.word(Str.OFFERED) == bench.checked()
    bench.window.close(bench.checked())
    assert bench.word(Str.LET_GO) == LET_GO_ALL
    assert len(bench.arena.table.used_by(99)) == 0


def test_chunks_that_a_worker_gave_up_in_its_last_moment_are_taken_back_by_its_successor() -> None:
    """Killed after OFFERED was published, before the chunks were recycled."""
    bench = Bench(chunks=16, packet=16, flags=StreamFlag(0))
    for length in (CHUNK, CHUNK, 16):
        assert bench.receive(length) == length
    bench.state.words[bench.base + Str.OFFERED] = bench.position
    bench.adopt()
    held = bench.window.held()
    assert held == len(bench.arena.table.used_by(99)) <= 2
    assert len(bench.pool) == bench.arena.count - held


def test_a_continued_stream_begins_inside_its_block() -> None:
    bench = Bench(chunks=8, packet=16, flags=StreamFlag.STORE, start=4096 * 3 + 160)
    bench.receive(CHUNK)
    index = int(bench.arena.table.used_by(99)[0])
    assert int(bench.arena.table.bases[index]) == 4096 * 3
    assert int(bench.arena.table.firsts[index]) == 4096 * 3 + 160
