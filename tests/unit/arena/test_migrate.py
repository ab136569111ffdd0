"""Memory is copied onto another grid. The oracle is what was written, byte by byte, not what the tables say."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from mpserverd.arena.chunks import FREE, LET_GO_ALL, USED, Arena, leased_word, word_state
from mpserverd.arena.layouts import CONNECTIONS, STREAMS, ChunkMemory, StateMemory
from mpserverd.arena.migrate import HeldStreams, copy_chunks, copy_state, plan_chunks, rows_needed
from mpserverd.arena.state import (
    Con,
    ConnectionState,
    Gone,
    Head,
    HoleKind,
    Slot,
    StateTable,
    Str,
    StreamFlag,
    StreamState,
)
from mpserverd.arena.window import LeasePool, StreamWindow

SEED = int(os.environ.get("MPSERVERD_TEST_SEED", "8"))
ROUNDS = int(os.environ.get("MPSERVERD_TEST_ROUNDS", "20"))
PACKET = 24
"""Divides no chunk size, so packets straddle chunks."""
LEASE = 7


@dataclasses.dataclass
class Tables:
    state: StateTable
    arena: Arena


@contextmanager
def tables(
    chunk_bytes: int, chunks: int, *, connections: int = 4, streams: int = 6, slots: int = 4
) -> Iterator[Tables]:
    state = StateTable.create(connections=connections, streams=streams, slots=slots)
    arena = Arena.create(size_bytes=chunk_bytes * chunks, chunk_bytes=chunk_bytes)
    yield Tables(state, arena)
    for fd in (state.fd, arena.table.fd, arena.data_fd):
        os.close(fd)


def views(which: Tables) -> tuple[StateMemory, ChunkMemory]:
    return StateMemory(which.state.fd, {}), ChunkMemory(which.arena.table.fd, which.arena.data_fd, {})


def move(old: Tables, new: Tables) -> int:
    state, chunks = views(old)
    plan = plan_chunks(chunks, HeldStreams.of(state), new.arena.chunk_bytes)
    copied = copy_chunks(chunks, plan, new.arena)
    copy_state(state, StateMemory(new.state.fd, {}))
    return copied


class Feed:
    """A stream as its worker fills it; ``content`` is what the client sent from offset 0 on."""

    def __init__(self, where: Tables, row: int, content: bytes, *, stored: bool = True, drops: bool = False) -> None:
        self.where, self.row, self.content = where, row, content
        words = where.state.streams[row]
        words[Str.NUMBER] = 100 + row
        words[Str.PACKET_SIZE] = PACKET
        words[Str.FLAGS] = (StreamFlag.STORE if stored else 0) | (StreamFlag.DROP_OLDEST if drops else 0)
        words[Str.STATE] = StreamState.OPEN
        self.stored = stored
        self.attach(where, 0)

    def attach(self, where: Tables, position: int) -> None:
        self.where = where
        where.arena.table.lease(LEASE, where.arena.count)
        self.window = StreamWindow(where.state, LeasePool(where.arena, where.state, LEASE), self.row)
        self.window.adopt(position)

    def receive(self, count: int, *, publish: bool = True) -> int:
        """As much as there is room for. Without ``publish`` the worker dies right after the recv."""
        window, done = self.window, 0
        for place in window.room(count):
            part = self.content[window.position + done : window.position + count][: len(place)]
            place[: len(part)] = part
            done += len(part)
        if publish:
            window.received(done)
        return done

    def store(self, end: int) -> None:
        """The storer's commit, and what it frees."""
        words = self.where.state.streams[self.row]
        words[Str.STORED] = words[Str.DURABLE] = end
        table = self.where.arena.table
        for index in table.used_by(int(words[Str.NUMBER])).tolist():
            base, serial, last = int(table.bases[index]), int(table.serials[index]), int(words[Str.LET_GO])
            chunk_end = base + table.chunk_bytes
            if chunk_end <= end or (serial <= last and min(chunk_end, int(words[Str.POSITION])) <= end):
                table.words[index] = FREE

    def read_back(self, first: int, end: int) -> bytes:
        data = self.where.arena.data
        return b"".join(bytes(data[at : at + length]) for at, length in self.window.pieces(first, end))

    def number(self, column: int) -> int:
        return int(self.where.state.streams[self.row, column])


