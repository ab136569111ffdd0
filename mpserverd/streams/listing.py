"""The streams of a spool, one short record each: what ``mpserverctl streams`` and the control socket show.

From the catalog alone; no segment file is opened.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpserverd.errors import DamageError
from mpserverd.streams.catalog_file import STREAMS_DIRECTORY
from mpserverd.streams.catalog_view import StreamRow, StreamSnapshot, all_streams
from mpserverd.streams.extents import stored_bytes
from mpserverd.streams.times import iso_utc


@dataclass(frozen=True)
class StreamInfo:
    """Sizes are bytes. ``stored_bytes`` and ``durable_bytes`` count from the stream's beginning, holes left out; the
    catalog knows only what is durable, so here they are equal. ``held_bytes`` is what retention has left of them."""

    name: str
    epoch: str
    packet_size: int
    first_offset: int
    stored_bytes: int
    durable_bytes: int
    connected: bool
    created: str
    durable_offset: int
    held_bytes: int
    holes: int
    hole_bytes: int
    segments: int
    layout: str | None
    current: bool
    directory: Path

    def as_json(self) -> dict[str, Any]:
        return {**{name: getattr(self, name) for name in self.__dataclass_fields__}, "directory": str(self.directory)}


def list_streams(spool: str | Path, *, pattern: str | None = None, all_epochs: bool = False) -> list[StreamInfo]:
    """All streams by name (``pattern``: shell wildcards), the current epoch of each, or all of them, older ones
    first."""
    root = Path(spool)
    return [describe(root, found) for found in all_streams(root, pattern=pattern, all_epochs=all_epochs)]


def describe(spool: Path, snapshot: StreamSnapshot) -> StreamInfo:
    row = snapshot.row
    holes = [hole for hole in snapshot.holes if hole.end > row.first_offset]
    return StreamInfo(
        name=row.name,
        epoch=row.epoch,
        packet_size=row.packet_size,
        first_offset=row.first_offset,
        stored_bytes=row.durable - row.stored_holes,
        durable_bytes=row.durable - row.stored_holes,
        connected=row.connected,
        created=iso_utc(row.created_unix_ns),
        durable_offset=row.durable,
        held_bytes=stored_bytes(row.first_offset, row.durable, holes),
        holes=len(holes),
        hole_bytes=sum(hole.end - hole.first for hole in holes),
        segments=len(snapshot.segments),
        layout=_layout_name(row),
        current=row.current,
        directory=spool / STREAMS_DIRECTORY / row.directory,
    )


def _layout_name(row: StreamRow) -> str | None:
    try:
        return row.layout.name or None
    except DamageError:
        return "unknown"
