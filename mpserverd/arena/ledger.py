"""The ledger: where every byte is, per stream and in total, and the equations that must hold between the counters.

Rules: durable is read before stored, stored before received, received before the chunks. Bytes in the arena are
counted from the rows of the chunk table, never subtracted. The words move while they are read, so a stream that does
not balance is looked at again, alone, before it is called off. Streams that are no longer in the table are in the
header's GONE block; which streams those are is read under its version, so that none is counted twice or left out.

It reads the shared tables and nothing else: no clock (the caller says how to wait), no lock, no word written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import numpy.typing as npt

from mpserverd.arena.chunks import ChunkTable
from mpserverd.arena.held import HeldChunks, Holes, Int64s, Rows
from mpserverd.arena.state import Check, Gone, Head, HoleKind, StateTable, Str, StreamFlag, StreamState

TRIES = 20
CLOSE_LOOKS_MAX = 64
"""With fewer streams in doubt each is looked at alone: that takes microseconds, so that even a stream at line rate
stands still for it."""
LOOKS_A_TRY = 8
GONE_LOOKS_MAX = 200
_STORER_AT = Str.STORED

FIELDS = (
    "socket_bytes",
    "received_bytes",
    "stored_bytes",
    "durable_bytes",
    "acked_bytes",
    "truncated_bytes",
    "partial_bytes",
    "dropped_bytes",
    "lost_bytes",
    "retired_bytes",
    "handshake_bytes",
    "unstored_bytes",
    "in_arena_bytes",
    "at_risk_bytes",
    "position_bytes",
    "received_packets",
    "gaps",
    "missing",
    "repeats",
    "reordered",
)
"""Every account of a stream, and of the totals."""

_GONE = {
    "received_bytes": Gone.RECEIVED_BYTES,
    "received_packets": Gone.RECEIVED_PACKETS,
    "stored_bytes": Gone.STORED_BYTES,
    "durable_bytes": Gone.DURABLE_BYTES,
    "acked_bytes": Gone.ACKED_BYTES,
    "truncated_bytes": Gone.TRUNCATED_BYTES,
    "dropped_bytes": Gone.DROPPED_BYTES,
    "lost_bytes": Gone.LOST_BYTES,
    "retired_bytes": Gone.RETIRED_BYTES,
    "handshake_bytes": Gone.HANDSHAKE_BYTES,
    "unstored_bytes": Gone.UNSTORED_BYTES,
    "socket_bytes": Gone.SOCKET_BYTES,
    "gaps": Gone.GAPS,
    "missing": Gone.MISSING_PACKETS,
    "repeats": Gone.REPEATS,
    "reordered": Gone.REORDERED,
    "dropped_packets": Gone.DROPPED_PACKETS,
    "lost_packets": Gone.LOST_PACKETS,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Equation:
    """``left`` and ``right`` name accounts that are added up; ``relation`` is "=" or ">="."""

    left: tuple[str, ...]
    relation: str
    right: tuple[str, ...]

    @property
    def text(self) -> str:
        return f"{' + '.join(self.left)} {self.relation} {' + '.join(self.right)}"


EQUATIONS = (
    Equation(("socket_bytes",), "=", ("received_bytes", "truncated_bytes", "partial_bytes", "handshake_bytes")),
    Equation(("received_bytes",), "=", ("stored_bytes", "in_arena_bytes", "dropped_bytes", "unstored_bytes")),
    Equation(("position_bytes",), "=", ("received_bytes", "lost_bytes")),
    Equation(("stored_bytes",), ">=", ("durable_bytes",)),
    Equation(("durable_bytes",), ">=", ("acked_bytes",)),
)


@dataclasses.dataclass(slots=True)
class Accounts:
    """Accounts of some streams: ``columns[field][i]`` belongs to stream row ``rows[i]``, whose stream is
    ``numbers[i]``. ``valid`` is False where another stream took the row while it was read."""

    rows: Rows
    numbers: Int64s
    packet_sizes: Int64s
    valid: npt.NDArray[np.bool_]
    columns: dict[str, Int64s]

    def off(self) -> Rows:
        """Indices (into ``rows``) of the streams that do not balance."""
        wrong = ~self.valid
        for equation in EQUATIONS:
            left, right = _sides(equation, self.columns)
            wrong |= left != right if equation.relation == "=" else left < right
        return np.flatnonzero(wrong)

    def replace(self, index: Rows, other: Accounts) -> None:
        """Put a later look at some of the streams in the place of the earlier one."""
        self.valid[index] = other.valid
        for name, column in self.columns.items():
            column[index] = other.columns[name]

    def of(self, index: int) -> dict[str, int]:
        return {name: int(self.columns[name][index]) for name in FIELDS}


@dataclasses.dataclass(frozen=True, slots=True)
class Checked:
    """One equation over the totals, with both sides."""

    equation: Equation
    left: int
    right: int

    @property
    def holds(self) -> bool:
        return self.left == self.right if self.equation.relation == "=" else self.left >= self.right


@dataclasses.dataclass(frozen=True, slots=True)
class Ledger:
    """``off`` are indices into ``streams``. ``gone`` are the accounts of streams that are not in the table, whose
    number is ``gone_streams``; ``gone_readable`` is False while the storer writes them, or died doing so."""

    streams: Accounts
    gone: dict[str, int]
    gone_streams: int
    gone_readable: bool
    totals: dict[str, int]
    equations: tuple[Checked, ...]
    off: Rows
    tries: int

    @property
    def holds(self) -> bool:
        return self.gone_readable and len(self.off) == 0 and all(checked.holds for checked in self.equations)


def settle(state: StateTable, chunks: ChunkTable, pause: Callable[[int], None], tries: int = TRIES) -> Ledger:
    """The ledger as it stands, each stream seen at a moment of its own. ``pause(n)`` waits before the n-th new try."""
    number = 0
    while True:
        rows, numbers, gone_words, readable = _who_is_where(state)
        streams = read_streams(state, chunks, rows, numbers)
        off = streams.off()
        while len(off) and number < tries:
            number += 1
            pause(number)
            if not _look_again(state, chunks, streams, off):
                break  # its row belongs to another stream now: begin anew
            off = streams.off()
        if (not len(off) and readable) or number >= tries:
            return _balance(streams, gone_words, readable, off, number)
        if not readable:
            number += 1
            pause(number)


def read_streams(state: StateTable, chunks: ChunkTable, rows: Rows, numbers: Int64s) -> Accounts:
    """One look at these streams. Costs no stream anything: they are written while they are read."""
    durable_words = state.streams[rows, Str.DURABLE].astype(np.int64)
    durable_holes = state.streams[rows, Str.DURABLE_HOLES].astype(np.int64)
    storer = state.streams[rows, _STORER_AT:].astype(np.int64)
    worker = state.streams[rows, :_STORER_AT].astype(np.int64)
    held = HeldChunks.read(chunks, numbers)
    valid = (state.streams[rows, Str.NUMBER].astype(np.int64) == numbers) & (worker[:, Str.NUMBER] == numbers)
    packet_sizes = np.maximum(worker[:, Str.PACKET_SIZE], 1)
    # whole packets only: what a connection leaves of one at its end moves to truncated, and no account may fall
    partial = worker[:, Str.POSITION] % packet_sizes
    position, stored_to = worker[:, Str.POSITION] - partial, storer[:, Str.STORED - _STORER_AT]
    keeps = (worker[:, Str.FLAGS] & StreamFlag.STORE) != 0
    settled_to = np.where(keeps, stored_to, np.maximum(stored_to, worker[:, Str.OFFERED]))
    holes = Holes(worker)
    dropped, lost = (
        storer[:, column - _STORER_AT] + holes.bytes_above(storer[:, Str.DURABLE - _STORER_AT], kind)
        for column, kind in ((Str.DROPPED, HoleKind.DROPPED), (Str.LOST, HoleKind.LOST))
    )
    in_arena = held.bytes_between(settled_to, position, holes)
    stored = stored_to - storer[:, Str.STORED_HOLES - _STORER_AT]
    durable = durable_words - durable_holes
    received = position - lost
    checks = _check_records(worker)
    columns = {
        "socket_bytes": worker[:, Str.SOCKET],
        "received_bytes": received,
        "stored_bytes": stored,
        "durable_bytes": durable,
        "acked_bytes": storer[:, Str.ACKED - _STORER_AT],
        "truncated_bytes": worker[:, Str.TRUNCATED],
        "partial_bytes": partial,
        "dropped_bytes": dropped,
        "lost_bytes": lost,
        "retired_bytes": storer[:, Str.RETIRED - _STORER_AT],
        "handshake_bytes": worker[:, Str.HANDSHAKE],
        "unstored_bytes": settled_to - stored_to,
        "in_arena_bytes": in_arena,
        "at_risk_bytes": np.where(keeps, stored + in_arena - durable, 0),
        "position_bytes": position,
        "received_packets": received // packet_sizes,
        "gaps": checks[:, Check.GAPS],
        "missing": checks[:, Check.MISSING],
        "repeats": checks[:, Check.REPEATS],
        "reordered": checks[:, Check.REORDERED],
    }
    return Accounts(rows, numbers, packet_sizes, valid, {name: columns[name].copy() for name in FIELDS})


def add_up(accounts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    totals = dict.fromkeys(FIELDS, 0)
    for account in accounts:
        for name in FIELDS:
            totals[name] += account[name]
    return totals


# -- who is in the table and who is gone


def _who_is_where(state: StateTable) -> tuple[Rows, Int64s, list[int], bool]:
    """Rows and numbers of the streams in the table and the GONE block, all of one moment; False when the block was
    being changed all the time."""
    words = state.words
    for _ in range(GONE_LOOKS_MAX):
        version = words[Head.GONE_VERSION]
        states = state.streams[:, Str.STATE].copy()
        numbers = state.streams[:, Str.NUMBER].astype(np.int64)
        gone = words[Head.GONE : Head.GONE + Gone.COUNT].tolist()
        if version % 2 == 0 and words[Head.GONE_VERSION] == version:
            break
    rows = np.flatnonzero((states == StreamState.OPEN) | (states == StreamState.DRAINING))
    return rows, numbers[rows], gone, version % 2 == 0 and words[Head.GONE_VERSION] == version


def _look_again(state: StateTable, chunks: ChunkTable, streams: Accounts, off: Rows) -> bool:
    """Read the streams in doubt once more. False when one of them has left its row."""
    if len(off) > CLOSE_LOOKS_MAX:
        later = read_streams(state, chunks, streams.rows[off], streams.numbers[off])
        streams.replace(off, later)
        return bool(later.valid.all())
    for number in range(len(off)):
        one = off[number : number + 1]
        for _ in range(LOOKS_A_TRY):
            later = read_streams(state, chunks, streams.rows[one], streams.numbers[one])
            if not len(later.off()):
                break
        streams.replace(one, later)
        if not later.valid[0]:
            return False
    return True


def _balance(streams: Accounts, gone_words: list[int], readable: bool, off: Rows, tries: int) -> Ledger:
    gone = dict.fromkeys(FIELDS, 0) | {name: gone_words[word] for name, word in _GONE.items()}
    gone["position_bytes"] = gone["received_bytes"] + gone["lost_bytes"]
    here = {name: int(streams.columns[name].sum()) for name in FIELDS}
    totals = add_up((here, gone))
    equations = tuple(_checked(equation, totals) for equation in EQUATIONS)
    return Ledger(streams, gone, gone_words[Gone.STREAMS], readable, totals, equations, off, tries)


def _checked(equation: Equation, totals: Mapping[str, int]) -> Checked:
    return Checked(equation, sum(totals[n] for n in equation.left), sum(totals[n] for n in equation.right))


def _sides(equation: Equation, columns: Mapping[str, Int64s]) -> tuple[Int64s, Int64s]:
    left, right = columns[equation.left[0]], columns[equation.right[0]]
    for name in equation.left[1:]:
        left = left + columns[name]
    for name in equation.right[1:]:
        right = right + columns[name]
    return left, right


def _check_records(worker: Int64s) -> Int64s:
    """The valid check record of each row."""
    first, second = worker[:, Str.CHECK0 : Str.CHECK0 + 8], worker[:, Str.CHECK1 : Str.CHECK1 + 8]
    return np.where((worker[:, Str.CHECK_SELECT] & 1)[:, None] == 1, second, first)
