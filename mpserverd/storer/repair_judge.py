"""What a stream is, judged from its directory and from what the old catalog says of it. Nothing is changed here.

Where a stream ends: a catalog that is whole, and that no time index contradicts, is believed. Else it is the end of the
bytes that were really written: data without a gap from the last offset that is proven durable (one time index entry
after another, or a commit), up to the last byte that is not zero, rounded up to a packet, or to what the time index
names (a packet of zeros at the end is always in the index). So it is never before what was acknowledged; a little that
was written and not yet acknowledged may be in it, whole.

What is missing below the end becomes a hole, kind ``lost``. Offsets are never used again for other packets.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from mpserverd.storer.catalog import StreamRecord
from mpserverd.storer.index_tail import ahead
from mpserverd.storer.plan import overlap
from mpserverd.storer.repair_salvage import KnownSegment
from mpserverd.storer.repair_scan import Scanned, SegmentOnDisk, merged, whole_data_end, written_end
from mpserverd.streams.sidecar import HoleRow, Identity

_EPOCH_SUFFIX = re.compile(r"(.+)@([0-9a-f]{16})(\.\d+)?")
LOST = "lost"


@dataclass
class Known:
    """What the old catalog says of a stream; ``trusted``: all of it is whole."""

    record: StreamRecord | None = None
    updated_unix_ns: int = 0
    segments: dict[int, KnownSegment] = field(default_factory=dict)
    holes: list[HoleRow] = field(default_factory=list)
    trusted: bool = False


@dataclass
class Rebuilt:
    """A stream as it will be in the catalog. ``cut_at`` (first, length, bytes written behind): its last file is cut.

    ``aside`` are names in its directory. ``notes`` are for people. ``changed``: the old catalog says something else.
    """

    record: StreamRecord
    updated_unix_ns: int
    segments: list[KnownSegment]
    holes: list[HoleRow]
    notes: list[str] = field(default_factory=list)
    aside: list[str] = field(default_factory=list)
    cut_at: tuple[int, int, int] | None = None
    lost_bytes: int = 0
    cut_bytes: int = 0
    changed: bool = False


def guessed_identity(name: str, packet_size: int, epoch: str, created_unix_ns: int) -> Identity:
    """For a directory that says nothing: the name is the directory's, the epoch is new unless it is in that."""
    older = _EPOCH_SUFFIX.fullmatch(name)
    text, epoch = (older[1], older[2]) if older else (name, epoch)
    return Identity(0, unquote(text), epoch, packet_size, None, True, created_unix_ns, 0)


def identity_of_record(record: StreamRecord) -> Identity:
    return Identity(
        record.id,
        record.name,
        record.epoch,
        record.packet_size,
        record.layout,
        bool(record.named),
        record.created_unix_ns,
        record.first_offset,
    )


def judge(found: Scanned, identity: Identity, known: Known, bad: Sequence[int] = ()) -> Rebuilt:
    """``bad`` are first offsets of segments whose content is not what it was: they are set aside. Raises OSError."""
    return _Judging(found, identity, known, set(bad)).result()


