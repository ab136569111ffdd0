"""Reads the packets of one stream as numpy arrays, while it is being written or long after.

    with open_stream("press-7", spool="/var/lib/mpserverd") as stream:
        for batch in stream.packets():
            if isinstance(batch, Hole): ...             # packets that are not there, and why
            else: use(batch.index, batch.packets)       # a read-only view of the file, nothing copied

Rules: nothing behind the durable offset of the catalog is looked at; what is at the front may be retired meanwhile,
which shows as a hole of kind ``retired``. A stream object sees new packets after ``refresh()``; ``follow()`` does it
by itself. Not for use by several threads at once.

It does not choose or format packets; that is ``times.py``, ``export.py`` and ``text.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from mpserverd.errors import DamageError, SpoolError, StreamNotFoundError
from mpserverd.protocol.layout import PacketLayout
from mpserverd.streams.catalog_file import STREAMS_DIRECTORY
from mpserverd.streams.catalog_view import Hole, StreamRow, StreamSnapshot, find_stream, stream_by_id
from mpserverd.streams.extents import Extent, find_run, split_at_holes, stored_bytes, whole_packets
from mpserverd.streams.segment_files import SegmentFiles
from mpserverd.streams.times import index_at

DEFAULT_SPOOL = "/var/lib/mpserverd"

BATCH_PACKETS = 65_536
CHUNK_BYTES = 1 << 20
FOLLOW_POLL_S_MIN, FOLLOW_POLL_S_MAX = 0.05, 1.0
"""``follow`` looks again this soon after packets came, and at last this rarely when none come."""


class RetiredError(SpoolError):
    """The bytes asked for are gone by retention; the stream now begins at ``first_offset``."""

    def __init__(self, name: str, first_offset: int) -> None:
        super().__init__(
            f"the oldest packets of {name} were retired while they were read; it now begins at {first_offset}"
        )
        self.first_offset = first_offset


@dataclass(frozen=True, eq=False)
class Batch:
    """Consecutive packets: ``packets[0]`` is packet ``index`` of the stream. The array is read-only."""

    index: int
    packets: npt.NDArray[Any]

    @property
    def end_index(self) -> int:
        return self.index + len(self.packets)

    def __len__(self) -> int:
        return len(self.packets)


def open_stream(name: str, *, spool: str | Path = DEFAULT_SPOOL, epoch: str | None = None) -> Stream:
    """Open a stream for reading; ``name@epoch``, or ``epoch``, is an older one of that name. Close it, or use ``with``.

    Raises SpoolError (no spool, no permission), StreamNotFoundError (with the nearest name), LayoutError, DamageError.
    """
    return Stream(Path(spool), find_stream(Path(spool), name, epoch))


class Stream:
    """One stream as of the last ``refresh()``. Offsets are bytes, indexes are packets; both count from the stream's
    start."""

    def __init__(self, spool: Path, snapshot: StreamSnapshot) -> None:
        self.spool = spool
        self._snapshot = snapshot
        self.dtype = snapshot.row.layout.dtype
        self.directory = spool / STREAMS_DIRECTORY / snapshot.row.directory
        self._files = SegmentFiles(self.directory)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Stream {self.row.full_name} packets {self.first_index}:{self.end_index}>"

    def close(self) -> None:
        """Let go of the files. Arrays that were handed out stay valid."""
        self._files.close()

    # --- what is known about it

    @property
    def row(self) -> StreamRow:
        return self._snapshot.row

    @property
    def snapshot(self) -> StreamSnapshot:
        return self._snapshot

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def epoch(self) -> str:
        return self.row.epoch

    @property
    def packet_size(self) -> int:
        return self.row.packet_size

    @property
    def layout(self) -> PacketLayout:
        return self.row.layout

    @property
    def connected(self) -> bool:
        return self.row.connected

    @property
    def first_offset(self) -> int:
        """Offset of the oldest byte that retention has left."""
        return self.row.first_offset

    @property
    def durable_offset(self) -> int:
        """Offset behind the last byte that is on disk for sure; nothing beyond is read."""
        return self.row.durable

    @property
    def durable_bytes(self) -> int:
        """Bytes of the stream that were made durable so far, retired ones too, holes not."""
        return self.row.durable - self.row.stored_holes

    @property
    def held_bytes(self) -> int:
        """Bytes that can be read now."""
        return stored_bytes(self.first_offset, self.durable_offset, self._snapshot.holes)

    @property
    def first_index(self) -> int:
        """Index of the oldest packet that is there as a whole."""
        return -(-self.first_offset // self.packet_size)

    @property
    def end_index(self) -> int:
        """Index of the next packet to come."""
        return max(self.first_index, self.durable_offset // self.packet_size)

    @property
    def count(self) -> int:
        """Packets that can be read: from ``first_index`` to ``end_index`` without those in holes."""
        size = self.packet_size
        return stored_bytes(self.first_index * size, self.end_index * size, self._packet_holes()) // size

    @property
    def holes(self) -> tuple[Hole, ...]:
        """Holes of what retention has left, in stream offsets."""
        return tuple(hole for hole in self._snapshot.holes if hole.end > self.first_offset)

    def refresh(self) -> bool:
        """Ask the catalog again; True when packets came or went. Raises StreamNotFoundError when the stream was
        deleted."""
        return self._refresh(self._snapshot)

    def index_at(self, unix_ns: int) -> int:
        """Index of the first packet that was not yet durable at that time, as exact as the time index: about a
        second."""
        return index_at(self._snapshot, self.directory, unix_ns)

    # --- packets

    def packets(
        self,
        start: int | None = None,
        stop: int | None = None,
        *,
        batch_packets: int = BATCH_PACKETS,
        holes: bool = True,
    ) -> Iterator[Batch | Hole]:
        """Packets [start, stop) in order, in batches of at most ``batch_packets``; ``stop`` beyond the end is the end.

        Where packets are missing a Hole comes instead (unless ``holes`` is False). A batch is a view of the mapped
        file; only packets that straddle two segments are copied. Raises DamageError for bytes that should be there
        and are not.
        """
        size = self.packet_size
        begin = self.first_index if start is None else start
        end = self.end_index if stop is None else min(stop, self.end_index)
        if begin < 0 or batch_packets < 1:
            raise ValueError(f"start is {begin} and batch_packets {batch_packets}; at least 0 and 1 are needed")
        at, limit = begin * size, end * size
        while at < limit:
            try:
                for item in self._items(at, limit):
                    parts = self._batches(item, batch_packets) if isinstance(item, Extent) else (item,)
                    for part in parts:
                        at = part.end if isinstance(part, Hole) else part.end_index * size
                        if holes or isinstance(part, Batch):
                            yield part
            except RetiredError:
                continue  # at is now before the first packet, which the next round says

    def follow(
        self,
        start: int | None = None,
        *,
        batch_packets: int = BATCH_PACKETS,
        holes: bool = True,
        timeout_s: float | None = None,
        wait: Callable[[float], object] | None = None,
    ) -> Iterator[Batch | Hole]:
        """Packets from ``start`` (default: the next one to come) on, waiting for more, for ever.

        With ``timeout_s`` it ends when nothing has come for that long. ``wait(seconds)`` (sleep) is called between
        two looks at the catalog, 0.05 to 1 s apart; to stop it from outside, raise there, or close the generator.
        """
        at = self.end_index if start is None else start
        pause_s, waited_s = FOLLOW_POLL_S_MIN, 0.0
        while True:
            end = self.end_index  # grows inside packets(), when it has to ask the catalog about retention
            if at < end:
                yield from self.packets(at, end, batch_packets=batch_packets, holes=holes)
                at, pause_s, waited_s = end, FOLLOW_POLL_S_MIN, 0.0
            if not self.refresh():
                if timeout_s is not None and waited_s >= timeout_s:
                    return
                (wait or time.sleep)(pause_s)
                waited_s += pause_s
                pause_s = min(2 * pause_s, FOLLOW_POLL_S_MAX)

    def read_bytes(
        self, first_offset: int | None = None, end_offset: int | None = None, *, chunk_bytes: int = CHUNK_BYTES
    ) -> Iterator[memoryview]:
        """The stored bytes of [first_offset, end_offset) without holes, as read-only views of at most ``chunk_bytes``.

        The range is cut to what is there; raises RetiredError when retention takes bytes of it away meanwhile.
        """
        first = max(self.first_offset, 0 if first_offset is None else first_offset)
        end = self.durable_offset if end_offset is None else min(end_offset, self.durable_offset)
        for item in split_at_holes(first, end, self._snapshot.holes):
            at = item.first
            while isinstance(item, Extent) and at < item.end:
                piece = self._piece(at, min(item.end, at + chunk_bytes))
                yield piece
                at += len(piece)

    # --- inside

    def _refresh(self, known: StreamSnapshot | None) -> bool:
        found = stream_by_id(self.spool, self.row.id, known)
        if found is None or found.row.epoch != self.epoch:
            raise StreamNotFoundError(f"stream {self.row.full_name} was deleted from {self.spool}")
        before, self._snapshot = self.row, found
        return (before.first_offset, before.durable) != (found.row.first_offset, found.row.durable)

    def _packet_holes(self) -> list[Hole]:
        return whole_packets(self._snapshot.holes, self.packet_size)

    def _items(self, first: int, end: int) -> Iterator[Extent | Hole]:
        """What there is in [first, end): whole packets and holes; what retention took is a hole too."""
        oldest = min(max(first, self.first_index * self.packet_size), end)
        if first < oldest:
            yield Hole(first, oldest, "retired")
        yield from split_at_holes(oldest, end, self._packet_holes())

    def _batches(self, extent: Extent, batch_packets: int) -> Iterator[Batch]:
        size, dtype, at = self.packet_size, self.dtype, extent.first
        while at < extent.end:
            piece = self._piece(at, min(extent.end, at + batch_packets * size))
            whole = len(piece) // size
            if whole == 0:
                piece, whole = memoryview(self._joined(piece, at, at + size)), 1
            yield Batch(at // size, np.frombuffer(piece, dtype, whole))
            at += whole * size

    def _joined(self, piece: memoryview, at: int, end: int) -> bytes:
        joined = bytes(piece)
        while at + len(joined) < end:
            joined += self._piece(at + len(joined), end)
        return joined

    def _piece(self, first: int, end: int) -> memoryview:
        """Bytes of the stream from ``first`` on, to ``end`` or to the end of the segment."""
        try:
            return self._try_piece(first, end)
        except FileNotFoundError:
            self._refresh(None)
        try:
            return self._try_piece(first, end)
        except FileNotFoundError as error:
            raise DamageError(f"{error.filename} is missing and was not retired; run mpserverctl verify") from None

    def _try_piece(self, first: int, end: int) -> memoryview:
        if first < self.first_offset:
            raise RetiredError(self.name, self.first_offset)
        run = find_run(self._snapshot.segments, first, self.durable_offset)
        return self._files.view(run.segment, first, min(end, run.end))
