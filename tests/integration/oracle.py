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
from collections.abc import Iterable

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


def stored_streams(spool: pathlib.Path) -> list[StoredStream]:
    """Every stream of a spool, oldest first, after comparing files with what ``open_stream`` gives."""
    with contextlib.closing(sqlite3.connect(f"file:{spool}/catalog.sqlite?mode=ro", uri=True)) as catalog:
        rows = catalog.execute(
            "SELECT id, name, epoch, directory, packet_size, first_offset, durable, truncated FROM stream ORDER BY id"
        ).fetchall()
        streams = []
        for number, name, epoch, directory, packet_size, first, durable, truncated in rows:
            holes = catalog.execute("SELECT first, end FROM hole WHERE stream = ? ORDER BY first", (number,)).fetchall()
            content = _without(holes, first, _read_segments(spool / "streams" / directory, first, durable))
            streams.append(StoredStream(name, epoch, packet_size, first, durable, truncated, content))
    for stream in streams:
        through_api = api_bytes(spool, f"{stream.name}@{stream.epoch}")
        assert sha256(through_api) == stream.sha256, f"open_stream and the files of {stream.name} differ"
    return streams


def api_bytes(spool: pathlib.Path, name: str) -> bytes:
    """The stream through the public reader."""
    with mpserverd.open_stream(name, spool=spool) as stream:
        return b"".join(bytes(view) for view in stream.read_bytes())


def _read_segments(directory: pathlib.Path, first: int, durable: int) -> bytes:
    """Bytes [first, durable) out of files that are named by their first byte's offset."""
    content = bytearray()
    for path in sorted(directory.glob("*.seg")) if directory.exists() else []:
        base = int(path.stem)
        wanted_from = first + len(content)
        if base > wanted_from or wanted_from >= durable:
            break
        with path.open("rb") as segment:
            segment.seek(wanted_from - base)
            following = [int(other.stem) for other in directory.glob("*.seg") if int(other.stem) > base]
            content += segment.read(min([durable, *following]) - wanted_from)
    assert len(content) == durable - first, f"{directory}: {len(content)} of {durable - first} durable bytes"
    return bytes(content)


def _without(holes: Iterable[tuple[int, int]], first: int, content: bytes) -> bytes:
    pieces, at = [], first
    for hole_first, hole_end in holes:
        if hole_end > at:
            pieces.append(content[at - first : max(hole_first, at) - first])
            at = hole_end
    return b"".join([*pieces, content[at - first :]])


def stored_digests(spool: pathlib.Path) -> collections.Counter[str]:
    """How often each content is stored, to compare with the same of what was sent."""
    return collections.Counter(stream.sha256 for stream in stored_streams(spool))


def sent_digests(contents: Iterable[bytes], packet_size: int) -> collections.Counter[str]:
    """The same of what clients sent: whole packets only, and a client without one leaves no stream."""
    whole = (content[: len(content) - len(content) % packet_size] for content in contents)
    return collections.Counter(sha256(content) for content in whole if content)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
