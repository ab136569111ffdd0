"""Writes spools straight from docs/SYSTEM_ARCHITECTURE.md, without the storer: the other side of what readers are told.

Its tables and file names are typed out here on purpose and shared with nobody.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import struct
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

SCHEMA = """ CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT); CREATE TABLE stream(id INTEGER PRIMARY KEY, name
TEXT, epoch TEXT, directory TEXT UNIQUE, packet_size INTEGER, layout TEXT, created_unix_ns INTEGER, updated_unix_ns
INTEGER, connected INTEGER, first_offset INTEGER, durable INTEGER, stored_holes INTEGER, dropped INTEGER, lost
INTEGER, truncated INTEGER, handshake INTEGER, socket INTEGER, retired INTEGER, acked INTEGER, gaps INTEGER, missing
INTEGER, repeats INTEGER, reordered INTEGER, UNIQUE(name, epoch)); CREATE TABLE segment(stream INTEGER, first INTEGER,
end INTEGER, state TEXT, sha256 TEXT, PRIMARY KEY(stream, first)); CREATE TABLE hole(stream INTEGER, first INTEGER,
end INTEGER, kind TEXT, PRIMARY KEY(stream, first)); CREATE TABLE total(name TEXT PRIMARY KEY, value INTEGER); CREATE
TABLE released(number INTEGER PRIMARY KEY);
"""
SAMPLE16 = {
    "name": "sample16",
    "size": 16,
    "fields": {"sequence": "<u8", "time": "<u8"},
    "sequence": "sequence",
    "time": "time",
}
CREATED_NS = 1_700_000_000_000_000_000
PREALLOCATED_BYTES = 64


class SpoolWriter:
    """A spool under construction; ``catalog`` is a connection in autocommit mode."""

    def __init__(self, path: Path, *, version: str = "1") -> None:
        self.path = path
        path.mkdir(exist_ok=True)
        (path / "streams").mkdir()
        self.catalog = sqlite3.connect(path / "catalog.sqlite", isolation_level=None, check_same_thread=False)
        self.catalog.execute("PRAGMA journal_mode = WAL")
        self.catalog.executescript(SCHEMA)
        self.catalog.execute("INSERT INTO meta VALUES ('layout_version', ?)", (version,))

    def __enter__(self) -> SpoolWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.catalog.close()

    def add(
        self,
        name: str,
        content: bytes,
        *,
        packet_size: int = 16,
        cuts: Sequence[int] = (),
        holes: Iterable[tuple[int, int, str]] = (),
        first_offset: int = 0,
        epoch: str = "00000000000000a1",
        layout: dict[str, object] | None = None,
        connected: bool = False,
        states: dict[int, str] | None = None,
        last_open: bool = True,
        sealed_sums: bool = True,
    ) -> int:
        """A stream of ``content`` from offset 0 on, cut into segments at ``cuts``; below ``first_offset`` nothing is
        kept.

        Bytes in holes are written as zeros. The last segment is open, longer than its content; ``states`` overrides
        states by first offset.
        """
        holes = list(holes)
        data = bytearray(content)
        for first, end, _ in holes:
            data[first:end] = bytes(end - first)
        directory = f"{name}-{epoch}"
        stream = self.add_row(name, directory, packet_size, first_offset, len(content), holes, epoch, layout, connected)
        bounds = [first_offset, *(cut for cut in cuts if first_offset < cut < len(content)), len(content)]
        for first, end in pairwise(bounds):
            is_open = last_open and end == len(content)
            state = (states or {}).get(first, "open" if is_open else "sealed")
            self.add_segment(stream, directory, first, bytes(data[first:end]), state, sealed_sums=sealed_sums)
        return stream

    def add_row(
        self,
        name: str,
        directory: str,
        packet_size: int,
        first_offset: int,
        durable: int,
        holes: Sequence[tuple[int, int, str]],
        epoch: str,
        layout: dict[str, object] | None,
        connected: bool,
    ) -> int:
        (self.path / "streams" / directory).mkdir()
        lengths = {kind: sum(e - f for f, e, k in holes if k == kind) for kind in ("dropped", "lost")}
        cursor = self.catalog.execute(
            "INSERT INTO stream(name, epoch, directory, packet_size, layout, created_unix_ns, updated_unix_ns,"
            " connected, first_offset, durable, stored_holes, dropped, lost, retired)"
            " VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
            (
                name,
                epoch,
                directory,
                packet_size,
                json.dumps(layout) if layout else None,
                CREATED_NS,
                CREATED_NS + 60 * 10**9,
                connected,
                first_offset,
                durable,
                sum(lengths.values()),
                lengths["dropped"],
                lengths["lost"],
                first_offset,
            ),
        )
        stream = int(cursor.lastrowid or 0)
        self.catalog.executemany("INSERT INTO hole VALUES (?,?,?,?)", [(stream, *hole) for hole in holes])
        return stream

    def add_segment(
        self, stream: int, directory: str, first: int, content: bytes, state: str, *, sealed_sums: bool = True
    ) -> Path:
        path = self.path / "streams" / directory / f"{first:020d}.seg"
        path.write_bytes(content + (bytes(PREALLOCATED_BYTES) if state == "open" else b""))
        digest = hashlib.sha256(content).hexdigest() if state == "sealed" and sealed_sums else None
        end = None if state == "open" else first + len(content)
        self.catalog.execute("INSERT INTO segment VALUES (?,?,?,?,?)", (stream, first, end, state, digest))
        return path

    def directory(self, stream: int) -> Path:
        name = self.catalog.execute("SELECT directory FROM stream WHERE id = ?", (stream,)).fetchone()[0]
        return self.path / "streams" / str(name)

    def segment_paths(self, stream: int) -> list[Path]:
        return sorted(self.directory(stream).glob("*.seg"))

    def add_index(self, stream: int, first: int, entries: Iterable[tuple[int, int]], *, tail: bytes = b"") -> None:
        content = b"".join(struct.pack("<QQ", *entry) for entry in entries)
        (self.directory(stream) / f"{first:020d}.idx").write_bytes(content + tail)

    def append(self, stream: int, content: bytes) -> None:
        """What the storer does to the open segment: bytes first, then the durable offset."""
        first, durable = self.catalog.execute(
            "SELECT segment.first, durable FROM segment JOIN stream ON id = stream WHERE stream = ? AND end IS NULL",
            (stream,),
        ).fetchone()
        path = self.directory(stream) / f"{first:020d}.seg"
        with path.open("r+b") as file:
            file.seek(durable - first)
            file.write(content)
            file.write(bytes(PREALLOCATED_BYTES))
        self.set_row(stream, durable=durable + len(content))

    def roll(self, stream: int, content: bytes) -> None:
        """Seal the open segment and begin another with ``content``."""
        first, durable, directory = self.catalog.execute(
            "SELECT segment.first, durable, directory FROM segment JOIN stream ON id = stream"
            " WHERE stream = ? AND end IS NULL",
            (stream,),
        ).fetchone()
        self.catalog.execute(
            "UPDATE segment SET end = ?, state = 'sealed' WHERE stream = ? AND first = ?", (durable, stream, first)
        )
        self.add_segment(stream, directory, durable, content, "open")
        self.set_row(stream, durable=durable + len(content))

    def retire(self, stream: int, first_offset: int, *, unlink: bool = True) -> None:
        """Retention: the new first offset, then the files."""
        self.set_row(stream, first_offset=first_offset)
        gone = self.catalog.execute(
            "SELECT first FROM segment WHERE stream = ? AND end IS NOT NULL AND end <= ?", (stream, first_offset)
        ).fetchall()
        self.catalog.execute(
            "DELETE FROM segment WHERE stream = ? AND end IS NOT NULL AND end <= ?", (stream, first_offset)
        )
        for (first,) in gone if unlink else ():
            (self.directory(stream) / f"{first:020d}.seg").unlink()

    def set_row(self, stream: int, **values: int) -> None:
        for column, value in values.items():
            self.catalog.execute(f"UPDATE stream SET {column} = ? WHERE id = ?", (value, stream))


def noise(size: int, seed: int = 1) -> bytes:
    """Bytes that differ everywhere, the same each time."""
    blocks = (hashlib.sha256(struct.pack("<QQ", seed, index)).digest() for index in range(-(-size // 32)))
    return b"".join(blocks)[:size]


def samples(count: int, *, first: int = 0, time_ns: int = CREATED_NS) -> bytes:
    """Packets of SAMPLE16: a number, and a time that rises by a tenth of a millisecond."""
    return b"".join(struct.pack("<QQ", first + i, time_ns + (first + i) * 100_000) for i in range(count))
