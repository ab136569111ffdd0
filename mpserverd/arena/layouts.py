"""Where things lie in the shared memory of this version, of earlier ones, and of one that describes itself.

Rules: the header page is the same in all: magic, version, size, geometry. A version number stands for one layout. A
column may take a spare word without a new version; one that moves, or a row that grows, is a new version, and the old
layout goes into ``STATE_LAYOUTS``. A daemon also writes its layout down by names (``description``), so that an older
one can read what a newer one left; ``LEAST_READER`` is raised when a word changes its *meaning*, and whoever is older
than that keeps its hands off. What neither table nor description explains is unknown. It is never guessed.

Rows are carried over by migrate.py; nothing is copied here.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mpserverd.arena.chunks import TABLE_MAGIC, TABLE_VERSION
from mpserverd.arena.shared import HEADER_WORDS, LIVE_WORD, PAGE_BYTES, WORD_BYTES, SharedWords, header_of
from mpserverd.arena.state import (
    CONNECTION_WORDS,
    LATENCY_BUCKETS,
    NAME_BYTES,
    SLOT_WORDS,
    STATE_MAGIC,
    STATE_VERSION,
    STREAM_WORDS,
    Con,
    ConnectionState,
    Head,
    Slot,
    Str,
    StreamState,
)
from mpserverd.errors import LayoutError

LEAST_READER = 2
"""The oldest version whose daemon understands what the words of this layout mean, once it knows where they are."""

HEAD, CONNECTIONS, STREAMS, SLOTS, NAMES, LATENCY = "head", "connections", "streams", "slots", "names", "latency"
CHUNK_COLUMNS = ("words", "bases", "firsts", "serials")
Words = npt.NDArray[np.uint64]


@dataclasses.dataclass(frozen=True, slots=True)
class RowLayout:
    """A row of ``words`` u64. A column is one word, or all up to the next one: counters, check records."""

    words: int
    columns: Mapping[str, int]

    def spans(self) -> dict[str, tuple[int, int]]:
        """First word of each column, and one past its last."""
        ordered = sorted(self.columns.items(), key=lambda item: item[1])
        ends = [at for _, at in ordered[1:]] + [self.words]
        return {name: (at, end) for (name, at), end in zip(ordered, ends, strict=True)}


@dataclasses.dataclass(frozen=True, slots=True)
class StateLayout:
    """``rows`` has HEAD, CONNECTIONS, STREAMS and SLOTS. Behind the header the tables follow one another in this order;
    then a name and the latency buckets for each stream."""

    version: int
    rows: Mapping[str, RowLayout]
    name_words: int = NAME_BYTES // WORD_BYTES
    latency_words: int = LATENCY_BUCKETS


@dataclasses.dataclass(frozen=True, slots=True)
class ChunkLayout:
    """Columns of the chunk table, in the order in which they follow the header."""

    version: int
    columns: tuple[str, ...] = CHUNK_COLUMNS


def _columns(holder: type) -> dict[str, int]:
    return {
        name: int(value) for name, value in vars(holder).items() if isinstance(value, int) and not name.startswith("_")
    }


CURRENT_STATE = StateLayout(
    STATE_VERSION,
    {
        HEAD: RowLayout(HEADER_WORDS, _columns(Head)),
        CONNECTIONS: RowLayout(CONNECTION_WORDS, _columns(Con)),
        STREAMS: RowLayout(STREAM_WORDS, _columns(Str)),
        SLOTS: RowLayout(SLOT_WORDS, _columns(Slot)),
    },
)
CURRENT_CHUNKS = ChunkLayout(TABLE_VERSION)


def _row(words: int, names: str, at: int = 0) -> RowLayout:
    """Columns in their order; "-" is a spare word, ``NAME*n`` takes n words."""
    columns = {}
    for item in names.split():
        name, _, width = item.partition("*")
        if name != "-":
            columns[name] = at
        at += int(width or 1)
    return RowLayout(words, columns)


_VERSION_1 = StateLayout(
    1,
    {
        HEAD: _row(
            HEADER_WORDS,
            "NEXT_NUMBER NEXT_LEASE STARTED_UNIX_NS STARTED_MONO_NS STARVING PHASE ACTIVE_CONNECTIONS"
            " TOTAL_CONNECTIONS LEFT CRASH_COUNT CRASHES*6 GONE_VERSION GONE*17",
            LIVE_WORD,
        ),
        CONNECTIONS: _row(
            24,
            "STATE COOKIE STREAM STREAM_NUMBER LISTENER WORKER FLAGS PEER_PORT PEER_HIGH PEER_LOW ACCEPTED_UNIX_NS"
            " ACCEPTED_MONO_NS OFFSET_AT_ATTACH TRUNCATED_AT_ATTACH SOCKET_AT_ATTACH ADOPTIONS"
            " SOCKET_BYTES HANDSHAKE_BYTES LAST_RECEIVED_MONO_NS REASON ERRNO BLOCKED",
        ),
        STREAMS: _row(
            64,
            "STATE NUMBER PACKET_SIZE LISTENER CONNECTION FLAGS EPOCH CREATED_UNIX_NS RATE_MILLI RATE_POSITION"
            " CLIENT_INDEX -*5 POSITION OFFERED LET_GO TRUNCATED HANDSHAKE SOCKET LAST_RECEIVED_UNIX_NS BLOCKED_COUNT"
            " HOLE0_FIRST HOLE0_END HOLE0_KIND HOLE1_FIRST HOLE1_END HOLE1_KIND CHECK_SELECT LATENCY_MAX_NS"
            " CHECK0*8 CHECK1*8 STORED DURABLE FIRST_OFFSET DROPPED LOST CATALOG_ID ACKED STORED_HOLES STARTED_AT"
            " DURABLE_MONO_NS RETIRED DURABLE_HOLES",
        ),
        SLOTS: _row(
            64,
            "PID LEASE STATE RESTARTS STARTED_MONO_NS CPU_MILLI RSS_BYTES RATE_MILLI HEARTBEAT_MONO_NS CONNECTIONS"
            " RECEIVED_BYTES RECEIVED_PACKETS RECEIVE_CALLS WANTS DOZING PROGRESS_MONO_NS COUNTER*31 IN_HAND"
            " REASONS*16",
        ),
    },
    name_words=17,
    latency_words=128,
)
"""As it was at first: no states of mps. A layout that was released is never changed."""

STATE_LAYOUTS: dict[int, StateLayout] = {layout.version: layout for layout in (_VERSION_1, CURRENT_STATE)}
CHUNK_LAYOUTS: dict[int, ChunkLayout] = {CURRENT_CHUNKS.version: CURRENT_CHUNKS}


# -- a layout by names


def description() -> dict[str, Any]:
    """This version's layout, for another version's daemon; plain JSON."""
    return {
        "least_reader": LEAST_READER,
        "state": {
            "version": CURRENT_STATE.version,
            "rows": {
                name: {"words": row.words, "columns": dict(row.columns)} for name, row in CURRENT_STATE.rows.items()
            },
            "name_words": CURRENT_STATE.name_words,
            "latency_words": CURRENT_STATE.latency_words,
        },
        "chunks": {"version": CURRENT_CHUNKS.version, "columns": list(CURRENT_CHUNKS.columns)},
        "connection_states": {each.name: each.value for each in ConnectionState},
        "stream_states": {each.name: each.value for each in StreamState},
    }


def state_layout(version: int, described: Mapping[str, Any]) -> StateLayout:
    """The layout of a state table of that version. Raises LayoutError when nobody can tell."""
    if version in STATE_LAYOUTS:
        return STATE_LAYOUTS[version]
    state = _understood(described, "state", version)
    rows = {
        name: RowLayout(int(row["words"]), {column: int(at) for column, at in row["columns"].items()})
        for name, row in state["rows"].items()
    }
    for name, row_layout in rows.items():
        if any(not 0 <= at < row_layout.words for at in row_layout.columns.values()):
            raise LayoutError(f"{name}: layout {version} has a column beyond its rows")
    return StateLayout(version, rows, int(state["name_words"]), int(state["latency_words"]))


def chunk_layout(version: int, described: Mapping[str, Any]) -> ChunkLayout:
    """The same for a chunk table."""
    if version in CHUNK_LAYOUTS:
        return CHUNK_LAYOUTS[version]
    return ChunkLayout(version, tuple(_understood(described, "chunks", version)["columns"]))


def _understood(described: Mapping[str, Any], part: str, version: int) -> Mapping[str, Any]:
    found: Mapping[str, Any] = described.get(part, {})
    if found.get("version") != version:
        raise LayoutError(f"{part}: layout {version}, this version knows {_known(part)}")
    if int(described.get("least_reader", version)) > STATE_VERSION:
        raise LayoutError(f"{part}: layout {version} is for daemons that know layout {described['least_reader']}")
    for key, states in (("connection_states", ConnectionState), ("stream_states", StreamState)):
        theirs = described.get(key, {})
        if any(theirs.get(each.name, each.value) != each.value for each in states):
            raise LayoutError(f"{part}: layout {version} has other numbers for {key}")
    return found


def _known(part: str) -> str:
    return ", ".join(map(str, STATE_LAYOUTS if part == "state" else CHUNK_LAYOUTS))


# -- memory by its layout


class StateMemory:
    """A state table of any known layout. ``tables`` are 2-D arrays of u64 by name; HEAD is one row."""

    def __init__(self, fd: int, described: Mapping[str, Any]) -> None:
        self.fd = fd
        self.layout = layout = state_layout(header_of(fd, STATE_MAGIC, "state table"), described)
        shared = SharedWords(fd, magic=STATE_MAGIC, version=layout.version, what="state table")
        connections, streams, slots = (shared.geometry(index) for index in range(3))
        self.tables: dict[str, Words] = {HEAD: shared.array[:HEADER_WORDS].reshape(1, HEADER_WORDS)}
        at = PAGE_BYTES // WORD_BYTES
        for name, count, width in (
            (CONNECTIONS, connections, layout.rows[CONNECTIONS].words),
            (STREAMS, streams, layout.rows[STREAMS].words),
            (SLOTS, slots, layout.rows[SLOTS].words),
            (NAMES, streams, layout.name_words),
            (LATENCY, streams, layout.latency_words),
        ):
            if at + count * width > len(shared.array):
                raise LayoutError(f"state table: layout {layout.version} needs more than its {len(shared.array)} words")
            self.tables[name] = shared.array[at : at + count * width].reshape(count, width)
            at += count * width
        self._check_states()

    def column(self, table: str, name: str) -> Words:
        """One column, a view. Raises LayoutError when the layout has none of that name."""
        at = self.layout.rows[table].columns.get(name)
        if at is None:
            raise LayoutError(f"layout {self.layout.version} has no column {name}")
        return self.tables[table][:, at]

    def head_words(self, name: str) -> Words:
        """The words of the header from ``name`` on, a view."""
        at = self.layout.rows[HEAD].columns[name]
        return self.tables[HEAD][0, at:]

    def count(self, table: str) -> int:
        return len(self.tables[table])

    def _check_states(self) -> None:
        for table, states in ((CONNECTIONS, ConnectionState), (STREAMS, StreamState)):
            unknown = set(np.unique(self.column(table, "STATE")).tolist()) - {each.value for each in states}
            if unknown:
                raise LayoutError(f"{table} are in states that this version does not know: {sorted(unknown)}")


class ChunkMemory:
    """A chunk table of any known layout, and the bytes that belong to it. ``columns`` are arrays by name."""

    def __init__(self, table_fd: int, data_fd: int, described: Mapping[str, Any]) -> None:
        self.table_fd, self.data_fd = table_fd, data_fd
        self.layout = chunk_layout(header_of(table_fd, TABLE_MAGIC, "chunk table"), described)
        shared = SharedWords(table_fd, magic=TABLE_MAGIC, version=self.layout.version, what="chunk table")
        self.chunk_bytes, self.count = shared.geometry(0), shared.geometry(1)
        start = PAGE_BYTES // WORD_BYTES
        self.columns: dict[str, Words] = {
            name: shared.array[start + at * self.count : start + (at + 1) * self.count]
            for at, name in enumerate(self.layout.columns)
        }
        missing = set(CHUNK_COLUMNS) - set(self.columns)
        if missing:
            raise LayoutError(f"chunk table: layout {self.layout.version} has no {', '.join(sorted(missing))}")
        size_bytes = os.fstat(data_fd).st_size
        if size_bytes != self.chunk_bytes * self.count:
            raise LayoutError(f"arena: {size_bytes} bytes, its table says {self.chunk_bytes * self.count}")
