"""The shared memory of an earlier supervisor, as it lies in systemd's store.

Names: ``state``, ``chunks``, ``arena`` and ``facts``. When the first three are replaced by others of another size or
layout they get a generation: ``state-2`` and so on. A generation is stored only after all of it is filled in, and an
older one is removed only after the store has all of the newer one; so the newest whole one counts, and whatever else
there is of them is left over from a death in between.

Nothing is changed here but what is left over.
"""

from __future__ import annotations

import dataclasses
import os

from mpserverd.arena.chunks import Arena
from mpserverd.arena.layouts import SLOTS, ChunkMemory, StateMemory
from mpserverd.arena.state import SUPERVISOR_SLOT, StateTable
from mpserverd.errors import LayoutError
from mpserverd.supervisor.fd_store import FdStore
from mpserverd.supervisor.remembered import Remembered

FACTS = "facts"
GUARD_FACT = "guard"
PARTS = ("state", "chunks", "arena")


def memory_names(generation: int) -> tuple[str, str, str]:
    """Names of state, chunk table and arena in the store."""
    suffix = "" if generation == 1 else f"-{generation}"
    state, chunks, arena = (part + suffix for part in PARTS)
    return state, chunks, arena


def memory_generation(name: str) -> int | None:
    """The generation in a name of the memory; None for other names."""
    part, dash, number = name.partition("-")
    if part not in PARTS:
        return None
    if not dash:
        return 1
    return int(number) if number.isdecimal() and int(number) > 1 else None


@dataclasses.dataclass(eq=False, slots=True)
class Memory:
    """The shared tables to go on with, of this version's layout. ``lock_fd`` holds the lock on connections."""

    state: StateTable
    arena: Arena
    facts: Remembered
    generation: int
    lock_fd: int


@dataclasses.dataclass(eq=False, slots=True)
class StoredMemory:
    """What an earlier supervisor left, in whatever layout it has. ``fds`` by name, owned here."""

    generation: int
    fds: dict[str, int]
    state: StateMemory
    chunks: ChunkMemory
    facts: Remembered

    @classmethod
    def open(cls, fds: dict[str, int], store: FdStore) -> StoredMemory:
        """Take up the newest whole generation, and drop others. Raises LayoutError; ``fds`` then stay the caller's."""
        generation = _newest_whole(fds)
        names = memory_names(generation)
        for name in [name for name in fds if name not in (*names, FACTS)]:
            os.close(fds.pop(name))
            store.remove(name)
        facts = Remembered(fds[FACTS])
        described = facts.read().get("memory", {})
        state, table, data = (fds[name] for name in names)
        return cls(
            generation,
            fds,
            StateMemory(state, described),
            ChunkMemory(table, data, described),
            facts,
        )

    def pids(self) -> list[int]:
        """Children of the last supervisor, dead ones too."""
        found: list[int] = self.state.column(SLOTS, "PID")[SUPERVISOR_SLOT + 1 :].tolist()
        return found

    def guard_pid(self) -> int:
        """0: unknown."""
        pid = self.facts.read().get(GUARD_FACT, 0)
        return pid if isinstance(pid, int) else 0

    def set_left(self) -> None:
        """The end that follows is no crash."""
        self.state.head_words("LEFT")[0] = 1


def _newest_whole(fds: dict[str, int]) -> int:
    numbers = {number for name in fds if (number := memory_generation(name)) is not None}
    whole = [number for number in numbers if all(name in fds for name in memory_names(number))]
    if whole and FACTS in fds:
        return max(whole)
    wanted = [*memory_names(max(whole or numbers, default=1)), FACTS]
    missing = [name for name in wanted if name not in fds]
    raise LayoutError(f"{', '.join(missing)} did not come back from the descriptor store")
