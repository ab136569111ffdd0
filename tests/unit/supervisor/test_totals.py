"""What the last line of a run says."""

from __future__ import annotations

from mpserverd.arena.state import Gone, Head, Str, StreamFlag, StreamState
from mpserverd.supervisor.core import Core
from mpserverd.supervisor.totals import read_totals


def put(core: Core, row: int, state: StreamState, flags: StreamFlag, **columns: int) -> None:
    words = core.state.streams[row]
    words[Str.STATE], words[Str.FLAGS] = state, flags
    for name, value in columns.items():
        words[getattr(Str, name)] = value


def test_streams_here_and_gone_are_summed(core: Core) -> None:
    core.state.words[Head.TOTAL_CONNECTIONS] = 7
    core.state.words[Head.GONE + Gone.RECEIVED_BYTES] = 1000
    core.state.words[Head.GONE + Gone.DURABLE_BYTES] = 900
    put(core, 0, StreamState.OPEN, StreamFlag.STORE, POSITION=100, DURABLE=60)
    put(core, 1, StreamState.DRAINING, StreamFlag.STORE, POSITION=50, DURABLE=50, DURABLE_HOLES=10)
    totals = read_totals(core.state)
    assert totals.connections == 7
    assert totals.received_bytes == 1150
    assert totals.durable_bytes == 1000
    assert totals.at_risk_bytes == 40


def test_what_is_not_to_be_stored_is_not_at_risk(core: Core) -> None:
    put(core, 0, StreamState.OPEN, StreamFlag(0), POSITION=100)
    assert read_totals(core.state).at_risk_bytes == 0


def test_a_free_row_counts_for_nothing(core: Core) -> None:
    put(core, 0, StreamState.FREE, StreamFlag.STORE, POSITION=100)
    assert read_totals(core.state).received_bytes == 0
