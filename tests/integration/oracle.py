"""What is on disk, read without a line of the project's code: SQLite for the catalog, plain reads for the segments.

And the same through the public ``mpserverd.open_stream``; both must agree, always.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import pathlib
import sqlite3
from collections.abc import Iterable, Iterator

import mpserverd


@dataclasses.dataclass(frozen=True)
class StoredStream:
    """``content`` is everything durable from ``first_offset`` on, holes left out."""

    name: str
    epoch: str
    packet_size: int
    first_offset: int
    durable: int
    truncated: int
    content: bytes

    @property
    def sha256(self) -> str:
        return sha256(self.content)


def stored_streams(spool: pathlib.Path, *, live: bool = False) -> list[StoredStream]:
    """Every stream of a spool, oldest first, after comparing files with what ``open_stream`` gives.

    ``live``: the daemon goes on writing, so that two looks see different ends; the files alone are read.
    """
    with contextlib.closing(sqlite3.connect(f"file:{spool}/catalog.sqlite?mode=ro", uri=True)) as catalog:
        rows = catalog.execute(
            "SELECT id, name, epoch, directory, packet_size, first_offset, durable, truncated FROM stream ORDER BY id"
        ).fetchall()
        streams = []
        for number, name, epoch, directory, packet_size, first, durable, truncated in rows:
            holes = catalog.execute("SELECT first, end FROM hole WHERE stream = ? ORDER BY first", (number,)).fetchall()
            pieces = [_read(spool / "streams" / directory, *extent) for extent in _between(holes, first, durable)]
            content = b"".join(pieces)
            streams.append(StoredStream(name, epoch, packet_size, first, durable, truncated, content))
    for stream in streams if not live else ():
        through_api = api_bytes(spool, f"{stream.name}@{stream.epoch}")
        assert sha256(through_api) == stream.sha256, f"open_stream and the files of {stream.name} differ"
    return streams


def api_bytes(spool: pathlib.Path, name: str) -> bytes:
    """The stream through the public reader."""
    with mpserverd.open_stream(name, spool=spool) as stream:
        return b"".join(bytes(view) for view in stream.read_bytes())


def _read(directory: pathlib.Path, first: int, end: int) -> bytes:
    """Bytes [first, end) out of files that are named by their first byte's offset."""
    bases = sorted((int(path.stem), path) for path in directory.glob("*.seg"))
    content = bytearray()
    while first + len(content) < end:
        at = first + len(content)
        base, path = max(pair for pair in bases if pair[0] <= at)
        piece_end = min([end, *(other for other, _ in bases if other > at)])
        with path.open("rb") as segment:
            segment.seek(at - base)
            piece = segment.read(piece_end - at)
        assert len(piece) == piece_end - at, f"{path} ends at {at + len(piece)}, before {piece_end}"
        content += piece
    return bytes(content)


def _between(holes: Iterable[tuple[int, int]], first: int, end: int) -> Iterator[tuple[int, int]]:
    """What of [first, end) lies in no hole."""
    at = first
    for hole_first, hole_end in holes:
        if at < hole_first:
            yield at, min(hole_first, end)
        at = max(at, hole_end)
    if at < end:
        yield at, end


def stored_digests(spool: pathlib.Path) -> collections.Counter[str]:
    """How often each content is stored, to compare with the same of what was sent."""
    return collections.Counter(stream.sha256 for stream in stored_streams(spool))


def sent_digests(contents: Iterable[bytes], packet_size: int) -> collections.Counter[str]:
    """The same of what clients sent: whole packets only, and a client without one leaves no stream."""
    whole = (content[: len(content) - len(content) % packet_size] for content in contents)
    return collections.Counter(sha256(content) for content in whole if content)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
