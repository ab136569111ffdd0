"""Layouts of other versions: known by a table, explained by whoever wrote the memory, or unknown and refused."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from mpserverd.arena import layouts
from mpserverd.arena.layouts import (
    CONNECTIONS,
    CURRENT_STATE,
    HEAD,
    LATENCY,
    NAMES,
    SLOTS,
    STATE_LAYOUTS,
    STREAMS,
    StateLayout,
    StateMemory,
    chunk_layout,
    description,
    state_layout,
)
from mpserverd.arena.migrate import copy_state
from mpserverd.arena.shared import HEADER_WORDS, PAGE_BYTES, SharedWords, round_up
from mpserverd.arena.state import STATE_MAGIC, STATE_VERSION, ConnectionState, StateTable, Str, StreamState
from mpserverd.errors import LayoutError

CONNECTION_COUNT, STREAM_COUNT, SLOT_COUNT = 3, 5, 6


@contextmanager
def memory_in(layout: StateLayout) -> Iterator[int]:
    """A state table as a daemon of that layout makes it."""
    words = HEADER_WORDS + sum(
        count * width
        for count, width in (
            (CONNECTION_COUNT, layout.rows[CONNECTIONS].words),
            (STREAM_COUNT, layout.rows[STREAMS].words + layout.name_words + layout.latency_words),
            (SLOT_COUNT, layout.rows[SLOTS].words),
        )
    )
    fd = SharedWords.create(
        "state",
        round_up(words * 8, PAGE_BYTES),
        magic=STATE_MAGIC,
        version=layout.version,
        geometry=[CONNECTION_COUNT, STREAM_COUNT, SLOT_COUNT],
    )
    yield fd
    os.close(fd)


def test_the_first_layout_is_carried_over_column_by_column() -> None:
    chance = np.random.default_rng(1)
    with memory_in(STATE_LAYOUTS[1]) as fd:
        old = StateMemory(fd, {})
        for table in (CONNECTIONS, STREAMS, SLOTS, NAMES, LATENCY):
            old.tables[table][:] = chance.integers(1, 1 << 40, old.tables[table].shape, dtype=np.uint64)
        old.column(CONNECTIONS, "STATE")[:] = ConnectionState.ASSIGNED
        old.column(STREAMS, "STATE")[:] = StreamState.DRAINING
        old.head_words("GONE")[:17] = range(1, 18)
        new = StateTable.create(connections=4, streams=6, slots=6)
        copy_state(old, StateMemory(new.fd, {}))
        taken = StateMemory(new.fd, {})
        for table, row in STATE_LAYOUTS[1].rows.items():
            for name, (at, end) in row.spans().items():
                if name not in CURRENT_STATE.rows[table].columns:
                    continue
                there = CURRENT_STATE.rows[table].spans()[name]
                width = min(end - at, there[1] - there[0])
                kept = taken.tables[table][: len(old.tables[table]), there[0] : there[0] + width]
                assert np.array_equal(kept, old.tables[table][:, at : at + width]), (table, name)
        assert np.array_equal(new.latency[:STREAM_COUNT], old.tables[LATENCY])
        assert new.connection_count == 4
        os.close(new.fd)


def test_a_released_layout_is_what_this_version_has_or_another_number() -> None:
    """Whoever moves a column gives the layout a new number, and writes the old one down."""
    assert STATE_VERSION in STATE_LAYOUTS
    assert sorted(STATE_LAYOUTS) == list(range(1, STATE_VERSION + 1)), "the table has every layout there ever was"
    assert STATE_LAYOUTS[STATE_VERSION] is CURRENT_STATE


def described(version: int = 77, **changes: Any) -> dict[str, Any]:
    """This layout under another number, as it is read back from JSON."""
    text: dict[str, Any] = json.loads(json.dumps(description()))
    text["state"]["version"] = text["chunks"]["version"] = version
    return {**text, **changes}


def test_an_unknown_number_is_understood_by_its_own_description() -> None:
    layout = state_layout(77, described())
    assert layout.rows == CURRENT_STATE.rows
    assert (layout.name_words, layout.latency_words) == (CURRENT_STATE.name_words, CURRENT_STATE.latency_words)
    assert chunk_layout(77, described()).columns == layouts.CHUNK_COLUMNS


@pytest.mark.parametrize(
    ("known", "why"),
    [
        ({}, "layout 77, this version knows 1"),
        (described(78), "layout 77, this version knows 1"),
        (described(least_reader=STATE_VERSION + 1), "for daemons that know layout"),
        (described(stream_states={"OPEN": 9}), "other numbers for stream_states"),
        (described(connection_states={"ENDED": 9}), "other numbers for connection_states"),
    ],
)
def test_what_nobody_explains_is_refused_and_never_guessed(known: dict[str, Any], why: str) -> None:
    with pytest.raises(LayoutError, match=why):
        state_layout(77, known)


def test_a_row_in_a_state_that_this_version_does_not_know_is_refused() -> None:
    state = StateTable.create(connections=2, streams=2, slots=4)
    state.streams[1, Str.STATE] = 77
    with pytest.raises(LayoutError, match=r"streams are in states that this version does not know: \[77\]"):
        StateMemory(state.fd, {})
    os.close(state.fd)


def test_the_header_of_the_new_memory_stays_its_own() -> None:
    with memory_in(STATE_LAYOUTS[1]) as fd:
        new = StateTable.create(connections=9, streams=9, slots=6)
        copy_state(StateMemory(fd, {}), StateMemory(new.fd, {}))
        again = StateTable(new.fd)
        assert (again.connection_count, again.words[1]) == (9, STATE_VERSION)
        assert HEAD in StateMemory(new.fd, {}).tables
        os.close(new.fd)
