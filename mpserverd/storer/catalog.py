"""The catalog's tables and every statement that changes them. One process, one connection, one thread.

Rules: everything of a cycle is one transaction; a position is committed only after what it promises has been synced;
statements name ids and offsets, so that each may be repeated after a kill and changes nothing the second time.

It does not know files, shared tables or clocks. Schema: docs/SYSTEM_ARCHITECTURE.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence

from mpserverd.errors import LayoutError, StartError

CATALOG_FILE = "catalog.sqlite"
LAYOUT_VERSION = "1"
APPLICATION_ID = 0x6D707364
"""SQLite's word for whose file it is ("mpsd"). Older catalogs have 0 and are known by their layout."""
_BUSY_TIMEOUT_S = 10.0
_CHECKPOINT_PAGES = 4000
"""16 MiB of log: less, and ten thousand streams would checkpoint in every cycle."""
_LOG_BYTES_MAX = 64 << 20

_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS meta(key TEXT PRIMARY KEY, value TEXT)",
    """CREATE TABLE IF NOT EXISTS stream(
        id INTEGER PRIMARY KEY, name TEXT, epoch TEXT, directory TEXT UNIQUE, packet_size INTEGER, layout TEXT,
        created_unix_ns INTEGER, updated_unix_ns INTEGER, connected INTEGER, first_offset INTEGER, durable INTEGER,
        stored_holes INTEGER, dropped INTEGER, lost INTEGER, truncated INTEGER, handshake INTEGER, socket INTEGER,
        retired INTEGER, acked INTEGER, gaps INTEGER, missing INTEGER, repeats INTEGER, reordered INTEGER,
        named INTEGER, UNIQUE(name, epoch))""",
    """CREATE TABLE IF NOT EXISTS segment(
        stream INTEGER, first INTEGER, end INTEGER, state TEXT, sha256 TEXT, closed_unix_ns INTEGER,
        PRIMARY KEY(stream, first)) WITHOUT ROWID""",
    """CREATE TABLE IF NOT EXISTS hole(
        stream INTEGER, first INTEGER, end INTEGER, kind TEXT, PRIMARY KEY(stream, first)) WITHOUT ROWID""",
    "CREATE TABLE IF NOT EXISTS total(name TEXT PRIMARY KEY, value INTEGER)",
    "CREATE TABLE IF NOT EXISTS released(number INTEGER PRIMARY KEY)",
    "CREATE INDEX IF NOT EXISTS segment_closed ON segment(closed_unix_ns) WHERE end IS NOT NULL",
    "CREATE INDEX IF NOT EXISTS stream_resting ON stream(updated_unix_ns) WHERE named = 1 AND connected = 0",
    "CREATE INDEX IF NOT EXISTS segment_unsummed ON segment(closed_unix_ns) WHERE state = 'sealed' AND sha256 IS NULL",
)

_STREAM_COLUMNS = (
    "id, name, epoch, directory, packet_size, layout, created_unix_ns, connected, first_offset, durable, stored_holes, "
    "dropped, lost, truncated, handshake, socket, retired, acked, gaps, missing, repeats, reordered, named"
)


@dataclasses.dataclass(frozen=True, slots=True)
class StreamRecord:
    """A row of ``stream``. Totals are bytes, or events for the last four."""

    id: int
    name: str
    epoch: str
    directory: str
    packet_size: int
    layout: str | None
    created_unix_ns: int
    connected: int
    first_offset: int
    durable: int
    stored_holes: int
    dropped: int
    lost: int
    truncated: int
    handshake: int
    socket: int
    retired: int
    acked: int
    gaps: int
    missing: int
    repeats: int
    reordered: int
    named: int


@dataclasses.dataclass(frozen=True, slots=True)
class SegmentRecord:
    """A row of ``segment``; ``end`` None: the one that is written."""

    stream: int
    first: int
    end: int | None
    state: str
    closed_unix_ns: int


Position = Sequence[int]
"""Values of ``POSITION_COLUMNS``, then the stream's id."""
POSITION_COLUMNS = (
    "updated_unix_ns", "durable", "stored_holes", "dropped", "lost", "truncated", "handshake", "socket", "acked",
    "gaps", "missing", "repeats", "reordered", "connected",
)  # fmt: skip
_UPDATE_POSITION = f"UPDATE stream SET {', '.join(f'{name} = ?' for name in POSITION_COLUMNS)} WHERE id = ?"


