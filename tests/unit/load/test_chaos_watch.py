"""A chunk that nobody owns, or somebody who is dead, does not escape the look at the end of a run."""

from __future__ import annotations

import pytest

from mpserverd.arena.chunks import Arena, leased_word, used_word
from mpserverd.arena.live import LiveState
from mpserverd.arena.state import FIRST_WORKER_SLOT, Slot, StateTable
from mpserverd.load.chaos_watch import Watch


def test_chunks_must_be_free_or_leased_to_the_living(monkeypatch: pytest.MonkeyPatch) -> None:
    state = StateTable.create(connections=2, streams=2, slots=FIRST_WORKER_SLOT + 2)
    arena = Arena.create(size_bytes=8 * 4096, chunk_bytes=4096)
    watch = Watch("nowhere")
    monkeypatch.setattr(watch, "_maybe_live", lambda _: LiveState({}, state, arena.table))
    assert watch.stray_chunks() == ""
    state.slots[FIRST_WORKER_SLOT, [Slot.PID, Slot.LEASE]] = 4711, 5
    arena.table.words[:2] = leased_word(5)
    assert watch.stray_chunks() == ""
    arena.table.words[3] = leased_word(4)
    assert watch.stray_chunks() == "1 chunks are leased to dead processes [4]"
    arena.table.words[3:5] = used_word(7)
    assert watch.stray_chunks() == "2 chunks are held, of streams [7]"
    monkeypatch.setattr(watch, "_maybe_live", lambda _: None)
    assert watch.stray_chunks() == "the daemon does not answer"
