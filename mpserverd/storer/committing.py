"""From synced bytes to an acknowledgement: one transaction, then the words of the rows, then the chunks and bells.

The catalog is written first and the words after it, so that whoever reads either never sees more than what is durable.
Chunks are freed last.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mpserverd.arena.chunks import FREE
from mpserverd.arena.state import FIRST_WORKER_SLOT, Check, Head, HoleKind, Slot, Str
from mpserverd.storer.failures import Failures
from mpserverd.storer.live import Desk
from mpserverd.storer.placing import Work
from mpserverd.storer.sampling import Held, Sample, freeable

_HOLE_WORDS = {HoleKind.DROPPED: "dropped", HoleKind.LOST: "lost"}

I64 = npt.NDArray[np.int64]


class Committing:
    """``commit`` returns False when the catalog could not be written; nothing is published then."""

    def __init__(self, desk: Desk, failures: Failures) -> None:
        self._desk = desk
        self._failures = failures

    def commit(self, works: Sequence[Work], now_unix_ns: int) -> bool:
        positions, published = self._positions(works, now_unix_ns)
        try:
            self._transact(works, positions, now_unix_ns)
        except sqlite3.Error as error:
            self._failures.catalog_failed(error)
            self._failures.put_back(works)
            return False
        self._settle(works)
        self._publish(works, published)
        return True

    def _positions(self, works: Sequence[Work], now_unix_ns: int) -> tuple[list[list[int]], I64]:
        """Values for the catalog, and (end, holes, dropped, lost) a row for the table."""
        rows = [work.stream.row for work in works]
        words = self._desk.state.streams[rows].astype(np.int64)
        end = np.array([work.end for work in works], np.int64)
        dropped, lost = words[:, Str.DROPPED].copy(), words[:, Str.LOST].copy()
        holes = words[:, Str.DURABLE_HOLES].copy()
        for number, work in enumerate(works):
            for first, hole_end, kind in work.holes:
                length = hole_end - first
                holes[number] += length
                (lost if kind == HoleKind.LOST else dropped)[number] += length
        truncated, handshake = words[:, Str.TRUNCATED], words[:, Str.HANDSHAKE]
        record = np.where(words[:, Str.CHECK_SELECT] & 1, Str.CHECK1, Str.CHECK0)
        each = np.arange(len(works))
        columns = (
            np.full(len(works), now_unix_ns, np.int64),
            end,
            holes,
            dropped,
            lost,
            truncated,
            handshake,
            end - lost + truncated + handshake,  # what the socket had given when this was its last durable byte
            words[:, Str.ACKED],
            *(words[each, record + at] for at in (Check.GAPS, Check.MISSING, Check.REPEATS, Check.REORDERED)),
            np.ones(len(works), np.int64),
            np.array([work.stream.catalog_id for work in works], np.int64),
        )
        positions: list[list[int]] = np.column_stack(columns).tolist()
        return positions, np.column_stack((end, holes, dropped, lost))

    def _transact(self, works: Sequence[Work], positions: list[list[int]], now_unix_ns: int) -> None:
        catalog = self._desk.catalog
        begun, closed, holes = [], [], []
        for work in works:
            stream = work.stream.catalog_id
            if work.begun:
                begun += [(stream, file.first) for file in work.begun]
            if work.closed:
                closed += [(file.limit, "sealed", now_unix_ns, stream, file.first) for file in work.closed]
            if work.holes:
                holes += [(stream, first, end, _HOLE_WORDS[HoleKind(kind)]) for first, end, kind in work.holes]
        with catalog.transaction():
            if begun:
                catalog.add_segments(begun)
            if closed:
                catalog.close_segments(closed)
            if holes:
                catalog.add_holes(holes)
            catalog.set_positions(positions)

    def _settle(self, works: Sequence[Work]) -> None:
        """What this process remembers follows what is committed."""
        desk = self._desk
        for work in works:
            stream = work.stream
            stream.segment = work.segment
            stream.failures = 0
            stream.full = False
            if work.holes:
                stream.zeros_below = max(end for _, end, _ in work.holes)
            if work.begun:
                desk.counters.add("segments_created", len(work.begun))
                for file in work.begun:
                    file.in_catalog = True
            for file in work.touched:
                desk.files.used(file)
            for file in work.closed:
                desk.files.close(file)
                desk.resting_bytes += file.limit - file.first
                desk.unsummed = True

    def _publish(self, works: Sequence[Work], published: I64) -> None:
        """STORED before DURABLE, so that stored >= durable at any moment; DURABLE last, because it is the promise."""
        streams = self._desk.state.streams
        rows = [work.stream.row for work in works]
        end, holes, dropped, lost = published.astype(np.uint64).T
        streams[rows, Str.STORED] = end
        streams[rows, Str.STORED_HOLES] = holes
        streams[rows, Str.DROPPED] = dropped
        streams[rows, Str.LOST] = lost
        streams[rows, Str.DURABLE_HOLES] = holes
        streams[rows, Str.DURABLE_MONO_NS] = time.monotonic_ns()
        streams[rows, Str.DURABLE] = end

    # -- chunks and bells

    def free(self, sample: Sample, held: Held) -> int:
        """Free the chunks in which nothing waits. Returns how many."""
        table = self._desk.arena.table
        durable = self._desk.state.streams[sample.rows, Str.DURABLE]
        ours = freeable(sample, held, durable, self._desk.arena.chunk_bytes)
        chunks, words = held.chunks[ours], held.words[ours]
        chunks = chunks[table.words[chunks] == words]
        table.words[chunks] = np.uint64(FREE)
        return len(chunks)


def ring_workers(desk: Desk, doorbells: Sequence[int]) -> None:
    """Wake the workers that want to hear of a commit; ``doorbells`` go by slot."""
    wants = desk.state.slots[FIRST_WORKER_SLOT : FIRST_WORKER_SLOT + len(doorbells), Slot.WANTS]
    for index in np.flatnonzero(wants).tolist():
        ring(doorbells[index])


def supervisor_starves(desk: Desk) -> bool:
    return bool(desk.state.words[Head.STARVING])


def ring(doorbell_fd: int) -> None:
    try:
        os.eventfd_write(doorbell_fd, 1)
    except BlockingIOError:  # its count is full: it rings already
        return
