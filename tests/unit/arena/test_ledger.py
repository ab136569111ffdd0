"""The ledger: every legal history balances at every step, every wrong word is found, and moving words are not called
wrong."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpserverd.arena.chunks import FREE
from mpserverd.arena.ledger import EQUATIONS, FIELDS, Ledger, settle
from mpserverd.arena.live import pause
from mpserverd.arena.state import Gone, Head, Str, StreamFlag, StreamState
from tests.unit.arena.live_tables import CHUNK_BYTES, Stream, Tables

KEEP, DROP, COUNT_ONLY = StreamFlag.STORE, StreamFlag.STORE | StreamFlag.DROP_OLDEST, StreamFlag(0)


@pytest.fixture
def tables() -> Iterator[Tables]:
    with Tables() as made:
        yield made


def off_names(ledger: Ledger) -> list[str]:
    return [one.equation.text for one in ledger.equations if not one.holds]


def busy(tables: Tables) -> list[Stream]:
    """Three streams with bytes everywhere: durable, stored, in the arena, dropped, handshake."""
    first = tables.open(0, packet_size=24, flags=DROP, handshake=40)
    second = tables.open(1, packet_size=7, flags=KEEP)
    third = tables.open(2, packet_size=16, flags=COUNT_ONLY)
    first.receive(3 * CHUNK_BYTES + 100)
    assert fill_and_drop(first)
    first.offer()
    first.write()
    first.receive(555)
    for stream in (second, third):
        stream.receive(2 * CHUNK_BYTES + 5)
        stream.offer()
        stream.write() if stream is second else None
    second.commit()
    second.receive(CHUNK_BYTES)
    second.offer()
    second.write()
    return [first, second, third]


def fill_and_drop(stream: Stream) -> int:
    while stream.receive(CHUNK_BYTES):
        pass
    return stream.drop()


# -- balance


def test_an_empty_table_balances(tables: Tables) -> None:
    ledger = tables.ledger()
    assert ledger.holds
    assert ledger.totals == dict.fromkeys(FIELDS, 0)


def test_bytes_are_found_where_they_are(tables: Tables) -> None:
    stream = tables.open(0, packet_size=16, flags=KEEP, handshake=30)
    stream.receive(10_000)
    account = tables.ledger().streams.of(0)
    assert (account["received_bytes"], account["in_arena_bytes"], account["at_risk_bytes"]) == (10_000,) * 3
    stream.offer()
    stream.write()
    account = tables.ledger().streams.of(0)
    assert (account["stored_bytes"], account["durable_bytes"], account["in_arena_bytes"]) == (10_000, 0, 0)
    assert account["at_risk_bytes"] == 10_000
    stream.commit()
    account = tables.ledger().streams.of(0)
    assert (account["durable_bytes"], account["at_risk_bytes"], account["received_packets"]) == (10_000, 0, 625)
    assert (account["socket_bytes"], account["handshake_bytes"]) == (10_030, 30)
    assert tables.ledger().holds


def test_a_partial_packet_is_an_account_of_its_own_until_it_is_cut_so_that_none_falls(tables: Tables) -> None:
    stream = tables.open(0, packet_size=16)
    stream.receive(100)
    before = tables.ledger()
    assert (before.streams.of(0)["received_bytes"], before.streams.of(0)["partial_bytes"]) == (96, 4)
    assert before.holds
    assert stream.close()
    after = tables.ledger()
    assert all(after.totals[name] >= value for name, value in before.totals.items() if name not in ("partial_bytes",))
    account = tables.ledger().streams.of(0)
    assert (account["received_bytes"], account["truncated_bytes"], account["socket_bytes"]) == (96, 4, 100)
    assert tables.ledger().holds


def test_streams_that_are_not_stored_are_counted_and_never_at_risk(tables: Tables) -> None:
    stream = tables.open(0, packet_size=16, flags=COUNT_ONLY)
    stream.receive(5000)
    stream.offer()
    stream.receive(9)
    account = tables.ledger().streams.of(0)
    assert (account["received_bytes"], account["unstored_bytes"], account["in_arena_bytes"]) == (5008, 4992, 16)
    assert account["at_risk_bytes"] == account["stored_bytes"] == 0
    assert tables.ledger().holds


def test_dropped_bytes_are_counted_before_and_after_the_storer_passes_the_hole(tables: Tables) -> None:
    stream = tables.open(0, packet_size=24, flags=DROP)
    dropped = fill_and_drop(stream)
    assert dropped > 0
    seen = []
    for _ in range(6):
        seen.append(tables.ledger().streams.of(0)["dropped_bytes"])
        assert tables.ledger().holds
        stream.offer()
        stream.write()
        assert tables.ledger().holds
        stream.commit()
    assert set(seen) == {dropped}
    assert int(stream.words[Str.DROPPED]) == dropped


def test_bytes_of_an_idle_stream_that_goes_on_are_counted_once(tables: Tables) -> None:
    stream = tables.open(0, packet_size=16, flags=KEEP)
    stream.receive(160)
    stream.offer()
    stream.write()
    stream.words[Str.DURABLE] = stream.words[Str.STORED]  # committed, its chunk is not freed yet
    assert stream.window.let_go_tail()
    stream.receive(320)
    assert len(tables.table.used_by(int(stream.words[Str.NUMBER]))) == 2
    account = tables.ledger().streams.of(0)
    assert (account["durable_bytes"], account["in_arena_bytes"]) == (160, 320)
    assert tables.ledger().holds


def test_closed_streams_stay_in_the_totals(tables: Tables) -> None:
    first, second = tables.open(0), tables.open(1)
    for stream in (first, second):
        stream.receive(1605)
    assert first.close()
    first.write()
    first.commit()
    before = tables.ledger().totals
    tables.evict(first)
    ledger = tables.ledger()
    assert ledger.holds
    assert (ledger.gone_streams, len(ledger.streams.rows)) == (1, 1)
    assert {name: ledger.totals[name] for name in before} == before


OPERATIONS = st.tuples(
    st.sampled_from(["receive", "receive", "receive", "offer", "drop", "write", "commit", "let_go", "close", "evict"]),
    st.integers(0, 3),
    st.integers(1, 3 * CHUNK_BYTES),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(OPERATIONS, max_size=60), st.lists(st.sampled_from([1, 7, 16, 24, 5000]), min_size=4, max_size=4))
def test_every_legal_history_balances_at_every_step(operations: list[tuple[str, int, int]], sizes: list[int]) -> None:
    kinds = (DROP, KEEP, COUNT_ONLY, DROP)
    with Tables(chunks=16) as tables:
        streams: list[Stream | None] = [
            tables.open(row, packet_size=size, flags=kinds[row], handshake=row * 10) for row, size in enumerate(sizes)
        ]
        received = 0
        for name, row, amount in operations:
            stream = streams[row]
            if stream is None:
                streams[row] = tables.open(row, packet_size=sizes[row], flags=kinds[row], handshake=3)
                received += 3
                continue
            received += step(tables, stream, name, amount)
            if name == "evict" and stream.words[Str.STATE] == StreamState.FREE:
                streams[row] = None
            ledger = tables.ledger()
            assert off_names(ledger) == []
            assert len(ledger.off) == 0
            assert ledger.totals["socket_bytes"] == received + 60


def step(tables: Tables, stream: Stream, name: str, amount: int) -> int:
    """One legal move; the bytes it took from the socket."""
    kept = bool(int(stream.words[Str.FLAGS]) & StreamFlag.STORE)
    if name == "evict":
        done = not kept or stream.words[Str.DURABLE] == stream.words[Str.POSITION]
        if stream.closed and done:
            tables.evict(stream)
    elif name in {"write", "commit"}:
        if kept:
            stream.write() if name == "write" else stream.commit()
    elif not stream.closed:
        if name == "receive":
            return stream.receive(amount)
        if name == "offer":
            stream.offer()
        elif name == "drop" and stream.window.drops:
            stream.drop()
        elif name == "let_go":
            stream.window.let_go_tail()
        elif name == "close":
            stream.close()
    return 0


# -- what is wrong is found

WRONG_WORDS = [
    (Str.SOCKET, 1),
    (Str.SOCKET, -1),
    (Str.POSITION, 1),
    (Str.POSITION, -16),
    (Str.TRUNCATED, 5),
    (Str.HANDSHAKE, 1),
    (Str.DROPPED, 16),
    (Str.LOST, 16),
    (Str.STORED_HOLES, 1),
    (Str.DURABLE, 1 << 40),
    (Str.ACKED, 1 << 40),
]


@pytest.mark.parametrize(("word", "change"), WRONG_WORDS)
@pytest.mark.parametrize("row", [0, 1])
def test_a_single_wrong_word_of_a_stream_is_found(tables: Tables, row: int, word: int, change: int) -> None:
    streams = busy(tables)
    assert tables.ledger().holds
    streams[row].words[word] = int(streams[row].words[word]) + change
    ledger = tables.ledger(tries=2)
    assert not ledger.holds
    assert ledger.off.tolist() == [row]


@given(st.integers(0, 1), st.integers(1, 1 << 40), st.sampled_from([Str.SOCKET, Str.TRUNCATED, Str.DROPPED]))
@settings(max_examples=30, deadline=None)
def test_a_wrong_word_is_found_however_wrong_it_is(row: int, change: int, word: int) -> None:
    with Tables() as tables:
        busy(tables)[row].words[word] += np.uint64(change)
        assert tables.ledger().off.tolist() == [row]


def test_a_chunk_that_was_given_away_with_bytes_in_it_is_found(tables: Tables) -> None:
    streams = busy(tables)
    held = tables.table.used_by(int(streams[0].words[Str.NUMBER]))
    tables.table.words[held[-1]] = FREE
    ledger = tables.ledger()
    assert ledger.off.tolist() == [0]
    assert off_names(ledger) == [EQUATIONS[1].text]


def test_a_chunk_row_that_says_another_place_is_found(tables: Tables) -> None:
    streams = busy(tables)
    held = tables.table.used_by(int(streams[0].words[Str.NUMBER]))
    tables.table.bases[held[-1]] += np.uint64(1 << 30)
    tables.table.firsts[held[-1]] += np.uint64(1 << 30)
    assert tables.ledger().off.tolist() == [0]


def test_stored_below_durable_is_found(tables: Tables) -> None:
    stream = busy(tables)[1]
    stream.words[Str.STORED] = int(stream.words[Str.DURABLE]) - 7
    ledger = tables.ledger()
    assert ledger.off.tolist() == [1]


@pytest.mark.parametrize("word", [Gone.RECEIVED_BYTES, Gone.STORED_BYTES, Gone.SOCKET_BYTES, Gone.DROPPED_BYTES])
def test_wrong_totals_of_closed_streams_are_found(tables: Tables, word: int) -> None:
    busy(tables)
    tables.state.words[Head.GONE + word] += 1
    ledger = tables.ledger()
    assert not ledger.holds
    assert len(ledger.off) == 0
    assert off_names(ledger)


# -- what moves is looked at again


def test_a_word_that_moved_while_it_was_read_is_not_called_wrong(tables: Tables) -> None:
    stream = busy(tables)[0]
    stream.words[Str.SOCKET] += np.uint64(100)  # the worker is between its two stores

    def go_on(number: int) -> None:
        if number == 3:
            stream.words[Str.SOCKET] -= np.uint64(100)

    ledger = settle(tables.state, tables.table, go_on, tries=20)
    assert ledger.holds
    assert ledger.tries == 3


def test_a_stream_that_stays_off_is_named_after_all_tries(tables: Tables) -> None:
    stream = busy(tables)[1]
    stream.words[Str.SOCKET] += np.uint64(1)
    waits: list[int] = []
    ledger = settle(tables.state, tables.table, waits.append, tries=5)
    assert waits == [1, 2, 3, 4, 5]
    assert ledger.off.tolist() == [1]
    assert tables.state.stream_name(int(ledger.streams.rows[ledger.off[0]])) == "stream-1"


def test_totals_that_are_being_written_are_waited_for(tables: Tables) -> None:
    busy(tables)
    tables.state.words[Head.GONE_VERSION] += 1

    def finish(number: int) -> None:
        if number == 2:
            tables.state.words[Head.GONE_VERSION] += 1

    ledger = settle(tables.state, tables.table, finish, tries=20)
    assert ledger.holds
    assert ledger.tries == 2


def test_totals_that_nobody_finishes_writing_are_said_not_to_hold(tables: Tables) -> None:
    tables.state.words[Head.GONE_VERSION] += 1
    ledger = tables.ledger(tries=3)
    assert not ledger.holds
    assert not ledger.gone_readable


def test_a_stream_that_leaves_while_it_is_looked_at_is_counted_once(tables: Tables) -> None:
    streams = busy(tables)
    third = streams[2]
    third.words[Str.SOCKET] += np.uint64(1)  # between two stores
    total = tables.ledger().totals["socket_bytes"] - 1

    def leave(number: int) -> None:
        if number == 2:
            third.words[Str.SOCKET] -= np.uint64(1)
            third.close()
            tables.evict(third)
            tables.open(2, name="another")

    ledger = settle(tables.state, tables.table, leave, tries=20)
    assert ledger.holds
    assert ledger.totals["socket_bytes"] == total
    assert ledger.gone_streams == 1


def test_streams_at_full_speed_balance_while_another_process_writes_them(tables: Tables) -> None:
    streams = [tables.open(0, packet_size=24, flags=DROP), tables.open(1, packet_size=16, flags=KEEP)]
    tables.state.words[Head.ACTIVE_CONNECTIONS] = 2
    writer = os.fork()
    if writer == 0:
        for turn in range(1 << 60):
            for stream in streams:
                stream.receive(CHUNK_BYTES // 2 + turn % 100)
                stream.offer()
                if stream.words[Str.FLAGS] == DROP and turn % 3 == 0:
                    stream.drop()
                if turn % 7 == 0:
                    stream.write()
                    stream.commit()
    try:
        started = int(streams[0].words[Str.POSITION])
        for _ in range(40):
            ledger = settle(tables.state, tables.table, pause, tries=20)
            assert ledger.holds, (off_names(ledger), [ledger.streams.of(int(i)) for i in ledger.off])
        deadline_s = time.monotonic() + 10
        while streams[0].words[Str.POSITION] == started and time.monotonic() < deadline_s:
            os.sched_yield()
        assert streams[0].words[Str.POSITION] > started
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)


# -- cost


def test_ten_thousand_streams_and_twenty_thousand_chunks_take_milliseconds() -> None:
    with Tables(chunks=20_000, streams=10_000, connections=1) as tables:
        state, table = tables.state, tables.table
        rows = np.arange(10_000, dtype=np.uint64)
        state.streams[:, Str.STATE] = StreamState.OPEN
        state.streams[:, Str.NUMBER] = rows + np.uint64(1000)
        state.streams[:, Str.PACKET_SIZE] = 16
        state.streams[:, Str.FLAGS] = StreamFlag.STORE
        state.streams[:, Str.POSITION] = state.streams[:, Str.SOCKET] = 2 * CHUNK_BYTES
        for half in (0, 1):
            table.bases[half::2] = table.firsts[half::2] = half * CHUNK_BYTES
            table.serials[half::2] = half + 1
            table.words[half::2] = ((rows + np.uint64(1000)) << np.uint64(2)) | np.uint64(2)
        took = []
        for _ in range(5):
            start = time.perf_counter()
            ledger = tables.ledger()
            took.append(time.perf_counter() - start)
        assert ledger.holds
        assert ledger.totals["in_arena_bytes"] == 20_000 * CHUNK_BYTES
        assert min(took) < 0.1  # about 10 ms on an idle machine; this one may be busy
        print(f"\nledger of 10,000 streams: {1000 * min(took):.1f} ms")
