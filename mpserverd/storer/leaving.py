"""Streams that end: files cut to their content, last totals committed, chunks freed, accounts moved to GONE, row freed.

Each step may be repeated after a kill. A stream of the catalog is counted from there as soon as its row is gone; what
has no row there (nothing offered, or not stored) goes to the table ``total`` exactly once, by its stream number.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Sequence

import numpy as np

from mpserverd.arena.chunks import FREE
from mpserverd.arena.state import Str, StreamFlag, StreamState
from mpserverd.net.channel import Kind, Message
from mpserverd.storer import sampling
from mpserverd.storer.accounts import GoneBlock, checks_of_row, named_totals, totals_of_record, totals_of_row
from mpserverd.storer.failures import Failures
from mpserverd.storer.filesystem import WholeSync
from mpserverd.storer.live import Desk, LiveStream
from mpserverd.storer.retention import Retention
from mpserverd.storer.segment_file import SegmentFile
from mpserverd.storer.syncing import WHOLE_SYNC_FILES, sync_whole

STREAMS_MAX = 500
"""Seen off at once (0.3 s); those that go on want to be stored meanwhile."""


class Leaving:
    """``finish`` sees off DRAINING streams that have nothing left to write; ``more`` says that some had to wait."""

    def __init__(
        self, desk: Desk, gone: GoneBlock, failures: Failures, retention: Retention, *, sync_wanted: bool
    ) -> None:
        self._desk = desk
        self._gone = gone
        self._failures = failures
        self._retention = retention
        self._sync_wanted = sync_wanted
        self._released = desk.catalog.released()
        self.more = False

    def draining(self) -> list[int]:
        return np.flatnonzero(self._desk.state.streams[:, Str.STATE] == StreamState.DRAINING).tolist()

    def finish(self, rows: Sequence[int], now_s: float) -> int:
        """Returns how many rows were freed; none while the catalog fails."""
        desk = self._desk
        self.more = False
        if now_s < self._failures.catalog_retry_s:
            return 0
        stored: list[LiveStream] = []
        others: list[LiveStream] = []
        for row in rows:
            stream = desk.streams.get(row) or desk.learn(row)
            if not desk.word(stream, Str.FLAGS) & StreamFlag.STORE:
                others.append(stream)
            elif desk.word(stream, Str.DURABLE) == desk.word(stream, Str.OFFERED):
                (stored if stream.catalog_id else others).append(stream)
        more = len(stored) > STREAMS_MAX or len(others) > STREAMS_MAX
        stored, others = stored[:STREAMS_MAX], others[:STREAMS_MAX]
        try:
            if stored:
                self.put_away(stored)
            if others:
                self._release(others)
        except sqlite3.Error as error:
            self._failures.catalog_failed(error)
            return 0
        if stored or others:
            excess = self._retention.excess(stored)
            self._free_rows(stored, others)
            self._retention.ended(excess)
        self.more = more
        return len(stored) + len(others)

    # -- streams with files

    def put_away(self, streams: Sequence[LiveStream]) -> None:
        """Cut their files and commit that they are not connected. Raises sqlite3.Error."""
        desk = self._desk
        now_unix_ns = time.time_ns()
        self._cut(streams, now_unix_ns)
        closed = [
            (desk.word(s, Str.DURABLE), "sealed", now_unix_ns, s.catalog_id, s.segment.first)
            for s in streams
            if s.segment is not None and not s.named
        ]
        with desk.catalog.transaction():
            desk.catalog.set_positions([self._final(stream, now_unix_ns) for stream in streams])
            if closed:
                desk.catalog.close_segments(closed)
        for stream in streams:
            if stream.segment is not None:
                desk.files.close(stream.segment)
                desk.resting_bytes += desk.word(stream, Str.DURABLE) - stream.segment.first
                desk.unsummed = True
                stream.segment = None

    def _final(self, stream: LiveStream, now_unix_ns: int) -> tuple[int, ...]:
        words = self._desk.state.streams[stream.row].tolist()
        return (
            now_unix_ns,
            words[Str.DURABLE],
            words[Str.DURABLE_HOLES],
            words[Str.DROPPED],
            words[Str.LOST],
            words[Str.TRUNCATED],
            words[Str.HANDSHAKE],
            words[Str.SOCKET],
            words[Str.ACKED],
            *checks_of_row(words),
            0,
            stream.catalog_id,
        )

    def _cut(self, streams: Sequence[LiveStream], now_unix_ns: int) -> None:
        """No promise hangs on this: a file that cannot be cut stays longer than its content."""
        changed: list[int] = []
        files: list[SegmentFile] = []
        for stream in streams:
            if stream.early is not None:
                with contextlib.suppress(OSError):  # recovery removes it
                    stream.early.remove()
                stream.early = None
            file = stream.segment
            if file is None:
                continue
            with contextlib.suppress(OSError):
                if file.fd < 0:
                    file.open()
                durable = self._desk.word(stream, Str.DURABLE)
                if file.cut(durable - file.first):
                    files.append(file)
                    changed.append(file.append_index(durable, durable, now_unix_ns))
        self._sync(files, changed)

    def _sync(self, files: Sequence[SegmentFile], indexes: Sequence[int]) -> None:
        desk = self._desk
        if self._sync_wanted and files:
            if len(files) >= WHOLE_SYNC_FILES and desk.filesystem.whole_sync is not WholeSync.NONE:
                with contextlib.suppress(OSError):
                    sync_whole(desk, files[0].fd)
            else:
                for descriptor in [*(file.fd for file in files), *indexes]:
                    with contextlib.suppress(OSError):
                        os.fdatasync(descriptor)
        for descriptor in indexes:
            os.close(descriptor)

    # -- streams without

    def _release(self, streams: Sequence[LiveStream]) -> None:
        catalog = self._desk.catalog
        fresh = [stream for stream in streams if stream.number not in self._released]
        if not fresh:
            return
        with catalog.transaction():
            for stream in fresh:
                catalog.release(stream.number)
                catalog.add_totals(named_totals(self._totals(stream)))
        self._released |= {stream.number for stream in fresh}

    def _totals(self, stream: LiveStream) -> list[int]:
        return totals_of_row(self._desk.state.streams[stream.row].tolist())

    def forget_released(self) -> None:
        """Numbers whose row is free are not needed any more: they are never used again. Raises sqlite3.Error."""
        desk = self._desk
        present = {stream.number for stream in desk.streams.values()}
        done = self._released - present
        if done:
            with desk.catalog.transaction():
                desk.catalog.forget_released(done)
            self._released -= done

    # -- rows

    def _free_rows(self, stored: Sequence[LiveStream], others: Sequence[LiveStream]) -> None:
        desk = self._desk
        everyone = [*stored, *others]
        numbers = np.array([stream.number for stream in everyone], np.uint64)
        desk.arena.table.words[sampling.used_by(desk.arena, numbers)] = np.uint64(FREE)
        moved = [(stream, totals_of_record(r)) for stream in stored if (r := desk.catalog.by_id(stream.catalog_id))]
        moved += [(stream, self._totals(stream)) for stream in others]
        for stream, totals in moved:
            with self._gone.changing():
                self._gone.add(totals)
                desk.state.words[stream.base + Str.STATE] = StreamState.FREE
            del desk.streams[stream.row]
            desk.outbox.append(Message(Kind.FREED, stream.row))