class _Judging:
    def __init__(self, found: Scanned, identity: Identity, known: Known, bad: set[int]) -> None:
        self._found = found
        self._identity = identity
        self._known = known
        self._notes: list[str] = list(found.faults)
        self._aside: list[str] = list(found.aside)
        self._cut_bytes = 0
        for first in sorted(bad):
            self._notes.append(f"segment {first} had other content than when it was sealed: set aside")
            self._set_aside(first)
        found.segments = [segment for segment in found.segments if segment.first not in bad]
        self._trusted = self._is_trusted()
        self._holes = merged(known.holes if self._trusted else [*known.holes, *found.holes])
        self._drop_leftovers()
        self._drop_strays()
        self._first = self._first_offset()
        self._end = self._find_end()

    # -- where it begins and ends

    def _is_trusted(self) -> bool:
        record = self._known.record
        if record is None or not self._known.trusted:
            return False
        return len(ahead(self._found.offsets(), record.durable)) < 2

    def _drop_leftovers(self) -> None:
        """Files that retention had given up already: the daemon removes them."""
        record = self._known.record
        if record is None:
            return
        listed = self._known.segments
        self._found.segments = [s for s in self._found.segments if s.first >= record.first_offset or s.first in listed]

    def _drop_strays(self) -> None:
        """A storer that is killed before its commit leaves the file that it had begun, and its successor may put the
        bytes into the one before. A catalog that is believed says which of the two has them."""
        record = self._known.record
        if record is None or not self._trusted:
            return
        listed = [(s.first, record.durable if s.end is None else s.end) for s in self._known.segments.values()]
        kept = []
        for segment in self._found.segments:
            if any(first < segment.first < end for first, end in listed) and segment.first not in self._known.segments:
                self._notes.append(f"segment {segment.first} lies within another, and was never committed: set aside")
                self._set_aside(segment.first)
            else:
                kept.append(segment)
        self._found.segments = kept

    def _first_offset(self) -> int:
        record, segments = self._known.record, self._found.segments
        if self._trusted and record is not None:
            return record.first_offset
        lowest = segments[0].first if segments else max([self._identity.start, *self._proofs()])
        if record is not None and lowest <= record.first_offset:
            return record.first_offset
        if lowest > (record.first_offset if record is not None else self._identity.start):
            self._notes.append(f"what was before offset {lowest} is not there: taken for retired")
        return lowest

    def _proofs(self) -> list[int]:
        """Offsets that were durable for sure."""
        proofs = self._found.offsets()[:-1][-1:]
        return [*proofs, self._known.record.durable] if self._known.record is not None else proofs

    def _find_end(self) -> int:
        record = self._known.record
        if self._trusted and record is not None:
            return record.durable
        found, size = self._found, self._identity.packet_size
        proven = max([self._first, *self._proofs()])
        whole = whole_data_end(found, proven, self._holes)
        named = found.offsets()[-1:]
        written = written_end(found, proven, whole)
        end = min(whole, max(proven, written + -written % size, *named))
        end = max([end, *(stop for first, stop, _ in self._holes if first <= end)])
        end = max(proven, end - end % size)
        if record is None or end != record.durable:
            unsure = f"; the last {end - proven} bytes may not have been acknowledged" if end > proven else ""
            self._notes.append(f"ends at offset {end}, by its files{unsure}")
        return end

    # -- what it consists of

    def result(self) -> Rebuilt:
        segments = self._segments()
        self._drop_orphans({segment.first for segment in segments})
        lost = self._lost(segments)
        lost_bytes = sum(end - first for first, end, _ in lost)
        if lost_bytes:
            self._notes.append(f"{lost_bytes} bytes are missing: a hole, kind lost")
        holes = [hole for hole in merged([*self._holes, *lost]) if hole[1] > self._first and hole[0] < self._end]
        record = self._record(holes)
        last = self._found.segments[-1] if self._found.segments else None
        updated = self._known.updated_unix_ns if self._trusted else (last.mtime_ns if last else 0)
        return Rebuilt(
            record=record,
            updated_unix_ns=updated,
            segments=segments,
            holes=holes,
            notes=self._notes,
            aside=self._aside,
            cut_at=self._cut(segments),
            lost_bytes=lost_bytes,
            cut_bytes=self._cut_bytes,
            changed=self._differs(record, segments, holes),
        )

    def _segments(self) -> list[KnownSegment]:
        there = [
            segment for segment in self._found.segments if segment.first < self._end or segment.first == self._first
        ]
        for segment in self._found.segments:
            if segment not in there:
                self._behind(segment)
        self._found.segments = there
        rows = []
        for number, segment in enumerate(there):
            limit = there[number + 1].first if number + 1 < len(there) else self._end
            rows.append(self._row(segment, limit, is_last=number + 1 == len(there)))
        return rows

    def _drop_orphans(self, firsts: set[int]) -> None:
        """What lies beside a segment that is not there any more."""
        for first in sorted(self._found.beside - firsts):
            if self._first <= first < self._end:
                self._set_aside(first)

    def _behind(self, segment: SegmentOnDisk) -> None:
        """Begun, and not committed when everything ended."""
        written = written_end(self._found, segment.first, segment.first + segment.size) - segment.first
        self._cut_bytes += written
        self._notes.append(f"segment {segment.first} lies behind the end: set aside")
        self._set_aside(segment.first)

    def _row(self, segment: SegmentOnDisk, limit: int, *, is_last: bool) -> KnownSegment:
        there = segment.first + segment.size
        end = min(limit, there)
        known = self._known.segments.get(segment.first)
        if known is not None and known.end is not None and known.end <= min(limit, there):
            return known
        if self._unexplained(end, limit):
            self._notes.append(f"segment {segment.first} is short: {segment.size} bytes of {limit - segment.first}")
        if is_last and end == limit and self._identity.named and (known is None or known.end is None):
            return known or KnownSegment(segment.first, None, "open", None, 0)
        state = "aside" if segment.size > end - segment.first and not is_last else "sealed"
        return KnownSegment(segment.first, end, state, None, segment.mtime_ns)

    def _lost(self, segments: Sequence[KnownSegment]) -> list[HoleRow]:
        """What no file has and no hole explains."""
        lost: list[HoleRow] = []
        at = self._first
        for segment in [*segments, KnownSegment(self._end, self._end, "", None, 0)]:
            if segment.first > at:
                lost += self._unexplained(at, segment.first)
            at = max(at, self._end if segment.end is None else segment.end)
        return lost

    def _unexplained(self, first: int, end: int) -> list[HoleRow]:
        found, at = [], first
        for start, stop, _ in self._holes:
            if stop <= at or start >= end:
                continue
            if start > at:
                found.append((at, start, LOST))
            at = max(at, stop)
        return [*found, (at, end, LOST)] if at < end else found

    def _cut(self, segments: Sequence[KnownSegment]) -> tuple[int, int, int] | None:
        """The last file ends with the stream, so that what lies behind is never taken for packets."""
        if not segments:
            return None
        last = next(segment for segment in self._found.segments if segment.first == segments[-1].first)
        length = self._end - last.first
        if last.size <= length:
            return None
        behind = written_end(self._found, self._end, last.first + last.size) - self._end
        self._cut_bytes += behind
        return last.first, length, behind

    # -- its row

    def _record(self, holes: Sequence[HoleRow]) -> StreamRecord:
        identity, old = self._identity, self._known.record
        if old is None:
            self._notes.append("its counters (gaps, truncated and retired bytes) are not known and begin anew")
        values: dict[str, Any] = {name: getattr(old, name) if old else 0 for name in StreamRecord.__dataclass_fields__}
        before = [hole for hole in self._known.holes if hole[1] > self._first]
        lost = _bytes(holes, lost=True) - _bytes(before, lost=True)
        dropped = _bytes(holes, lost=False) - _bytes(before, lost=False)
        values.update(
            id=old.id if old else identity.number,
            name=identity.name,
            epoch=identity.epoch,
            directory=self._found.name,
            packet_size=identity.packet_size,
            layout=identity.layout,
            created_unix_ns=identity.created_unix_ns,
            connected=0,
            named=int(identity.named),
            first_offset=self._first,
            durable=self._end,
            stored_holes=values["stored_holes"] + lost + dropped,
            dropped=values["dropped"] + dropped,
            lost=values["lost"] + lost,
        )
        start = old.first_offset if old else 0
        values["retired"] += self._first - start - overlap([hole[:2] for hole in self._known.holes], start, self._first)
        values["socket"] = values["durable"] - values["lost"] + values["truncated"] + values["handshake"]
        return StreamRecord(**values)

    def _differs(self, record: StreamRecord, segments: Sequence[KnownSegment], holes: Sequence[HoleRow]) -> bool:
        if self._aside:
            return True
        old = self._known
        same_rows = list(segments) == [old.segments[first] for first in sorted(old.segments)]
        same_holes = [h for h in sorted(old.holes) if h[1] > self._first] == list(holes)
        if old.record is None or not same_rows or not same_holes:
            return True
        now, before = record, old.record
        fields = ("durable", "first_offset", "name", "epoch", "packet_size", "layout", "directory")
        return any(getattr(now, name) != getattr(before, name) for name in fields)

    def _set_aside(self, first: int) -> None:
        for suffix in (".seg", ".idx", ".holes"):
            name = f"{first:020d}{suffix}"
            if name not in self._aside and os.path.lexists(os.path.join(self._found.path, name)):
                self._aside.append(name)


def _bytes(holes: Sequence[HoleRow], *, lost: bool) -> int:
    return sum(end - first for first, end, kind in holes if (kind == LOST) == lost)
