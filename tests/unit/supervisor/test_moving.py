"""Memory moves at a start, and a supervisor that dies at any step of it leaves one whole memory in the store."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from mpserverd.arena.chunks import Arena
from mpserverd.arena.migrate import Geometry
from mpserverd.arena.state import (
    CRASHES_KEPT,
    FIRST_WORKER_SLOT,
    Con,
    ConnectionState,
    Slot,
    StateTable,
    Str,
    StreamFlag,
    StreamState,
)
from mpserverd.arena.window import LeasePool, StreamWindow
from mpserverd.config.schema import Config
from mpserverd.errors import LayoutError, StartError
from mpserverd.supervisor import connections_lock, moving
from mpserverd.supervisor.connections_lock import lock
from mpserverd.supervisor.core import SLOTS
from mpserverd.supervisor.fd_store import FdStore
from mpserverd.supervisor.making_core import take_memory
from mpserverd.supervisor.moving import Moving
from mpserverd.supervisor.remembered import Remembered
from mpserverd.supervisor.stored_memory import Memory, memory_generation, memory_names
from mpserverd.supervisor.takeover import Inheritance, look_through

CONTENT = random.Random(5).randbytes(24_000)
PRESENT = Geometry(connections=4, streams=6, slots=SLOTS, chunk_bytes=4096, chunks=20)
LARGER = dataclasses.replace(PRESENT, chunks=40)
OTHER = dataclasses.replace(PRESENT, chunk_bytes=8192, chunks=16, connections=9)


class KilledError(BaseException):
    """The supervisor dies here."""


class Store(FdStore):
    """What systemd keeps. ``steps_max`` messages come through before the supervisor is killed."""

    def __init__(self) -> None:
        super().__init__({})
        self.kept: dict[str, list[int]] = {}
        self.steps_max: float = float("inf")
        self.steps = 0
        self.answers = True

    def push(self, name: str, fds: Sequence[int]) -> None:
        self._step()
        self.kept.setdefault(name, []).extend(os.dup(fd) for fd in fds)

    def remove(self, name: str) -> None:
        self._step()
        for fd in self.kept.pop(name, []):
            os.close(fd)

    def barrier(self) -> int | None:
        self._step()
        return None if self.answers else os.eventfd(0, os.EFD_CLOEXEC)

    def _step(self) -> None:
        self.steps += 1
        if self.steps > self.steps_max:
            raise KilledError

    def hand_back(self) -> Inheritance:
        fds = {name: [os.dup(fd) for fd in fds] for name, fds in self.kept.items()}
        return look_through(fds, self, 1)

    def close(self) -> None:
        self.steps_max = float("inf")
        for name in list(self.kept):
            self.remove(name)


@pytest.fixture
def store() -> Iterator[Store]:
    """One connection, and 24,000 bytes of it in 6 chunks."""
    made = Store()
    state = StateTable.create(connections=PRESENT.connections, streams=PRESENT.streams, slots=PRESENT.slots)
    arena = Arena.create(size_bytes=PRESENT.chunks * PRESENT.chunk_bytes, chunk_bytes=PRESENT.chunk_bytes)
    facts = Remembered.create()
    state.connections[0, Con.STATE] = ConnectionState.ASSIGNED
    row = state.streams[0]
    row[Str.NUMBER], row[Str.PACKET_SIZE], row[Str.FLAGS], row[Str.STATE] = 7, 16, StreamFlag.STORE, StreamState.OPEN
    arena.table.lease(1, 12)
    window = StreamWindow(state, LeasePool(arena, state, 1), 0)
    window.adopt(0)
    while window.position < len(CONTENT):
        place = window.room(4096)[0]
        piece = CONTENT[window.position : window.position + len(place)]
        place[: len(piece)] = piece
        window.received(len(piece))
    fds = (state.fd, arena.table.fd, arena.data_fd, facts.fd)
    for name, fd in zip((*memory_names(1), "facts"), fds, strict=True):
        made.push(name, [fd])
        os.close(fd)
    yield made
    made.close()


def test_a_start_that_waits_for_a_lock_in_vain_is_no_crash(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody of the earlier run hangs in the kernel and holds it. Six such starts within a minute discard nothing."""
    monkeypatch.setattr(connections_lock, "WAIT_S", 0.0)
    held = lock(store.kept["state"][0])
    for _ in range(CRASHES_KEPT):
        found = store.hand_back()
        assert found.memory is not None, "discarded"
        with pytest.raises(StartError, match="does not die"):
            take_memory(found, Config(), store)
    os.close(held)
    found = store.hand_back()
    assert found.memory is not None
    assert found.memory.state.head_words("CRASH_COUNT")[0] == 1, "the death before the first of them"


def settle(store: Store, wanted: Geometry) -> Memory:
    found = store.hand_back()
    assert found.memory is not None
    return Moving(found.memory, wanted, store).settle()


def content(memory: Memory) -> bytes:
    """The connection's bytes, as its next worker finds them."""
    window = StreamWindow(memory.state, LeasePool(memory.arena, memory.state, 99), 0)
    window.adopt(len(CONTENT))
    return b"".join(bytes(memory.arena.data[at : at + n]) for at, n in window.pieces(0, len(CONTENT)))


def close(memory: Memory) -> None:
    for fd in (memory.state.fd, memory.arena.table.fd, memory.arena.data_fd, memory.facts.fd, memory.lock_fd):
        os.close(fd)


def sizes(memory: Memory) -> tuple[int, int, int]:
    return memory.state.connection_count, memory.arena.chunk_bytes, memory.arena.count


