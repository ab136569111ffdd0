"""What the catalog says: streams, their segments and their holes, as frozen values.

Read-only. The tables are described in docs/SYSTEM_ARCHITECTURE.md; each function reads one consistent state and keeps
nothing open. Of several streams with one name the youngest is the current one; an older one is ``name@epoch``.

It opens no segment file; that is ``segment_files.py``.
"""

from __future__ import annotations

import difflib
import re
import sqlite3
from collections import defaultdict
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from mpserverd.errors import DamageError, StreamNotFoundError
from mpserverd.protocol.layout import PacketLayout
from mpserverd.streams.catalog_file import ask

EPOCH = re.compile(r"[0-9a-f]{16}")
STREAM_COLUMNS = (
    "id, name, epoch, directory, packet_size, layout, created_unix_ns, updated_unix_ns, connected, first_offset, "
    "durable, stored_holes, dropped, lost"
)


@dataclass(frozen=True)
class Segment:
    """One segment file. ``end`` None: it is being written, and readable up to the stream's durable offset."""

    first: int
    end: int | None
    state: str
    sha256: str | None

    @property
    def file_name(self) -> str:
        return f"{self.first:020d}.seg"

    @property
    def index_name(self) -> str:
        return f"{self.first:020d}.idx"


@dataclass(frozen=True)
class Hole:
    """Stream offsets [first, end) that nobody can read: ``dropped``, ``lost``, or ``retired`` by retention."""

    first: int
    end: int
    kind: str

    def indexes(self, packet_size: int) -> range:
        """Indexes of the packets that are not readable because of it, whole or in part."""
        return range(self.first // packet_size, -(-self.end // packet_size))


@dataclass(frozen=True)
class StreamRow:
    """A stream's row of the catalog. Offsets and sizes are bytes."""

    id: int
    name: str
    epoch: str
    directory: str
    packet_size: int
    layout_json: str | None
    created_unix_ns: int
    updated_unix_ns: int
    connected: bool
    first_offset: int
    durable: int
    stored_holes: int
    dropped: int
    lost: int
    current: bool = True

    @cached_property
    def layout(self) -> PacketLayout:
        """What its packets look like. Raises DamageError when the catalog's row makes no sense, or is of a later
        version."""
        try:
            if self.layout_json is None:
                return PacketLayout.opaque(self.packet_size)
            layout = PacketLayout.from_json(self.layout_json)
            if layout.size == self.packet_size:
                return layout
            fault = f"its layout has packets of {layout.size} bytes, the stream of {self.packet_size}"
        except ValueError as error:
            fault = str(error)
        raise DamageError(f"the catalog's row of stream {self.full_name} makes no sense: {fault}")

    @property
    def full_name(self) -> str:
        """What opens exactly this epoch again."""
        return self.name if self.current else f"{self.name}@{self.epoch}"


@dataclass(frozen=True)
class StreamSnapshot:
    """One consistent state of a stream; segments and holes in the order of their offsets."""

    row: StreamRow
    segments: tuple[Segment, ...]
    holes: tuple[Hole, ...]


def find_stream(spool: Path, name: str, epoch: str | None = None) -> StreamSnapshot:
    """The stream of that name: its current epoch, ``epoch``, or the one in ``name@epoch``.

    Raises StreamNotFoundError, which names the nearest stream.
    """

    def question(connection: sqlite3.Connection) -> StreamSnapshot:
        row = _find_row(connection, name, epoch)
        if row is None and epoch is None:
            stem, _, suffix = name.rpartition("@")
            if stem and EPOCH.fullmatch(suffix):
                row = _find_row(connection, stem, suffix)
        if row is None:
            raise StreamNotFoundError(_not_found(connection, spool, name, epoch))
        return _snapshot(connection, row)

    return ask(spool, question)


def stream_by_id(spool: Path, stream: int, known: StreamSnapshot | None = None) -> StreamSnapshot | None:
    """The stream with that catalog id, or None when it was deleted since.

    With an earlier snapshot only what can have changed at its end is read, so that following a stream of many segments
    is cheap.
    """

    def question(connection: sqlite3.Connection) -> StreamSnapshot | None:
        found = connection.execute(f"SELECT {STREAM_COLUMNS} FROM stream WHERE id = ?", (stream,)).fetchone()
        return None if found is None else _snapshot(connection, _stream_row(connection, found), known)

    return ask(spool, question)


def all_streams(spool: Path, *, pattern: str | None = None, all_epochs: bool = False) -> list[StreamSnapshot]:
    """All streams by name, older epochs first; ``pattern`` with ``*``, ``?`` and ``[…]`` as in a shell."""

    def question(connection: sqlite3.Connection) -> list[StreamSnapshot]:
        newest = dict(connection.execute("SELECT name, max(id) FROM stream GROUP BY name"))
        rows = [
            _row_of(found, current=newest[found[1]] == found[0])
            for found in connection.execute(f"SELECT {STREAM_COLUMNS} FROM stream ORDER BY name, id")
            if (all_epochs or newest[found[1]] == found[0]) and (pattern is None or fnmatchcase(found[1], pattern))
        ]
        segments: dict[int, list[Segment]] = defaultdict(list)
        for stream, *values in connection.execute(
            "SELECT stream, first, end, state, sha256 FROM segment ORDER BY first"
        ):
            segments[stream].append(Segment(*values))
        holes: dict[int, list[Hole]] = defaultdict(list)
        for stream, *values in connection.execute("SELECT stream, first, end, kind FROM hole ORDER BY first"):
            holes[stream].append(Hole(*values))
        return [StreamSnapshot(row, tuple(segments[row.id]), tuple(holes[row.id])) for row in rows]

    return ask(spool, question)


def _find_row(connection: sqlite3.Connection, name: str, epoch: str | None) -> StreamRow | None:
    found = connection.execute(
        f"SELECT {STREAM_COLUMNS} FROM stream WHERE name = ? AND (? IS NULL OR epoch = ?) ORDER BY id DESC LIMIT 1",
        (name, epoch, epoch),
    ).fetchone()
    return None if found is None else _stream_row(connection, found)


def _stream_row(connection: sqlite3.Connection, found: tuple[Any, ...]) -> StreamRow:
    newest = connection.execute("SELECT max(id) FROM stream WHERE name = ?", (found[1],)).fetchone()[0]
    return _row_of(found, current=newest == found[0])


def _row_of(found: tuple[Any, ...], *, current: bool) -> StreamRow:
    stream, name, epoch, directory, packet_size, layout, created, updated, connected, first, durable, *totals = found
    holes, dropped, lost = (int(total or 0) for total in totals)
    return StreamRow(
        id=stream,
        name=name,
        epoch=epoch,
        directory=directory,
        packet_size=packet_size,
        layout_json=layout or None,
        created_unix_ns=created or 0,
        updated_unix_ns=updated or 0,
        connected=bool(connected),
        first_offset=first or 0,
        durable=durable or 0,
        stored_holes=holes,
        dropped=dropped,
        lost=lost,
        current=current,
    )


def _snapshot(connection: sqlite3.Connection, row: StreamRow, known: StreamSnapshot | None = None) -> StreamSnapshot:
    oldest, settled, durable = row.first_offset, -1, -1
    if known is not None and known.segments:
        settled, durable = known.segments[-1].first, known.row.durable
    segments = [s for s in known.segments if s.first < settled and (s.end or 0) > oldest] if known else []
    holes = [h for h in known.holes if h.end < durable and h.end > oldest] if known else []
    query = "SELECT first, end, state, sha256 FROM segment WHERE stream = ? AND first >= ? ORDER BY first"
    segments.extend(Segment(*found) for found in connection.execute(query, (row.id, settled)))
    query = "SELECT first, end, kind FROM hole WHERE stream = ? AND end >= ? ORDER BY first"
    holes.extend(Hole(*found) for found in connection.execute(query, (row.id, durable)))
    return StreamSnapshot(row, tuple(segments), tuple(holes))


def _not_found(connection: sqlite3.Connection, spool: Path, name: str, epoch: str | None) -> str:
    names = [str(row[0]) for row in connection.execute("SELECT DISTINCT name FROM stream")]
    if epoch is not None and name in names:
        return f"stream {name} has no epoch {epoch}; mpserverctl streams --all-epochs lists them"
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"the nearest is {nearest[0]}" if nearest else f"the spool has {len(names)} streams"
    return f"no stream {name} in {spool}; {hint}"