def content(seed: int, count: int) -> bytes:
    return random.Random(seed).randbytes(count)


@pytest.mark.parametrize("chunk_bytes", [4096, 8192, 12288, 65536])
@pytest.mark.parametrize("number", range(ROUNDS // 4))
def test_every_byte_that_is_not_durable_lies_where_its_worker_and_its_storer_look_for_it(
    chunk_bytes: int, number: int
) -> None:
    chance = random.Random(f"{SEED} {chunk_bytes} {number}")
    print("seed", SEED)
    with tables(8192, 40) as old, tables(chunk_bytes, 400 * 8192 // chunk_bytes) as new:
        feeds = []
        for row in range(4):
            feed = Feed(old, row, content(number * 10 + row, 200_000), stored=row != 3)
            feed.window._pool.refresh()
            for _ in range(chance.randrange(1, 5)):
                feed.receive(chance.randrange(1, 30_000))
                checked = feed.window.position - feed.window.position % PACKET
                feed.window.offer(checked - checked % (PACKET * chance.randrange(1, 40)))
                if feed.stored and chance.random() < 0.7:
                    feed.store(chance.randrange(feed.number(Str.DURABLE), feed.window.offered + 1) // PACKET * PACKET)
            unpublished = feed.receive(5000, publish=False) if chance.random() < 0.5 else 0
            feeds.append((feed, feed.window.position + unpublished))
        old.state.words[Head.NEXT_NUMBER] = 4711
        move(old, new)
        assert new.state.words[Head.NEXT_NUMBER] == 4711
        for feed, position in feeds:
            floor = feed.number(Str.DURABLE) if feed.stored else feed.window.offered
            feed.attach(new, position)
            assert feed.read_back(floor, position) == feed.content[floor:position]
            assert feed.receive(20_000) > 0, "it goes on"
            assert feed.read_back(floor, feed.window.position) == feed.content[floor : feed.window.position]
        states = [word_state(int(word)) for word in new.arena.table.words]
        assert states.count(USED) == sum(len(feed.window.chunks) for feed, _ in feeds)


def test_bytes_of_an_idle_tail_that_came_after_it_was_let_go_win_over_the_old_chunk() -> None:
    with tables(8192, 16) as old, tables(16384, 16) as new:
        feed = Feed(old, 0, content(1, 9000))
        feed.receive(4800)
        feed.window.offer(4800)
        old.state.streams[0, Str.STORED] = old.state.streams[0, Str.DURABLE] = 4800
        assert feed.window.let_go_tail()  # the storer has not freed it yet
        feed.receive(1200)
        assert len(old.arena.table.used_by(100)) == 2
        move(old, new)
        feed.attach(new, 6000)
        assert feed.read_back(4800, 6000) == feed.content[4800:6000]
        assert int(new.arena.table.firsts[feed.window.chunks[0].index]) <= 4800
        assert feed.window.chunks[0].serial > feed.number(Str.LET_GO)


def test_a_connection_that_is_over_takes_along_what_is_not_durable_and_no_more() -> None:
    with tables(8192, 16) as old, tables(4096, 32) as new:
        feed = Feed(old, 0, content(2, 20_000))
        feed.receive(16_800)
        feed.window.offer(16_800, closing=True)
        feed.window.close(16_800)
        old.state.streams[0, Str.STATE] = StreamState.DRAINING
        assert feed.number(Str.LET_GO) == LET_GO_ALL
        move(old, new)
        table = new.arena.table
        mine = table.used_by(100)
        assert table.bases[mine].tolist() == [0, 4096, 8192, 12288, 16384]
        joined = b"".join(bytes(new.arena.data[i * 4096 : (i + 1) * 4096]) for i in mine.tolist())
        assert joined[:16_800] == feed.content[:16_800]
        assert joined[16_800:] == bytes(len(joined) - 16_800)


def test_a_stream_with_a_hole_keeps_what_stands_on_both_sides_of_it() -> None:
    with tables(4096, 9) as old, tables(16384, 40) as new:
        feed = Feed(old, 0, content(3, 100_000), drops=True)
        while feed.receive(4096):
            feed.window.offer(feed.window.position // PACKET * PACKET)
        assert feed.window.drop_oldest() > 0
        feed.receive(3000)
        first, end = feed.number(Str.HOLE0_FIRST), feed.number(Str.HOLE0_END)
        position = feed.window.position
        assert 0 < first < end < position
        move(old, new)
        assert feed.number(Str.HOLE0_KIND) == HoleKind.DROPPED
        feed.attach(new, position)
        assert feed.read_back(0, first) == feed.content[:first]
        assert feed.read_back(end, position) == feed.content[end:position]


def test_what_belongs_to_nobody_is_free_in_the_new_arena() -> None:
    with tables(4096, 8) as old, tables(4096, 8) as new:
        old.arena.table.words[2] = leased_word(9)
        old.arena.table.publish(3, 999, 0, 0, 1)  # of a stream that is not in the table
        feed = Feed(old, 1, content(4, 4096))
        feed.receive(96)
        move(old, new)
        assert new.arena.table.free_count() == 7


def test_rows_keep_their_numbers_and_every_word_and_name() -> None:
    with tables(4096, 4) as old, tables(4096, 4, connections=9, streams=20, slots=7) as new:
        chance = np.random.default_rng(SEED)
        for table in (old.state.connections, old.state.streams, old.state.slots, old.state.latency):
            table[:] = chance.integers(0, 1 << 40, table.shape, dtype=np.uint64)
        old.state.connections[:, Con.STATE] = ConnectionState.ASSIGNED
        old.state.streams[:, Str.STATE] = StreamState.OPENING
        old.state.set_stream_name(5, "Zürich")
        old.state.words[Head.GONE + Gone.LOST_BYTES] = 12
        move(old, new)
        assert np.array_equal(new.state.connections[:4], old.state.connections)
        assert np.array_equal(new.state.streams[:6], old.state.streams)
        assert np.array_equal(new.state.slots[:4], old.state.slots)
        assert np.array_equal(new.state.latency[:6], old.state.latency)
        assert new.state.stream_name(5) == "Zürich"
        assert new.state.words[Head.GONE + Gone.LOST_BYTES] == 12
        assert not new.state.connections[4:].any()
        assert new.state.connection_count == 9


def test_counters_of_slots_that_are_no_more_are_added_to_another() -> None:
    with tables(4096, 4, slots=8) as old, tables(4096, 4, slots=4) as new:
        old.state.slots[:, Slot.RECEIVED_BYTES] = 10
        old.state.slots[:, Slot.REASONS + 1] = 1
        move(old, new)
        assert int(new.state.slots[:, Slot.RECEIVED_BYTES].sum()) == 80
        assert int(new.state.slots[:, Slot.REASONS + 1].sum()) == 8


def test_a_table_needs_rows_up_to_the_last_one_that_is_taken() -> None:
    with tables(4096, 4) as old:
        state, _ = views(old)
        assert rows_needed(state, CONNECTIONS) == 0
        old.state.connections[2, Con.STATE] = ConnectionState.ACCEPTED
        old.state.streams[4, Str.STATE] = StreamState.DRAINING
        assert (rows_needed(state, CONNECTIONS), rows_needed(state, STREAMS)) == (3, 5)
