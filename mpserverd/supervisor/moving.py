"""Memory that outlives the supervisor gets the size, the grid and the layout that are wanted now.

At the start after another supervisor no child lives that touches it, so everything is copied into fresh memory: made,
filled in, stored, confirmed by a barrier, and only then is the old memory removed from the store. A supervisor that is
killed at any instant of this leaves one whole memory behind, the old or the new one, and both say the same.

A storer that hangs in the kernel may still hold the old memory. It will run no step of its own any more (it has been
killed, and that is waited for), but a write that it had begun goes on from the old pages, and so may the commit. The
same bytes stand in the new memory; nobody writes files before it is gone; and where its catalog is ahead of the tables
the next storer believes the catalog, as after any death.

What does not fit keeps its size; that is said, and tried again at the next start. Memory of another layout has to move
or is lost.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Iterator

from mpserverd import log
from mpserverd.arena.chunks import Arena
from mpserverd.arena.layouts import CONNECTIONS, CURRENT_CHUNKS, CURRENT_STATE, STREAMS, StateMemory
from mpserverd.arena.migrate import (
    Geometry,
    HeldStreams,
    copy_chunks,
    copy_state,
    free_chunks,
    plan_chunks,
    rows_needed,
)
from mpserverd.arena.state import StateTable
from mpserverd.errors import LayoutError, StartError
from mpserverd.limits import CHUNKS_PER_CONNECTION
from mpserverd.supervisor.connections_lock import kill_leftovers, lock, wait_until_still
from mpserverd.supervisor.core import SLOTS
from mpserverd.supervisor.fd_store import FdStore
from mpserverd.supervisor.resources import check_available, memory_bytes
from mpserverd.supervisor.stored_memory import Memory, StoredMemory, memory_names
from mpserverd.supervisor.takeover import await_barrier

logger = logging.getLogger(__name__)

STILL_S = 1.0
"""A killed process needs a moment; one that still runs after this keeps the memory as it is."""


class Moving:
    """``settle`` once, at the start."""

    def __init__(self, stored: StoredMemory, wanted: Geometry, store: FdStore) -> None:
        self._stored = stored
        self._wanted = wanted
        self._store = store
        self._present = Geometry.of(stored.state, stored.chunks)
        self._reasons: dict[str, str] = {}
        """Why something stays as it is, by key."""
        self._killed: list[int] = []

    def settle(self) -> Memory:
        """Everybody else is made to stop; then the memory is taken as it is, or moved. Raises StartError when somebody
        does not let go of it, and LayoutError when it cannot be used."""
        stored = self._stored
        state_fd = stored.state.fd
        self._killed = kill_leftovers(stored.pids(), state_fd)
        lock_fd = lock(state_fd, guard_pid=stored.guard_pid())
        try:
            for aim in self._aims():
                moved = self._try_move(aim)
                if moved is not None:
                    os.close(lock_fd)
                    return moved
            if not self._is_readable:
                raise LayoutError("; ".join(self._reasons.values()))
        except BaseException:
            os.close(lock_fd)
            raise
        self._say_what_stays()
        names = memory_names(stored.generation)
        state, table, data = (stored.fds[name] for name in names)
        return Memory(StateTable(state), Arena(table, data), stored.facts, stored.generation, lock_fd)

    # -- where to

    @property
    def _is_readable(self) -> bool:
        """Whether this version can work on it as it is."""
        stored = self._stored
        layouts = (stored.state.layout.version, stored.chunks.layout.version)
        return layouts == (CURRENT_STATE.version, CURRENT_CHUNKS.version) and self._present.slots == SLOTS

    def _aims(self) -> Iterator[Geometry]:
        """What to try, the best first; nothing when all is as it should be. Smaller tables alone are worth no move."""
        present, wanted = self._present, self._wanted
        same_arena = dataclasses.replace(wanted, chunk_bytes=present.chunk_bytes, chunks=present.chunks)
        for aim in dict.fromkeys((wanted, same_arena)):
            arena_stays = (aim.chunk_bytes, aim.chunks) == (present.chunk_bytes, present.chunks)
            rows = self._rows(aim, shrink=not arena_stays or not self._is_readable)
            if rows != present or not self._is_readable:
                yield rows

    def _rows(self, aim: Geometry, *, shrink: bool) -> Geometry:
        """Tables with a row for everybody who has one: rows keep their numbers."""
        state, present = self._stored.state, self._present
        connections = rows_needed(state, CONNECTIONS) if shrink else present.connections
        streams = rows_needed(state, STREAMS) if shrink else present.streams
        return dataclasses.replace(
            aim, connections=max(aim.connections, connections), streams=max(aim.streams, streams)
        )

    # -- moving

    def _try_move(self, aim: Geometry) -> Memory | None:
        """None when it cannot be; why is noted."""
        began_s = time.monotonic()
        self._killed = wait_until_still(self._killed, self._stored.state.fd, STILL_S)
        try:
            if self._killed:
                raise StartError(f"pid {', '.join(map(str, self._killed))} of the earlier run does not die")
            return self._move(aim, began_s)
        except StartError as error:
            self._refuse(aim, str(error))
            return None

    def _move(self, aim: Geometry, began_s: float) -> Memory:
        """Raises StartError; the old memory is then as it was, in the store too."""
        stored = self._stored
        plan = plan_chunks(stored.chunks, HeldStreams.of(stored.state), aim.chunk_bytes)
        self._check_room(aim, plan.count)
        check_available(memory_bytes(aim))
        state = StateTable.create(connections=aim.connections, streams=aim.streams, slots=aim.slots)
        fds = [state.fd]
        try:
            arena = Arena.create(size_bytes=aim.chunks * aim.chunk_bytes, chunk_bytes=aim.chunk_bytes)
            fds += [arena.table.fd, arena.data_fd]
            copied_bytes = copy_chunks(stored.chunks, plan, arena)
            copy_state(stored.state, StateMemory(state.fd, {}))
            lock_fd = lock(state.fd)
            fds.append(lock_fd)
            generation = self._replace(fds[:3])
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        log.event(
            logger,
            logging.WARNING,
            "memory moved",
            message_id=log.MessageId.MEMORY_MOVED,
            bytes=aim.chunks * aim.chunk_bytes,
            chunk_bytes=aim.chunk_bytes,
            connections=aim.connections,
            layout=CURRENT_STATE.version,
            bytes_before=self._present.chunks * self._present.chunk_bytes,
            chunk_bytes_before=self._present.chunk_bytes,
            connections_before=self._present.connections,
            layout_before=stored.state.layout.version,
            copied_bytes=copied_bytes,
            took_ms=round((time.monotonic() - began_s) * 1e3),
        )
        if self._reasons:
            self._say_what_stays()
        return Memory(state, arena, stored.facts, generation, lock_fd)

    def _check_room(self, aim: Geometry, needed: int) -> None:
        """Everything held, and the chunks that each connection may count on, unless the arena only gets larger."""
        present = self._present
        free_bytes = (aim.chunks - needed) * aim.chunk_bytes
        if free_bytes >= free_chunks(self._stored.chunks) * present.chunk_bytes:
            return
        connections = int((self._stored.state.column(CONNECTIONS, "STATE") != 0).sum())
        wanted = needed + CHUNKS_PER_CONNECTION * connections
        if wanted > aim.chunks:
            raise StartError(
                f"{needed} chunks of {aim.chunk_bytes} bytes are held and {connections} clients need "
                f"{CHUNKS_PER_CONNECTION} each, the new memory has {aim.chunks}; it waits until more is on disk"
            )

    def _replace(self, fds: list[int]) -> int:
        """The new memory into the store, then the old one out of it. Returns the new generation. Raises StartError."""
        stored, store = self._stored, self._store
        generation = stored.generation + 1
        names = memory_names(generation)
        for name, fd in zip(names, fds, strict=True):
            store.push(name, [fd])
        if not await_barrier(store):
            for name in names:
                store.remove(name)
            raise StartError("the descriptor store does not answer")
        for name in memory_names(stored.generation):
            store.remove(name)
            os.close(stored.fds.pop(name))
        return generation

    # -- words

    def _refuse(self, aim: Geometry, why: str) -> None:
        for key in self._differing(aim):
            self._reasons.setdefault(key, why)
        if not self._reasons:
            self._reasons["layout"] = why

    def _differing(self, aim: Geometry) -> list[str]:
        present = self._present
        sizes = (aim.chunks * aim.chunk_bytes, present.chunks * present.chunk_bytes)
        differing = {
            "buffers.bytes": abs(sizes[0] - sizes[1]) >= max(aim.chunk_bytes, present.chunk_bytes),
            "buffers.chunk_bytes": aim.chunk_bytes != present.chunk_bytes,
            "server.max_clients": aim.connections > present.connections,
        }
        return [key for key, differs in differing.items() if differs]

    def _say_what_stays(self) -> None:
        for key, why in self._reasons.items():
            log.event(
                logger,
                logging.WARNING,
                "a setting waits",
                message_id=log.MessageId.SETTING_NEEDS_RESTART,
                key=key,
                why=why,
                then="it is tried again at the next restart; a stop and a start change it in any case",
            )
