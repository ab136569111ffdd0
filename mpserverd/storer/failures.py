"""Writes and syncs that failed: the file is finished, the bytes are not.

A file whose write or sync failed is never written again, because a second sync would return 0 although data are gone.
What is durable in it stays readable: it becomes a segment that ends there, state ``aside``. A file without anything
durable is renamed to ``*.aside``. The stream goes on from its durable offset, out of the arena, in a fresh segment.

A full disk is no failure of a file: nothing is acknowledged, and the stream is tried again.
"""

from __future__ import annotations

import errno
import logging
import sqlite3
import time
from collections.abc import Sequence

import numpy as np

from mpserverd.log import MessageId
from mpserverd.log_text import RateLimiter
from mpserverd.storer.advice import advice
from mpserverd.storer.filesystem import NO_SPACE
from mpserverd.storer.live import Desk, LiveStream
from mpserverd.storer.placing import Work
from mpserverd.storer.segment_file import SegmentFile, rename_aside

logger = logging.getLogger(__name__)

FULL_RETRY_S = 0.5
FULL_OVER_S = 2.0
"""The disk is not full any more when nothing was refused for so long: one episode is one pair of lines."""
CATALOG_RETRY_S = 0.2
FAILED_RETRY_S_MIN, FAILED_RETRY_S_MAX, FAILED_DOUBLINGS_MAX = 0.1, 5.0, 10
"""The first failure of a stream is tried again at once, in another file."""