def test_memory_of_the_right_size_stays_where_it_is(store: Store) -> None:
    memory = settle(store, PRESENT)
    assert (memory.generation, content(memory)) == (1, CONTENT)
    assert store.steps == 4, "the four that the fixture pushed"
    close(memory)


@pytest.mark.parametrize("wanted", [LARGER, OTHER])
def test_the_store_has_the_new_memory_and_not_the_old_one(store: Store, wanted: Geometry) -> None:
    memory = settle(store, wanted)
    assert content(memory) == CONTENT
    assert sizes(memory) == (wanted.connections, wanted.chunk_bytes, wanted.chunks)
    assert sorted(store.kept) == sorted([*memory_names(2), "facts"])
    close(memory)
    memory = settle(store, PRESENT)
    assert (memory.generation, content(memory), sizes(memory)[1:]) == (3, CONTENT, (4096, 20))
    close(memory)


@pytest.mark.parametrize("step", range(8))
def test_a_supervisor_that_is_killed_at_any_step_leaves_one_whole_memory(store: Store, step: int) -> None:
    """Three pushes, a barrier, three removals; after the last it serves, and the next start finds that."""
    store.steps_max = store.steps + step
    if step < 7:
        with pytest.raises(KilledError):
            settle(store, OTHER)
    else:
        close(settle(store, OTHER))
    store.steps_max = float("inf")
    memory = settle(store, dataclasses.replace(OTHER, chunks=24))
    assert content(memory) == CONTENT
    assert sizes(memory) == (9, 8192, 24)
    assert memory.generation == (2 if step < 3 else 3)
    assert sorted(store.kept) == sorted([*memory_names(memory.generation), "facts"])
    close(memory)


def test_a_newer_memory_counts_when_both_are_whole(store: Store) -> None:
    """The old one may wait for its removal while the new one is already served from."""
    store.steps_max = store.steps + 4
    with pytest.raises(KilledError):
        settle(store, OTHER)
    store.steps_max = float("inf")
    assert len(store.kept) == 7
    memory = settle(store, OTHER)
    assert (memory.generation, content(memory)) == (2, CONTENT)
    close(memory)


def test_a_store_that_does_not_answer_keeps_the_old_memory(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpserverd.supervisor.takeover.BARRIER_S", 0.05)
    store.answers = False
    memory = settle(store, LARGER)
    assert (memory.generation, sizes(memory)[2], content(memory)) == (1, 20, CONTENT)
    assert sorted(store.kept) == sorted([*memory_names(1), "facts"])
    close(memory)


def test_less_than_what_is_held_waits_and_the_rest_is_done(store: Store) -> None:
    memory = settle(store, dataclasses.replace(OTHER, chunk_bytes=4096, chunks=7))
    assert sizes(memory) == (9, 4096, 20)
    assert content(memory) == CONTENT
    close(memory)


def test_memory_that_is_not_there_keeps_the_old_size(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise StartError("shared memory needs more")

    monkeypatch.setattr(moving, "check_available", refuse)
    memory = settle(store, LARGER)
    assert (memory.generation, sizes(memory)[2], content(memory)) == (1, 20, CONTENT)
    close(memory)


def test_rows_that_are_taken_are_kept_when_fewer_are_wanted(store: Store) -> None:
    found = store.hand_back()
    assert found.memory is not None
    found.memory.state.tables["connections"][3, Con.STATE] = ConnectionState.ENDED
    memory = Moving(found.memory, dataclasses.replace(LARGER, connections=2, streams=2), store).settle()
    assert (memory.state.connection_count, memory.state.stream_count) == (4, 2)
    close(memory)


def test_a_killed_process_that_still_runs_keeps_the_memory_where_it_is(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is copied while somebody may write it. (No real process survives a SIGKILL for so long.)"""
    monkeypatch.setattr(moving, "STILL_S", 0.05)
    found = store.hand_back()
    assert found.memory is not None
    state_fd = found.memory.state.fd
    command, pipe = [sys.executable, "-c", "print(flush=True); input()"], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, pass_fds=[state_fd]) as process:
        assert process.stdout is not None
        process.stdout.readline()  # one that still loads its files may sleep in the kernel, which counts as still
        found.memory.state.tables["slots"][FIRST_WORKER_SLOT, Slot.PID] = process.pid
        monkeypatch.setattr(moving, "kill_leftovers", lambda pids, fd: [pid for pid in pids if pid])
        memory = Moving(found.memory, LARGER, store).settle()
        assert memory.generation == 1
        process.communicate(b"\n")
    close(memory)
    memory = settle(store, LARGER)
    assert memory.generation == 2
    close(memory)


def test_another_layout_that_cannot_be_moved_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise StartError("shared memory needs more")

    monkeypatch.setattr(moving, "check_available", refuse)
    monkeypatch.setattr(moving, "SLOTS", SLOTS + 1)
    found = store.hand_back()
    assert found.memory is not None
    with pytest.raises(LayoutError, match="needs more"):
        Moving(found.memory, PRESENT, store).settle()
    for fd in found.memory.fds.values():
        os.close(fd)


@pytest.mark.parametrize(
    ("name", "generation"),
    [
        ("state", 1),
        ("arena", 1),
        ("chunks-2", 2),
        ("arena-31", 31),
        *[(name, None) for name in ("facts", "state-", "state-1", "state-x", "listener-state")],
    ],
)
def test_names_tell_the_generation(name: str, generation: Any) -> None:
    assert memory_generation(name) == generation
