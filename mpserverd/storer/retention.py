"""What is removed when the spool is too big, too old, or the disk too full: whole segments, the oldest first.

The new first offset is committed before a file is unlinked, so that no reader is sent to a file that is gone; a kill in
between leaves a file below its stream's first offset, which recovery removes. The segment that is being written stays.
A stream without a name of its own (made up from peer and time) goes from the catalog with its last segment; its totals
stay.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Sequence

from mpserverd import log
from mpserverd.arena.state import Gone, Str
from mpserverd.log import MessageId
from mpserverd.storer import sidecar
from mpserverd.storer.accounts import GoneBlock, named_totals, totals_of_record
from mpserverd.storer.catalog import SegmentRecord, StreamRecord
from mpserverd.storer.failures import Failures
from mpserverd.storer.live import Desk, LiveStream
from mpserverd.storer.plan import overlap
from mpserverd.storer.segment_file import index_name, segment_name
from mpserverd.streams.sidecar import holes_name

logger = logging.getLogger(__name__)

Excess = tuple[int, int]
"""(stream, bytes over its own limit)."""

SEGMENTS_MAX = 512
"""Retired in one pass; the next one is a second later."""
ALL_STREAMS_INTERVAL_S = 60.0
"""Streams that are not connected do not grow; they are cut when they end, and held against their limit so often for
one that changed."""


@dataclasses.dataclass(slots=True)
class _Gone:
    """What one stream gives up."""

    record: StreamRecord
    segments: list[SegmentRecord]
    bytes: int
    first_offset: int = 0
    whole: bool = False


class Retention:
    """``apply`` once a second. ``spool_bytes`` is what all segments take."""

    def __init__(self, desk: Desk, gone: GoneBlock, failures: Failures) -> None:
        self._desk = desk
        self._gone = gone
        self._failures = failures
        self._next_all_s = 0.0
        self.retired_bytes = 0
        """By this process."""
        self._limits = {client.id: client.max_spool_bytes for client in desk.config.clients if client.max_spool_bytes}

    def spool_bytes(self) -> int:
        """Content of finished segments and place allocated for those that are written."""
        desk = self._desk
        files = [f for s in desk.streams.values() for f in (s.segment, s.early) if f is not None]
        return desk.resting_bytes + sum(file.allocated for file in files)

    def content_bytes(self) -> int:
        """What has been stored in all segments, whatever is allocated ahead."""
        desk = self._desk
        written = [s for s in desk.streams.values() if s.segment is not None]
        return desk.resting_bytes + sum(desk.word(s, Str.DURABLE) - s.segment.first for s in written if s.segment)

    def may_grow_bytes(self, stored_per_s: float) -> int | None:
        """By how much all content may still grow before retention holds it at a limit. None: there is no limit."""
        desk, bounds = self._desk, []
        if desk.spool.max_bytes:
            bounds.append(desk.spool.max_bytes - self.content_bytes())
        if desk.spool.max_age_s:
            bounds.append(round(stored_per_s * desk.spool.max_age_s) - self.content_bytes())
        left = [self._left(stream) for stream in desk.streams.values()] if self._has_own_limits else [None]
        if left and None not in left:
            bounds.append(sum(each for each in left if each))
        return max(0, min(bounds)) if bounds else None

    def _left(self, stream: LiveStream) -> int | None:
        """How much a stream in the table may still grow; None: as it likes."""
        return max(0, -self._over(stream)) if self._limit(stream.name, named=stream.named) else None

    def apply(self, now_s: float, now_unix_ns: int) -> int:
        """Retire what is too much. Returns the bytes given back."""
        return self._try_retire(lambda: [*self._too_old(now_unix_ns), *self._over_own_limit(now_s), *self._over_all()])

    def excess(self, streams: Sequence[LiveStream]) -> list[Excess]:
        """Which of the streams hold more than they may, while their rows still say so."""
        if not self._has_own_limits:
            return []
        return [(s.catalog_id, over) for s in streams if s.catalog_id and (over := self._over(s)) > 0]

    def ended(self, excess: Sequence[Excess]) -> None:
        """These streams just left the table: nobody looks at them every second any more, so they are cut now."""
        self._try_retire(lambda: [segment for stream, over in excess for segment in self._oldest(stream, over)])

    def _try_retire(self, choose: Callable[[], Sequence[SegmentRecord]]) -> int:
        """Choosing reads the catalog, which may fail as writing to it may. In the ballast's place it is tried again at
        once, before a stranger takes that."""
        try:
            chosen = choose()
            return self._retire(chosen) if chosen else 0
        except sqlite3.Error as error:
            return self._try_retire(choose) if self._failures.catalog_failed(error) else 0

    @property
    def out_of_reach_bytes(self) -> int:
        """What would be missing to ``min_free_bytes`` without any finished segment. Then none goes for it: it would be
        lost for nothing."""
        space = self._desk.space
        if not space.min_free_bytes:
            return 0
        return max(0, space.min_free_bytes - space.free_bytes - space.leaving_bytes - max(0, self._desk.resting_bytes))

    # -- choosing

    def _too_old(self, now_unix_ns: int) -> list[SegmentRecord]:
        max_age_s = self._desk.spool.max_age_s
        if not max_age_s:
            return []
        before_ns = now_unix_ns - int(max_age_s * 1e9)
        return [s for s in self._desk.catalog.finished_segments(SEGMENTS_MAX) if s.closed_unix_ns < before_ns]

    def _over_own_limit(self, now_s: float) -> list[SegmentRecord]:
        desk = self._desk
        if not self._has_own_limits:
            return []
        chosen = []
        for stream, over in self.excess(list(desk.streams.values())):
            chosen += self._oldest(stream, over)
        if now_s >= self._next_all_s:
            live = {stream.catalog_id for stream in desk.streams.values()}
            for record in desk.catalog.streams():
                limit = self._limit(record.name, named=bool(record.named))
                if limit and record.id not in live:
                    chosen += self._oldest(record.id, record.durable - record.first_offset - limit)
            self._next_all_s = now_s + ALL_STREAMS_INTERVAL_S
        return chosen

    @property
    def _has_own_limits(self) -> bool:
        return bool(self._limits or self._desk.spool.max_bytes_per_stream)

    def _over(self, stream: LiveStream) -> int:
        """By how many bytes a stream in the table is over its own limit."""
        desk, limit = self._desk, self._limit(stream.name, named=stream.named)
        return desk.word(stream, Str.DURABLE) - desk.word(stream, Str.FIRST_OFFSET) - limit if limit else 0

    def _limit(self, name: str, *, named: bool) -> int:
        own = self._limits.get(name, 0) if named else 0
        return own or self._desk.spool.max_bytes_per_stream

    def _oldest(self, stream: int, too_much: int) -> list[SegmentRecord]:
        """By offsets, as the limit is: a hole between two segments goes with the first, and may be enough."""
        catalog = self._desk.catalog
        record = catalog.by_id(stream) if too_much > 0 else None
        if record is None:
            return []
        first_kept = record.first_offset + too_much
        return [s for s in catalog.finished_segments(SEGMENTS_MAX, stream=stream) if s.first < first_kept]

    def _over_all(self) -> list[SegmentRecord]:
        desk = self._desk
        too_much = 0 if self.out_of_reach_bytes else desk.space.short_bytes
        if desk.spool.max_bytes:
            too_much = max(too_much, self.spool_bytes() - desk.spool.max_bytes)
        return _enough(desk.catalog.finished_segments(SEGMENTS_MAX), too_much) if too_much > 0 else []

    # -- doing it

    def _retire(self, chosen: Iterable[SegmentRecord]) -> int:
        """Commit, publish, then unlink. Raises sqlite3.Error before anything has changed."""
        desk = self._desk
        by_stream: dict[int, int] = {}
        for segment in chosen:
            by_stream[segment.stream] = max(by_stream.get(segment.stream, 0), segment.end or 0)
        leaving: list[_Gone] = [
            entry for stream, end in by_stream.items() if (entry := self._leaving(stream, end)) is not None
        ]
        live = {stream.catalog_id: stream for stream in desk.streams.values()}
        with desk.catalog.transaction():
            for entry in leaving:
                self._commit(entry, is_live=entry.record.id in live)
        given_back = 0
        for entry in leaving:
            self._publish(entry, live.get(entry.record.id))
            given_back += self._unlink(entry)
        self.retired_bytes += given_back
        log.event(
            logger,
            logging.INFO,
            "segments retired",
            message_id=MessageId.SEGMENTS_RETIRED,
            streams=len(leaving),
            segments=sum(len(entry.segments) for entry in leaving),
            bytes=given_back,
        )
        return given_back

    def _leaving(self, stream: int, end: int) -> _Gone | None:
        """All finished segments of a stream up to ``end``: a prefix, whatever the clock said when they were closed."""
        catalog = self._desk.catalog
        record = catalog.by_id(stream)
        segments = [s for s in catalog.finished_segments(1 << 30, stream=stream) if s.end is not None and s.end <= end]
        if record is None or not segments:
            return None
        holes = catalog.holes(stream)
        stored = sum(s.end - s.first - overlap(holes, s.first, s.end) for s in segments if s.end is not None)
        return _Gone(record, segments, stored)

    def _commit(self, entry: _Gone, *, is_live: bool) -> None:
        catalog, record = self._desk.catalog, entry.record
        catalog.remove_segments([(record.id, segment.first) for segment in entry.segments])
        left = catalog.segments(record.id)
        entry.first_offset = max(record.first_offset, left[0].first if left else record.durable)
        catalog.retire([(entry.first_offset, entry.bytes, record.id)])
        entry.whole = not left and not is_live and not record.named
        if not left and not entry.whole:
            self._note_start(record.id)
        if entry.whole:
            record = dataclasses.replace(record, retired=record.retired + entry.bytes)
            catalog.add_totals(named_totals(totals_of_record(record)))
            catalog.remove_stream(record.id)
            with contextlib.suppress(OSError):  # then it is set aside, should it outlive us
                sidecar.retire(self._desk.path_of(record.directory))

    def _note_start(self, stream: int) -> None:
        """No segment says any more how far the stream was: its identity does, for repair."""
        record = self._desk.catalog.by_id(stream)
        if record is not None:
            with contextlib.suppress(OSError):
                path = self._desk.path_of(record.directory)
                sidecar.put(path, sidecar.identity_of(record))
                sidecar.sync(path)

    def _publish(self, entry: _Gone, stream: LiveStream | None) -> None:
        words = self._desk.state.words
        if stream is None:
            with self._gone.changing():
                self._gone.add_one(Gone.RETIRED_BYTES, entry.bytes)
        else:
            words[stream.base + Str.RETIRED] += entry.bytes
            words[stream.base + Str.FIRST_OFFSET] = entry.first_offset

    def _unlink(self, entry: _Gone) -> int:
        desk = self._desk
        path = desk.path_of(entry.record.directory)
        size = 0
        for segment in entry.segments:
            length = (segment.end or 0) - segment.first
            size += length
            desk.to_unlink.append((os.path.join(path, segment_name(segment.first)), length))
            desk.to_unlink.append((os.path.join(path, index_name(segment.first)), 0))
            if entry.record.stored_holes:
                desk.to_unlink.append((os.path.join(path, holes_name(segment.first)), 0))
        if entry.whole:
            desk.to_unlink.append((os.path.join(path, ""), 0))  # the directory
        desk.resting_bytes -= size
        desk.space.leaving_bytes += size
        desk.counters.add("segments_retired", len(entry.segments))
        log.event(
            logger,
            logging.DEBUG,
            "segments of a stream retired",
            stream=entry.record.name,
            segments=len(entry.segments),
            bytes=size,
            first_offset=entry.first_offset,
        )
        return size


def _enough(segments: Sequence[SegmentRecord], wanted_bytes: int) -> list[SegmentRecord]:
    """As many of the first as give back so much."""
    chosen = []
    for segment in segments:
        if wanted_bytes <= 0:
            break
        chosen.append(segment)
        wanted_bytes -= (segment.end or 0) - segment.first
    return chosen
