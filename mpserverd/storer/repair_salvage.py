"""What an old catalog still says, whatever became of it. It is copied first, with its log, and the copy is asked.

A catalog is *whole* when SQLite finds nothing wrong with it and it is ours. Of another one every row that can be read
and makes sense is taken, as a hint: it may be old, or lack others.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from mpserverd.errors import LayoutError
from mpserverd.storer.catalog import APPLICATION_ID, CATALOG_FILE, LAYOUT_VERSION, StreamRecord
from mpserverd.streams.sidecar import OFFSET_MAX, HoleRow
from mpserverd.streams.verify import STATES

T = TypeVar("T")
SUFFIXES = ("", "-wal", "-shm")
"""Of the files that are one catalog."""


@dataclass(frozen=True)
class KnownSegment:
    """A row of ``segment``."""

    first: int
    end: int | None
    state: str
    sha256: str | None
    closed_unix_ns: int


@dataclass
class Salvaged:
    """``fault`` says why it is not whole; empty when it is."""

    fault: str = ""
    streams: dict[int, StreamRecord] = field(default_factory=dict)
    updated_unix_ns: dict[int, int] = field(default_factory=dict)
    segments: dict[int, dict[int, KnownSegment]] = field(default_factory=dict)
    holes: dict[int, list[HoleRow]] = field(default_factory=dict)
    totals: dict[str, int] = field(default_factory=dict)
    meta: dict[str, str] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        return not self.fault


def salvage(spool: str, place: str) -> Salvaged:
    """Copy the catalog of ``spool`` into the directory ``place`` and read it there. Raises LayoutError, OSError."""
    source, copy = (os.path.join(where, CATALOG_FILE) for where in (spool, place))
    found = Salvaged()
    try:
        if not os.stat(source).st_size:
            found.fault = "it is empty"
            return found
    except FileNotFoundError:
        found.fault = "it is missing"
        return found
    for suffix in SUFFIXES[:2]:
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(source + suffix, copy + suffix)
    try:
        with contextlib.closing(sqlite3.connect(copy, isolation_level=None)) as connection:
            _read(connection, found)
    except sqlite3.Error as error:
        found.fault = str(error)
    return found


def _read(connection: sqlite3.Connection, found: Salvaged) -> None:
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    if application not in (0, APPLICATION_ID):
        found.fault = "it is somebody else's database"
        return
    found.meta = dict(_rows(connection, "key, value", "meta", found, _pair))
    version = found.meta.get("layout_version")
    if version not in (None, LAYOUT_VERSION):
        raise LayoutError(f"the catalog has layout {version}, this version knows {LAYOUT_VERSION}; use that one")
    names = [each.name for each in fields(StreamRecord)]
    for record, updated in _rows(connection, ", ".join([*names, "updated_unix_ns"]), "stream", found, _stream):
        found.streams[record.id] = record
        found.updated_unix_ns[record.id] = updated
    columns = "stream, first, end, state, sha256, closed_unix_ns"
    for stream, segment in _rows(connection, columns, "segment", found, _segment):
        found.segments.setdefault(stream, {})[segment.first] = segment
    for stream, hole in _rows(connection, "stream, first, end, kind", "hole", found, _hole):
        found.holes.setdefault(stream, []).append(hole)
    found.totals = dict(_rows(connection, "name, value", "total", found, _total))
    for holes in found.holes.values():
        holes.sort()
    if not found.fault:
        fault = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
        found.fault = "" if fault == "ok" else fault.replace("\n", " ")
    if not found.fault and version is None:
        found.fault = "it has no layout"


def _rows(
    connection: sqlite3.Connection, columns: str, table: str, found: Salvaged, make: Callable[[Sequence[Any]], T]
) -> Iterator[T]:
    """From both ends, so that one bad page costs only its own rows. A row may come twice."""
    for order in ("ASC", "DESC"):
        try:
            cursor = connection.execute(f"SELECT {columns} FROM {table} ORDER BY 1 {order}")
            while (row := cursor.fetchone()) is not None:
                try:
                    yield make(row)
                except (ValueError, TypeError):
                    found.fault = found.fault or f"a row of {table} makes no sense"
            return
        except sqlite3.Error as error:
            found.fault = found.fault or str(error)


def _pair(row: Sequence[Any]) -> tuple[str, str]:
    return str(row[0]), str(row[1])


def _number(value: Any, *, most: int = OFFSET_MAX) -> int:
    if value is None:
        return 0
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError
    return value


def _total(row: Sequence[Any]) -> tuple[str, int]:
    return str(row[0]), _number(row[1])


def _stream(row: Sequence[Any]) -> tuple[StreamRecord, int]:
    values: dict[str, Any] = {}
    for each, value in zip(fields(StreamRecord), row, strict=False):
        if each.name == "layout":
            values[each.name] = None if value is None else str(value)
        elif each.name in ("name", "epoch", "directory"):
            if type(value) is not str or not value or "/" in (value if each.name == "directory" else ""):
                raise ValueError
            values[each.name] = value
        else:
            values[each.name] = _number(value)
    record = StreamRecord(**values)
    if record.first_offset > record.durable or not record.packet_size or len(record.epoch) != 16:
        raise ValueError
    int(record.epoch, 16)
    return record, _number(row[-1])


def _segment(row: Sequence[Any]) -> tuple[int, KnownSegment]:
    stream, first, end, state, sha256, closed = row
    wanted = KnownSegment(_number(first), None if end is None else _number(end), str(state), sha256, _number(closed))
    if wanted.state not in STATES or (wanted.end is not None and wanted.end < wanted.first):
        raise ValueError
    return _number(stream), wanted


def _hole(row: Sequence[Any]) -> tuple[int, HoleRow]:
    stream, first, end, kind = row
    if _number(first) >= _number(end):
        raise ValueError
    return _number(stream), (first, end, str(kind))
