"""Rows of streams as the supervisor takes and gives them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from mpserverd.arena.state import StateTable, Str, StreamFlag, StreamState
from mpserverd.supervisor.stream_rows import NO_CONNECTION, StreamRows


@pytest.fixture
def state() -> Iterator[StateTable]:
    table = StateTable.create(connections=4, streams=4, slots=4)
    yield table
    os.close(table.fd)


def as_storer(state: StateTable, row: int, new: StreamState) -> None:
    state.streams[row, Str.STATE] = new


def test_a_fresh_stream_is_open_with_a_number_and_an_epoch(state: StateTable) -> None:
    rows = StreamRows(state)
    row = rows.open_fresh("peer", 3, 16, StreamFlag.STORE)
    assert row is not None
    words = state.streams[row]
    assert words[Str.STATE] == StreamState.OPEN
    assert words[Str.EPOCH] != 0
    assert words[Str.NUMBER] != 0
    assert words[Str.CONNECTION] == NO_CONNECTION
    assert state.stream_name(row) == "peer"


def test_nothing_of_the_last_stream_is_left_in_a_row_that_is_taken_again(state: StateTable) -> None:
    rows = StreamRows(state)
    taken = [rows.open_fresh(f"peer-{number}", 1, 16, StreamFlag.STORE) for number in range(4)]
    row = taken[2]
    assert row is not None
    number = int(state.streams[row, Str.NUMBER])
    state.streams[row, Str.POSITION :] = 77
    state.latency[row] = 5
    rows.drain(row)
    as_storer(state, row, StreamState.FREE)
    assert rows.sweep() == 1
    assert rows.open_fresh("next", 1, 16, StreamFlag(0)) == row
    assert not state.streams[row, Str.POSITION :].any()
    assert not state.latency[row].any()
    assert state.streams[row, Str.NUMBER] > number


def test_rows_that_came_back_just_when_all_were_used_up_are_given_once(
    state: StateTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given twice, two connections would write into one stream."""
    monkeypatch.setattr("mpserverd.supervisor.stream_rows._RESCAN_S", 0.0)
    rows = StreamRows(state)
    for number in range(4):
        rows.open_fresh(str(number), 1, 16, StreamFlag(0))
    for row in (1, 2):
        rows.drain(row)
        as_storer(state, row, StreamState.FREE)
    again = [rows.open_fresh(f"again-{number}", 1, 16, StreamFlag(0)) for number in range(4)]
    assert sorted(row for row in again if row is not None) == [1, 2]


def test_rows_run_out_and_come_back(state: StateTable) -> None:
    rows = StreamRows(state)
    taken = [rows.open_fresh(str(number), 1, 16, StreamFlag(0)) for number in range(5)]
    assert sorted(row for row in taken if row is not None) == [0, 1, 2, 3]
    assert taken[4] is None
    rows.drain(0)
    assert rows.open_fresh("early", 1, 16, StreamFlag(0)) is None, "the storer still has it"
    as_storer(state, 0, StreamState.FREE)
    rows.sweep()
    assert rows.open_fresh("late", 1, 16, StreamFlag(0)) == 0


def test_a_named_stream_is_known_until_the_storer_has_freed_it(state: StateTable) -> None:
    rows = StreamRows(state)
    row = rows.begin_opening("pump", 1, 16, StreamFlag.STORE, client_index=6)
    assert row is not None
    assert rows.state_of(row) is StreamState.OPENING
    assert state.streams[row, Str.FLAGS] == StreamFlag.STORE | StreamFlag.NAMED
    assert state.streams[row, Str.CLIENT_INDEX] == 7
    as_storer(state, row, StreamState.OPEN)
    assert rows.opened() == [row]
    assert rows.opened() == []
    rows.drain(row)
    assert rows.named("pump") == row
    as_storer(state, row, StreamState.FREE)
    rows.sweep()
    assert rows.named("pump") is None


def test_an_opening_row_is_left_to_the_storer_when_nobody_waits_any_more(state: StateTable) -> None:
    rows = StreamRows(state)
    row = rows.begin_opening("pump", 1, 16, StreamFlag.STORE, client_index=0)
    assert row is not None
    rows.use(row, 2)
    before = state.streams[row].copy()
    rows.abandon(row)
    assert (state.streams[row] == before).all()
    assert rows.user(row) is None


def asked_for(rows: StreamRows) -> int:
    row = rows.begin_opening("press-7", 1, 16, StreamFlag.STORE, 0)
    assert row is not None
    rows.abandon(row)
    return row


def test_a_stream_that_somebody_found_open_is_not_told_as_opened_once_more(state: StateTable) -> None:
    """Told again, its connection would be placed again: behind what has come from it meanwhile, and with another
    worker beside the first."""
    rows = StreamRows(state)
    row = asked_for(rows)
    as_storer(state, row, StreamState.OPEN)
    rows.use(row, 3)
    rows.settled(row)
    assert rows.opened() == []


def test_a_stream_that_is_drained_before_it_was_told_as_opened_is_drained_once(state: StateTable) -> None:
    """Drained again it would be taken out of the hands of who has its row then."""
    rows = StreamRows(state)
    row = asked_for(rows)
    as_storer(state, row, StreamState.OPEN)
    rows.drain(row)
    assert rows.opened() == []


def test_who_takes_a_stream_just_when_the_storer_opens_it_is_told(state: StateTable) -> None:
    rows = StreamRows(state)
    row = asked_for(rows)
    as_storer(state, row, StreamState.OPEN)
    rows.use(row, 3)
    assert rows.opened() == [row]


def test_who_waits_for_a_stream_is_told_when_it_is_open(state: StateTable) -> None:
    rows = StreamRows(state)
    row = asked_for(rows)
    rows.use(row, 3)
    assert rows.opened() == []
    as_storer(state, row, StreamState.OPEN)
    assert rows.opened() == [row]
    assert rows.opened() == []
