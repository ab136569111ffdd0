"""What the tables say at the beginning of a cycle: offers, holes and chunks, read in an order that makes them fit.

STATE is read before OFFERED, because DRAINING makes that final. OFFERED is read before the holes, because a hole below
it is complete. LET_GO is read before POSITION and before the chunk table, so that a chunk that was let go is judged by
a position at least as new. Everything below OFFERED then lies in chunks that stay as they are until they are freed.

Nothing is written here.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from mpserverd.arena.chunks import USED, Arena
from mpserverd.arena.state import StateTable, Str, StreamFlag, StreamState
from mpserverd.storer.plan import ChunkList

U64 = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]
Index = npt.NDArray[np.intp]

_STATE_MASK = np.uint64(3)
_STATE_BITS = np.uint64(2)


@dataclasses.dataclass(slots=True)
class Sample:
    """Stored streams that are OPEN or DRAINING; all arrays go by ``rows``. ``holes`` has six words a row.
    ``begun``: the catalog has it."""

    rows: Index
    numbers: U64
    draining: Bools
    let_go: U64
    offered: U64
    position: U64
    durable: U64
    holes: U64
    begun: Bools

    @property
    def pending(self) -> Bools:
        return self.offered > self.durable


@dataclasses.dataclass(slots=True)
class Held:
    """USED chunks of the sampled rows; ``owner`` indexes the sample."""

    chunks: Index
    words: U64
    owner: Index
    bases: U64
    serials: U64


def sample_streams(state: StateTable) -> Sample:
    """Look at every stored stream."""
    streams = state.streams
    states = streams[:, Str.STATE]
    rows = np.flatnonzero((states == StreamState.OPEN) | (states == StreamState.DRAINING))
    rows = rows[(streams[rows, Str.FLAGS] & np.uint64(StreamFlag.STORE)) != 0]
    return Sample(
        rows=rows,
        numbers=streams[rows, Str.NUMBER],
        draining=streams[rows, Str.STATE] == StreamState.DRAINING,
        let_go=streams[rows, Str.LET_GO],
        offered=streams[rows, Str.OFFERED],
        position=streams[rows, Str.POSITION],
        durable=streams[rows, Str.DURABLE],
        holes=streams[rows, Str.HOLE0_FIRST : Str.HOLE1_KIND + 1],
        begun=streams[rows, Str.CATALOG_ID] != 0,
    )


def held_chunks(sample: Sample, arena: Arena) -> Held:
    """One pass over the chunk table. The word is read first: it is written last."""
    table = arena.table
    words = table.words.copy()
    used = np.flatnonzero((words & _STATE_MASK) == USED)
    words = words[used]
    owner, known = owners(sample.numbers, words >> _STATE_BITS)
    used, words, owner = used[known], words[known], owner[known]
    return Held(used, words, owner, table.bases[used], table.serials[used])


def owners(numbers: U64, wanted: U64) -> tuple[Index, Bools]:
    """For each of ``wanted`` the index in ``numbers``, and whether it is there."""
    if not len(numbers):
        return np.zeros(len(wanted), np.intp), np.zeros(len(wanted), np.bool_)
    order = np.argsort(numbers)
    place = np.searchsorted(numbers, wanted, sorter=order)
    place[place == len(order)] = 0
    owner = order[place]
    return owner, numbers[owner] == wanted


def list_chunks(sample: Sample, held: Held, chosen: Index, arena: Arena) -> tuple[ChunkList, list[int], list[int]]:
    """The chunks of the chosen streams by base, and for each stream where its part of the list begins and ends.

    Of several chunks with one base the one with the highest serial counts: the others hold only durable bytes.
    """
    is_chosen = np.zeros(len(sample.rows), np.bool_)
    is_chosen[chosen] = True
    mine = np.flatnonzero(is_chosen[held.owner])
    mine = mine[np.lexsort((held.serials[mine], held.bases[mine], held.owner[mine]))]
    owner, bases = held.owner[mine], held.bases[mine]
    counts = np.ones(len(mine), np.bool_)
    counts[:-1] = (owner[1:] != owner[:-1]) | (bases[1:] != bases[:-1])
    owner, bases, chunks = owner[counts], bases[counts], held.chunks[mine[counts]]
    starts = chunks * arena.chunk_bytes
    listed = ChunkList(arena.chunk_bytes, bases.tolist(), starts.tolist(), arena.table.firsts[chunks].tolist())
    low = np.searchsorted(owner, chosen, side="left").tolist()
    high = np.searchsorted(owner, chosen, side="right").tolist()
    return listed, low, high


def freeable(sample: Sample, held: Held, durable: U64, chunk_bytes: int) -> Bools:
    """Which of the held chunks have nothing left that is not durable; ``durable`` goes by the sample's rows."""
    of_owner = durable[held.owner]
    end = held.bases + np.uint64(chunk_bytes)
    let_go = held.serials <= sample.let_go[held.owner]
    done: Bools = (end <= of_owner) | (let_go & (np.minimum(end, sample.position[held.owner]) <= of_owner))
    return done


def used_by(arena: Arena, numbers: U64) -> Index:
    """Indices of all USED chunks of these streams."""
    words = arena.table.words
    used = np.flatnonzero((words & _STATE_MASK) == USED)
    return used[np.isin(words[used] >> _STATE_BITS, numbers)]