class Failures:
    """``retry_at`` says for each row when it may be tried again (monotonic seconds)."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self.retry_at = np.zeros(desk.state.stream_count)
        self._limiter = RateLimiter(60.0, 10)
        self.catalog_retry_s = 0.0
        """Until then the catalog is not tried again."""
        self._full = desk.counters.get("full_begun") > desk.counters.get("full_over")  # a predecessor said it
        desk.counters.set("full", int(self._full))
        self._full_since_s = self._refused_s = time.monotonic()
        self._why = ""
        """What was refused since the last look and not yet said."""
        self._uncommitted: list[tuple[int, str, int, int, int]] = []
        """Segments that were set aside while the catalog could not be written."""

    def sort_out(self, works: Sequence[Work], now_s: float) -> list[Work]:
        """The works that may be committed; the others are seen to."""
        good = []
        for work in works:
            for part in work.parts:
                if part.error is not None:
                    work.fail(part.error, part.file)
            if work.error is None:
                good.append(work)
            elif work.error.errno in NO_SPACE and not work.sync_failed:
                self._wait_for_space(work, now_s)
            else:
                self._finish_files(work, now_s)
        return good

    def put_back(self, works: Sequence[Work]) -> None:
        """Nothing of these was committed: they find their new files again, by name, as long as they were. The pair that
        was added to a time index is cut before another one is: never are two ahead of the catalog, by which repair
        knows a stale one."""
        for work in works:
            for file in work.touched:
                file.index_mended = False
            for file in work.begun:
                self._desk.files.close(file)
                work.stream.begun_limits[file.first] = file.limit

    # -- full

    def _wait_for_space(self, work: Work, now_s: float) -> None:
        self.put_back([work])
        work.stream.full = True
        self.retry_at[work.stream.row] = now_s + FULL_RETRY_S
        self.refused(str(work.error))

    def refused(self, why: str) -> None:
        """Where retention may make room it gets the time until its next look; otherwise the disk is full now."""
        self._refused_s = time.monotonic()
        self._why = why
        if not self._desk.space.min_free_bytes:
            self.begin_full()

    @property
    def is_full(self) -> bool:
        return self._full

    def begin_full(self) -> bool:
        """Say it once, if something was refused. The ballast goes first: what makes room must be committed. True when
        there was one."""
        desk, why = self._desk, self._why
        self._why = ""
        if not why:
            return False
        dropped = desk.space.drop_ballast()
        if self._full:
            return dropped
        self._full = True
        self._full_since_s = time.monotonic()
        desk.counters.set("full", 1)
        desk.counters.add("full_begun")
        desk.note(
            logger,
            logging.ERROR,
            "spool full: nothing more is stored",
            MessageId.SPOOL_FULL,
            free_bytes=desk.space.free_bytes,
            min_free_bytes=desk.space.min_free_bytes,
            why=why,
            next=f"free space on the file system of {desk.streams_path}, "
            "or lower [spool] max_bytes, max_age_s or min_free_bytes",
        )
        return dropped

    def room_was_made(self) -> None:
        """By retention: whoever waits need not wait longer, and what was refused is no full disk."""
        self._why = ""
        self.try_again()

    def end_full(self) -> None:
        """Once a second: say that it is over when no stream waits any more, and nothing was refused for a while."""
        desk, now_s = self._desk, time.monotonic()
        if not self._full or any(stream.full for stream in desk.streams.values()):
            return
        if now_s - self._refused_s < FULL_OVER_S:
            return
        self._full = False
        desk.counters.set("full", 0)
        desk.counters.add("full_over")
        desk.note(
            logger,
            logging.WARNING,
            "spool has room again",
            MessageId.SPOOL_RELIEVED,
            free_bytes=desk.space.free_bytes,
            lasted_s=round(now_s - self._full_since_s, 1),
        )

    def try_again(self) -> None:
        """Whoever waits for room need not wait longer."""
        for stream in self._desk.streams.values():
            if stream.full:
                self.retry_at[stream.row] = 0.0

    # -- failed

    def _finish_files(self, work: Work, now_s: float) -> None:
        desk, stream, error = self._desk, work.stream, work.error
        assert error is not None
        desk.counters.add("write_errors")
        suppressed = self._limiter.admit(now_s)
        if suppressed is not None:
            desk.note(
                logger,
                logging.ERROR,
                "write failed: the bytes are kept and go to another file",
                MessageId.WRITE_FAILED,
                stream=stream.name,
                offset=work.durable,
                bytes=work.end - work.durable,
                error=advice(error),
                suppressed=suppressed,
            )
        self.put_back([work])
        for file in work.bad:
            self._set_aside(stream, file, work.durable)
        stream.failures += 1
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            stream.directory_synced = False  # whoever took it away: it is made again
        doublings = min(stream.failures, FAILED_DOUBLINGS_MAX)  # a disk may fail for days: no float holds 2**1024
        wait_s = 0.0 if stream.failures == 1 else min(FAILED_RETRY_S_MAX, FAILED_RETRY_S_MIN * 2**doublings)
        self.retry_at[stream.row] = now_s + wait_s

    def _set_aside(self, stream: LiveStream, file: SegmentFile, durable: int) -> None:
        desk = self._desk
        desk.files.close(file)
        file.mend_index(durable)
        stream.begun_limits.pop(file.first, None)
        if file is stream.segment:
            stream.segment = None
        path = file.path
        if file.in_catalog and durable > file.first:
            self._uncommitted.append((durable, "aside", time.time_ns(), stream.catalog_id, file.first))
            desk.resting_bytes += durable - file.first
            self.commit()
        else:
            try:
                path = rename_aside(path)
            except OSError:  # no other stream is to suffer; this one does not go on before its name is free
                stream.in_the_way = path
        desk.counters.add("segments_aside")
        desk.note(
            logger,
            logging.WARNING,
            "segment set aside",
            MessageId.SEGMENT_ASIDE,
            stream=stream.name,
            file=path,
            readable_below=durable,
        )

    def commit(self) -> bool:
        """Have the catalog know which segments are finished. Nothing is written before it does."""
        if not self._uncommitted:
            return True
        try:
            with self._desk.catalog.transaction():
                self._desk.catalog.close_segments(self._uncommitted)
        except sqlite3.Error as error:
            self.catalog_failed(error)
            return False
        self._uncommitted.clear()
        return True

    def catalog_failed(self, error: sqlite3.Error) -> bool:
        """The catalog could not be written: nothing is acknowledged, everything is tried again. True when it got the
        ballast's place now, which a stranger may take soon."""
        desk = self._desk
        self.catalog_retry_s = time.monotonic() + CATALOG_RETRY_S
        if desk.space.is_reason_of(error):
            self.refused(f"catalog: {error}")
            return self.begin_full()  # retention needs the catalog too
        desk.counters.add("write_errors")
        suppressed = self._limiter.admit(time.monotonic())
        if suppressed is not None:
            desk.note(
                logger,
                logging.ERROR,
                "catalog not written: nothing is acknowledged until it is",
                MessageId.WRITE_FAILED,
                catalog=desk.catalog.path,
                error=error,
                suppressed=suppressed,
            )
        return False
