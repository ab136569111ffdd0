"""Copies everything that lives in shared memory into fresh memory of another size or layout.

Rules: nobody else may run that writes the old memory or could read the new. The old memory is read and never written,
so it stays whole whatever happens here. Rows keep their numbers, because rows name each other by them. Of the arena the
bytes go over that are not durable, and those behind POSITION too: a worker that was killed after its ``recv`` had them
in a chunk already, and its successor asks the kernel how far they reach.

What a cell of the new grid gets from the old one is worked out first, for all streams at once (``plan_chunks``, pure);
then the bytes are copied. Of several chunks with one base the one with the highest serial counts, as everywhere.
"""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import numpy.typing as npt

from mpserverd.arena.chunks import LET_GO_ALL, USED, Arena
from mpserverd.arena.counters import COUNTERS, Role
from mpserverd.arena.layouts import (
    CONNECTIONS,
    CURRENT_STATE,
    HEAD,
    LATENCY,
    NAMES,
    SLOTS,
    STREAMS,
    ChunkMemory,
    StateMemory,
)
from mpserverd.arena.shared import LIVE_WORD, PAGE_BYTES
from mpserverd.arena.state import (
    FIRST_WORKER_SLOT,
    ConnectionState,
    Slot,
    StreamFlag,
    StreamState,
)

Int64s = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

_FAR = np.iinfo(np.int64).max
_REASONS = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Geometry:
    """How large the memory is: rows of each table, and the arena's chunks."""

    connections: int
    streams: int
    slots: int
    chunk_bytes: int
    chunks: int

    @classmethod
    def of(cls, state: StateMemory, chunks: ChunkMemory) -> Geometry:
        rows = [state.count(table) for table in (CONNECTIONS, STREAMS, SLOTS)]
        return cls(rows[0], rows[1], rows[2], chunks.chunk_bytes, chunks.count)


@dataclasses.dataclass(frozen=True, slots=True)
class HeldStreams:
    """Streams that may have bytes in the arena, as columns. Bytes below ``floors`` are not needed any more; those at or
    above ``limits`` do not exist."""

    numbers: Int64s
    floors: Int64s
    limits: Int64s
    let_go: Int64s

    @classmethod
    def of(cls, state: StateMemory) -> HeldStreams:
        rows = np.flatnonzero(np.isin(state.column(STREAMS, "STATE"), (StreamState.OPEN, StreamState.DRAINING)))

        def column(name: str) -> Int64s:
            return state.column(STREAMS, name)[rows].astype(np.int64)

        stored = (column("FLAGS") & StreamFlag.STORE) != 0
        let_go = column("LET_GO")
        over = let_go == LET_GO_ALL
        return cls(
            column("NUMBER"),
            np.where(stored, column("DURABLE"), column("OFFERED")),
            np.where(over, column("POSITION"), _FAR),
            np.where(over, 0, let_go),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class ChunkPlan:
    """Columns of the new chunks, and the copies: from ``sources[i]`` to ``targets[i]`` go ``lengths[i]`` bytes."""

    numbers: Int64s
    bases: Int64s
    firsts: Int64s
    serials: Int64s
    sources: Int64s
    targets: Int64s
    lengths: Int64s

    @property
    def count(self) -> int:
        """Chunks that the new arena needs."""
        return len(self.numbers)


def plan_chunks(old: ChunkMemory, streams: HeldStreams, chunk_bytes: int) -> ChunkPlan:
    """Where on a grid of ``chunk_bytes`` everything goes that the old arena holds."""
    size = old.chunk_bytes
    words = old.columns["words"]
    used = np.flatnonzero((words & np.uint64(3)) == USED)
    bases, firsts, serials = (old.columns[name][used].astype(np.int64) for name in ("bases", "firsts", "serials"))
    owner, known = _owners(streams.numbers, (words[used] >> np.uint64(2)).astype(np.int64))
    known &= serials > streams.let_go[owner] if len(streams.numbers) else False
    order = np.flatnonzero(known)
    order = order[np.lexsort((serials[order], bases[order], owner[order]))]
    order = order[_lasts(owner[order], bases[order])]
    used, owner, bases, firsts = used[order], owner[order], bases[order], firsts[order]
    # from the beginning of the floor's page: the storer then need not read that block back from its file
    floors = streams.floors[owner]
    starts = np.maximum(np.maximum(firsts, bases), floors - floors % PAGE_BYTES)
    ends = np.minimum(bases + size, streams.limits[owner])
    some = (ends > floors) & (ends > starts)
    return _cut(used[some] * size - bases[some], owner[some], starts[some], ends[some], streams, chunk_bytes)


def _owners(numbers: Int64s, wanted: Int64s) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]:
    """Index in ``numbers`` of each of ``wanted``, and whether it is there."""
    if not len(numbers):
        return np.zeros(len(wanted), np.intp), np.zeros(len(wanted), np.bool_)
    order = np.argsort(numbers)
    owner = order[np.minimum(np.searchsorted(numbers, wanted, sorter=order), len(order) - 1)]
    return owner, numbers[owner] == wanted


