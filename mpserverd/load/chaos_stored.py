"""What a spool holds, read in two ways that share nothing: by the public reader, and with SQLite and plain reads.

It compares nothing; that is ``chaos_compare.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import sqlite3
from collections.abc import Callable, Iterator

from mpserverd.streams.reader import open_stream

PIECE_BYTES = 1 << 18
COUNTED = ("gaps", "missing", "repeats", "reordered", "stored_holes", "dropped", "lost")
"""Columns of the catalog that say that something about the packets was not as it should be."""


@dataclasses.dataclass(frozen=True)
class StoredStream:
    """A row of the catalog. ``counted``: those of COUNTED that are not 0."""

    name: str
    full_name: str
    directory: str
    packet_size: int
    first_offset: int
    durable: int
    counted: dict[str, int]


def stored_streams(spool: pathlib.Path) -> list[StoredStream]:
    """From the catalog, in the order in which they were made."""
    columns = ", ".join(("name", "epoch", "directory", "packet_size", "first_offset", "durable", *COUNTED))
    with contextlib.closing(sqlite3.connect(f"file:{spool}/catalog.sqlite?mode=ro", uri=True)) as catalog:
        rows = catalog.execute(f"SELECT {columns} FROM stream ORDER BY id").fetchall()
    return [
        StoredStream(
            name=name,
            full_name=f"{name}@{epoch}",
            directory=directory,
            packet_size=size,
            first_offset=first,
            durable=durable,
            counted={column: count for column, count in zip(COUNTED, counts, strict=True) if count},
        )
        for name, epoch, directory, size, first, durable, *counts in rows
    ]


def through_reader(spool: pathlib.Path, stream: StoredStream) -> Iterator[bytes]:
    with open_stream(stream.full_name, spool=spool) as opened:
        for view in opened.read_bytes(chunk_bytes=PIECE_BYTES):
            yield bytes(view)


def through_files(spool: pathlib.Path, stream: StoredStream) -> Iterator[bytes]:
    """Segment files are named by the offset of their first byte; each holds the bytes up to the next one's."""
    at = stream.first_offset
    paths = sorted((spool / "streams" / stream.directory).glob("*.seg"))
    bases = [int(path.stem) for path in paths]
    for path, base, next_base in zip(paths, bases, [*bases[1:], stream.durable], strict=True):
        end = min(next_base, stream.durable)
        with path.open("rb") as segment:
            segment.seek(at - base)
            while at < end and (piece := segment.read(min(PIECE_BYTES, end - at))):
                at += len(piece)
                yield piece


WAYS: dict[str, Callable[[pathlib.Path, StoredStream], Iterator[bytes]]] = {
    "reader": through_reader,
    "files": through_files,
}