class Catalog:
    """Open for writing. ``durable`` False: a commit is left to the kernel, as the data are ([spool] sync = "none")."""

    def __init__(self, spool: str, *, durable: bool) -> None:
        self.path = os.path.join(spool, CATALOG_FILE)
        try:
            self._connection = sqlite3.connect(self.path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
            try:
                self._prepare(durable)
            except BaseException:
                self._connection.close()
                raise
        except sqlite3.Error as error:
            raise StartError(f"cannot open the catalog {self.path}: {error}; {todo(error)}") from error

    def _prepare(self, durable: bool) -> None:
        run = self._connection.execute
        self._require_ours()  # before anything is changed: it may be somebody else's
        run("PRAGMA journal_mode = WAL")
        run(f"PRAGMA synchronous = {'FULL' if durable else 'OFF'}")
        run(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
        run(f"PRAGMA journal_size_limit = {_LOG_BYTES_MAX}")
        with self.transaction():
            if run("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:  # a full disk takes not even the same
                run(f"PRAGMA application_id = {APPLICATION_ID}")
            for statement in _SCHEMA:
                run(statement)
            run("INSERT OR IGNORE INTO meta VALUES ('layout_version', ?)", (LAYOUT_VERSION,))

    def _require_ours(self) -> None:
        """An empty file will do, and a catalog of this layout. Raises LayoutError."""
        run = self._connection.execute
        application = run("PRAGMA application_id").fetchone()[0]
        columns = {name for (name,) in run("SELECT name FROM pragma_table_info('meta')")}
        found = None
        if {"key", "value"} <= columns:
            found = run("SELECT value FROM meta WHERE key = 'layout_version'").fetchone()
        if application not in (0, APPLICATION_ID) or (found is None and self._has_tables()):
            raise LayoutError(
                f"{self.path} is a database, but not a catalog of mpserverd, and is left as it is; "
                "move it away, or change [spool] path"
            )
        if found is not None and found[0] != LAYOUT_VERSION:
            raise LayoutError(
                f"{self.path} has layout {found[0]}, this version knows {LAYOUT_VERSION}; "
                "use the version of mpserverd that wrote it"
            )

    def _has_tables(self) -> bool:
        return self._connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone() is not None

    def close(self) -> None:
        self._connection.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing. Raises sqlite3.Error; nothing has changed then."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    # -- streams

    def current(self, name: str) -> StreamRecord | None:
        """The youngest epoch of that name."""
        return self._one("name = ? ORDER BY id DESC LIMIT 1", name)

    def by_epoch(self, name: str, epoch: str) -> StreamRecord | None:
        return self._one("name = ? AND epoch = ?", name, epoch)

    def by_id(self, stream: int) -> StreamRecord | None:
        return self._one("id = ?", stream)

    def _one(self, condition: str, *values: object) -> StreamRecord | None:
        found = self._connection.execute(f"SELECT {_STREAM_COLUMNS} FROM stream WHERE {condition}", values).fetchone()
        return None if found is None else _record(found)

    def streams(self) -> Iterator[StreamRecord]:
        for found in self._connection.execute(f"SELECT {_STREAM_COLUMNS} FROM stream ORDER BY id"):
            yield _record(found)

    def directory_is_known(self, directory: str) -> bool:
        return self._connection.execute("SELECT 1 FROM stream WHERE directory = ?", (directory,)).fetchone() is not None

    def add_stream(self, record: StreamRecord) -> int:
        """Insert a row, whatever its ``id``; returns the one that it got."""
        columns = _STREAM_COLUMNS.removeprefix("id, ")
        values = dataclasses.astuple(record)[1:]
        marks = ", ".join("?" * len(values))
        cursor = self._connection.execute(
            f"INSERT INTO stream({columns}, updated_unix_ns) VALUES ({marks}, ?)", (*values, record.created_unix_ns)
        )
        return int(cursor.lastrowid or 0)

    def restore_stream(self, record: StreamRecord, updated_unix_ns: int) -> int:
        """Insert a row with the number that it had, if that is free; returns the one that it got."""
        number = record.id if record.id and self.by_id(record.id) is None else None
        names = [each.name for each in dataclasses.fields(record)]
        values = [number, *dataclasses.astuple(record)[1:], updated_unix_ns]
        cursor = self._connection.execute(
            f"INSERT INTO stream({', '.join(names)}, updated_unix_ns) VALUES ({', '.join('?' * len(values))})", values
        )
        return int(cursor.lastrowid or 0)

    def restore_segments(self, segments: Iterable[tuple[int, int, int | None, str, str | None, int | None]]) -> None:
        """Whole rows."""
        self._connection.executemany("INSERT OR REPLACE INTO segment VALUES (?, ?, ?, ?, ?, ?)", segments)

    def settle(self) -> None:
        """No log beside the file any more: it can be moved."""
        self._connection.execute("PRAGMA journal_mode = DELETE")

    def remove_stream(self, stream: int) -> None:
        for table, column in (("hole", "stream"), ("segment", "stream"), ("stream", "id")):
            self._connection.execute(f"DELETE FROM {table} WHERE {column} = ?", (stream,))

    def set_connected(self, streams: Iterable[int], connected: int) -> None:
        self._connection.executemany("UPDATE stream SET connected = ? WHERE id = ?", [(connected, s) for s in streams])

    def set_positions(self, positions: Sequence[Position]) -> None:
        self._connection.executemany(_UPDATE_POSITION, positions)

    # -- segments and holes

    def segments(self, stream: int) -> list[SegmentRecord]:
        found = self._connection.execute(
            "SELECT stream, first, end, state, closed_unix_ns FROM segment WHERE stream = ? ORDER BY first", (stream,)
        )
        return [_segment(row) for row in found]

    def segment_firsts(self) -> dict[int, set[int]]:
        """First offsets of all segments, by stream."""
        found: dict[int, set[int]] = {}
        for stream, first in self._connection.execute("SELECT stream, first FROM segment"):
            found.setdefault(stream, set()).add(first)
        return found

    def add_segments(self, segments: Iterable[tuple[int, int]]) -> None:
        """(stream, first) of segments that are written from now on."""
        self._connection.executemany("INSERT OR REPLACE INTO segment VALUES (?, ?, NULL, 'open', NULL, NULL)", segments)

    def close_open_segments(self, streams: Iterable[int], now_unix_ns: int) -> None:
        """Seal what is open of streams that nobody will continue."""
        self._connection.executemany(
            "UPDATE segment SET end = (SELECT durable FROM stream WHERE id = segment.stream), state = 'sealed', "
            "closed_unix_ns = ? WHERE stream = ? AND end IS NULL",
            [(now_unix_ns, stream) for stream in streams],
        )

    def close_segments(self, closed: Iterable[tuple[int, str, int, int, int]]) -> None:
        """(end, 'sealed' or 'aside', unix ns, stream, first)."""
        self._connection.executemany(
            "UPDATE segment SET end = ?, state = ?, closed_unix_ns = ? WHERE stream = ? AND first = ?", closed
        )

    def remove_segments(self, segments: Iterable[tuple[int, int]]) -> None:
        """(stream, first)."""
        self._connection.executemany("DELETE FROM segment WHERE stream = ? AND first = ?", segments)

    def add_holes(self, holes: Iterable[tuple[int, int, int, str]]) -> None:
        """(stream, first, end, kind)."""
        self._connection.executemany("INSERT OR REPLACE INTO hole VALUES (?, ?, ?, ?)", holes)

    def holes(self, stream: int) -> list[tuple[int, int]]:
        found = self._connection.execute("SELECT first, end FROM hole WHERE stream = ? ORDER BY first", (stream,))
        return [(int(first), int(end)) for first, end in found]

    def last_hole_end(self, stream: int) -> int:
        found = self._connection.execute("SELECT max(end) FROM hole WHERE stream = ?", (stream,)).fetchone()
        return int(found[0] or 0)

    # -- checksums

    def unsummed(self, limit: int) -> list[tuple[int, str, int, int]]:
        """(stream, directory, first, end) of sealed segments without a checksum, oldest first."""
        return self._connection.execute(
            "SELECT stream, directory, first, end FROM segment JOIN stream ON stream.id = segment.stream "
            "WHERE state = 'sealed' AND sha256 IS NULL ORDER BY closed_unix_ns LIMIT ?",
            (limit,),
        ).fetchall()

    def set_sums(self, sums: Iterable[tuple[str, int, int, int]]) -> None:
        """(sha256, stream, first, end)."""
        self._connection.executemany(
            "UPDATE segment SET sha256 = ? WHERE stream = ? AND first = ? AND end = ? AND state = 'sealed'", sums
        )

    # -- retention

    def finished_segments(self, limit: int, *, stream: int | None = None) -> list[SegmentRecord]:
        """Segments that nobody writes, oldest first: closed ones, and the last one of a stream not connected."""
        which, values = ("AND segment.stream = ?", (stream, limit)) if stream is not None else ("", (limit,))
        closed = self._connection.execute(
            "SELECT stream, first, end, state, closed_unix_ns FROM segment "
            f"WHERE end IS NOT NULL {which} ORDER BY closed_unix_ns, first LIMIT ?",
            values,
        ).fetchall()
        left = self._connection.execute(
            "SELECT segment.stream, first, durable, state, updated_unix_ns FROM stream JOIN segment ON stream = id "
            f"WHERE named = 1 AND connected = 0 AND end IS NULL {which} ORDER BY updated_unix_ns LIMIT ?",
            values,
        ).fetchall()
        found = sorted((_segment(row) for row in closed + left), key=lambda s: (s.closed_unix_ns, s.stream, s.first))
        return found[:limit]

    def segment_bytes(self) -> int:
        """Content of all segments."""
        found = self._connection.execute(
            "SELECT sum(coalesce(end, durable) - first) FROM segment JOIN stream ON id = stream"
        ).fetchone()
        return int(found[0] or 0)

    def retire(self, firsts: Iterable[tuple[int, int, int]]) -> None:
        """(new first offset, bytes retired by this, stream); holes that nobody can ask for any more go too."""
        for first_offset, retired, stream in firsts:
            self._connection.execute(
                "UPDATE stream SET first_offset = max(first_offset, ?), retired = retired + ? WHERE id = ?",
                (first_offset, retired, stream),
            )
            self._connection.execute("DELETE FROM hole WHERE stream = ? AND end <= ?", (stream, first_offset))

    # -- totals of what has no row

    def totals(self) -> dict[str, int]:
        return {str(name): int(value) for name, value in self._connection.execute("SELECT name, value FROM total")}

    def add_totals(self, totals: Iterable[tuple[str, int]]) -> None:
        self._connection.executemany(
            "INSERT INTO total VALUES (?, ?) ON CONFLICT(name) DO UPDATE SET value = value + excluded.value", totals
        )

    # -- how the daemon lives

    def meta(self) -> dict[str, str]:
        return {str(key): str(value) for key, value in self._connection.execute("SELECT key, value FROM meta")}

    def set_meta(self, pairs: Iterable[tuple[str, str]]) -> None:
        self._connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", pairs)

    def first_fault(self) -> str:
        """What SQLite finds wrong with the file; "" for nothing. It reads all of it."""
        found = str(self._connection.execute("PRAGMA quick_check(1)").fetchone()[0])
        return "" if found == "ok" else found

    def release(self, number: int) -> None:
        self._connection.execute("INSERT INTO released VALUES (?)", (number,))

    def released(self) -> set[int]:
        return {int(number) for (number,) in self._connection.execute("SELECT number FROM released")}

    def forget_released(self, numbers: Iterable[int]) -> None:
        self._connection.executemany("DELETE FROM released WHERE number = ?", [(number,) for number in numbers])


def todo(error: sqlite3.Error) -> str:
    """The next step after an error of the start."""
    if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return "stop the daemon and run mpserverctl repair, which sets it aside and makes it anew from the segments"
    return "check the permissions of [spool] path, the disk, and that it is not full (df -h)"


def _record(found: Sequence[object]) -> StreamRecord:
    return StreamRecord(*[0 if value is None and index != 5 else value for index, value in enumerate(found)])  # type: ignore[arg-type]


def _segment(row: Sequence[int]) -> SegmentRecord:
    stream, first, end, state, closed = row
    return SegmentRecord(stream, first, end, str(state), closed or 0)