def _lasts(*keys: npt.NDArray[np.int64] | npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
    """Of neighbours that are equal in all keys, the last one."""
    differs = np.zeros(max(len(keys[0]) - 1, 0), np.bool_)
    for key in keys:
        differs |= key[1:] != key[:-1]
    return np.append(differs, np.ones(min(len(keys[0]), 1), np.bool_))


def _cut(
    shifts: Int64s, owner: npt.NDArray[np.intp], starts: Int64s, ends: Int64s, streams: HeldStreams, size: int
) -> ChunkPlan:
    """Cut extents, ordered by stream and offset, on the new grid. Offset + shift is the place in the old arena."""
    first_cells = starts // size
    counts = (ends - 1) // size - first_cells + 1
    of = np.repeat(np.arange(len(starts)), counts)
    cells = first_cells[of] + np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
    piece_starts = np.maximum(starts[of], cells * size)
    lengths = np.minimum(ends[of], (cells + 1) * size) - piece_starts
    piece_owner = owner[of]
    begins = np.roll(_lasts(piece_owner, cells), 1)  # the first of a cell comes after the last of another
    chunk = np.cumsum(begins) - 1
    heads = np.flatnonzero(begins)
    chunk_owner = piece_owner[heads]
    fresh = np.flatnonzero(np.roll(_lasts(chunk_owner), 1))
    rank = np.arange(len(heads)) - np.repeat(fresh, np.diff(np.append(fresh, len(heads))))
    sources, targets = piece_starts + shifts[of], chunk * size + piece_starts - cells * size
    joined = np.flatnonzero(
        np.append(
            np.ones(min(len(of), 1), np.bool_),
            (sources[1:] != sources[:-1] + lengths[:-1]) | (targets[1:] != targets[:-1] + lengths[:-1]),
        )
    )
    return ChunkPlan(
        numbers=streams.numbers[chunk_owner],
        bases=cells[heads] * size,
        firsts=piece_starts[heads],
        serials=streams.let_go[chunk_owner] + 1 + rank,
        sources=sources[joined],
        targets=targets[joined],
        lengths=np.add.reduceat(lengths, joined) if len(joined) else lengths,
    )


def copy_chunks(old: ChunkMemory, plan: ChunkPlan, new: Arena) -> int:
    """Copy the bytes, then fill in the table, which is fresh. Returns how many bytes went over.

    The kernel copies from file to file: through two mappings the same 128 MiB took twice to three times as long, most
    of it page faults.
    """
    for source, target, length in zip(plan.sources.tolist(), plan.targets.tolist(), plan.lengths.tolist(), strict=True):
        os.lseek(new.data_fd, target, os.SEEK_SET)
        done = 0
        while done < length:
            done += os.sendfile(new.data_fd, old.data_fd, source + done, length - done)
    table, count = new.table, plan.count
    table.bases[:count] = plan.bases
    table.firsts[:count] = plan.firsts
    table.serials[:count] = plan.serials
    table.words[:count] = (plan.numbers.astype(np.uint64) << np.uint64(2)) | np.uint64(USED)
    return int(plan.lengths.sum())


def copy_state(old: StateMemory, new: StateMemory) -> None:
    """Every row, name and total. ``new`` is fresh, of this version, and has a row for each one that is taken."""
    same = old.layout.rows == new.layout.rows
    for table in (CONNECTIONS, STREAMS, SLOTS):
        target = new.tables[table]
        source = old.tables[table][: len(target)]
        if same:
            target[: len(source)] = source
        else:
            _copy_columns(old, table, source, target)
    _copy_head(old, new)
    for table in (NAMES, LATENCY):
        target = new.tables[table]
        source = old.tables[table][: len(target)]
        width = min(source.shape[1], target.shape[1])
        if table == NAMES or source.shape[1] == target.shape[1]:  # other buckets mean other times
            target[: len(source), :width] = source[:, :width]
    _fold_slots(old, new)


def _copy_columns(old: StateMemory, table: str, source: Words, target: Words) -> None:
    """Column by column, by name; what only one of the two layouts has is left out."""
    theirs, ours = old.layout.rows[table].spans(), CURRENT_STATE.rows[table].spans()
    for name in theirs.keys() & ours.keys():
        (at, end), (to, to_end) = theirs[name], ours[name]
        width = min(end - at, to_end - to)
        target[: len(source), to : to + width] = source[:, at : at + width]


def _copy_head(old: StateMemory, new: StateMemory) -> None:
    """Only the live words: what describes the memory itself is the new one's own."""
    if old.layout.rows == new.layout.rows:
        new.tables[HEAD][:, LIVE_WORD:] = old.tables[HEAD][:, LIVE_WORD:]
    else:
        _copy_columns(old, HEAD, old.tables[HEAD], new.tables[HEAD])


def _fold_slots(old: StateMemory, new: StateMemory) -> None:
    """Counters of slots that the new table has not are added to a slot that it has, so that no sum falls."""
    slots = new.tables[SLOTS]
    surplus = np.zeros((max(0, old.count(SLOTS) - len(slots)), slots.shape[1]), np.uint64)
    if not len(surplus):
        return
    _copy_columns(old, SLOTS, old.tables[SLOTS][len(slots) :], surplus)
    counting = [Slot.RECEIVED_BYTES, Slot.RECEIVED_PACKETS, Slot.RECEIVE_CALLS]
    counting += [each.column for each in COUNTERS if each.role is Role.WORKER and not each.gauge]
    counting += range(Slot.REASONS, Slot.REASONS + _REASONS)
    slots[FIRST_WORKER_SLOT, counting] += surplus[:, counting].sum(axis=0)


def rows_needed(old: StateMemory, table: str) -> int:
    """So many rows a table must have for all that are taken."""
    free = ConnectionState.FREE if table == CONNECTIONS else StreamState.FREE
    taken = np.flatnonzero(old.column(table, "STATE") != free)
    return int(taken[-1]) + 1 if len(taken) else 0


def free_chunks(old: ChunkMemory) -> int:
    return int(np.count_nonzero((old.columns["words"] & np.uint64(3)) != USED))
