"""From synced bytes to an acknowledgement: one transaction, then the words of the rows, then the chunks and bells.

The catalog is written first and the words after it, so that whoever reads either never sees more than what is durable.
Chunks are freed last.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mpserverd.arena.chunks import FREE
from mpserverd.arena.state import FIRST_WORKER_SLOT, Check, Head, HoleKind, Slot, Str
from mpserverd.storer.catalog import Position
from mpserverd.storer.failures import Failures
from mpserverd.storer.live import Desk
from mpserverd.storer.placing import Work
from mpserverd.storer.plan import Hole
from mpserverd.storer.sampling import Held, Sample, freeable

_HOLE_WORDS = {HoleKind.DROPPED: "dropped", HoleKind.LOST: "lost"}

_CHECKS = (Check.GAPS, Check.MISSING, Check.REPEATS, Check.REORDERED)
_COLUMNS = [
    Str.DURABLE_HOLES, Str.DROPPED, Str.LOST, Str.ACKED, Str.TRUNCATED, Str.HANDSHAKE, Str.CHECK_SELECT,
    *(Str.CHECK0 + at for at in _CHECKS), *(Str.CHECK1 + at for at in _CHECKS),
]  # fmt: skip


class Reached(NamedTuple):
    """Totals of a stream up to ``end``."""

    end: int
    holes: int
    dropped: int
    lost: int
    truncated: int
    handshake: int
    acked: int
    checks: list[int]

    def position(self, now_unix_ns: int, catalog_id: int) -> Position:
        """Values for the catalog. What the socket had given is derived: these totals must balance by themselves."""
        socket_bytes = self.end - self.lost + self.truncated + self.handshake
        return (
            now_unix_ns,
            *self[:6],
            socket_bytes,
            self.acked,
            *self.checks,
            1,
            catalog_id,
        )


def _with_holes(added: Sequence[Hole], holes: int, dropped: int, lost: int) -> tuple[int, int, int]:
    for first, end, kind in added:
        holes += end - first
        if kind == HoleKind.LOST:
            lost += end - first
        else:
            dropped += end - first
    return holes, dropped, lost


class Committing:
    """``commit`` returns False when the catalog could not be written; nothing is published then."""

    def __init__(self, desk: Desk, failures: Failures) -> None:
        self._desk = desk
        self._failures = failures

    def commit(self, works: Sequence[Work], now_unix_ns: int) -> bool:
        reached = self._reached(works)
        try:
            self._transact(works, reached, now_unix_ns)
        except sqlite3.Error as error:
            self._failures.catalog_failed(error)
            self._failures.put_back(works)
            return False
        self._settle(works)
        self._publish(works, reached)
        return True

    def _reached(self, works: Sequence[Work]) -> list[Reached]:
        """Where each stream stands after this cycle."""
        streams = self._desk.state.streams
        words = streams[[work.stream.row for work in works]][:, _COLUMNS].tolist()
        found = []
        for work, (holes, dropped, lost, acked, truncated, handshake, select, *checks) in zip(
            works, words, strict=True
        ):
            if work.holes:
                holes, dropped, lost = _with_holes(work.holes, holes, dropped, lost)  # noqa: PLW2901
            counts = checks[4:] if select & 1 else checks[:4]
            found.append(Reached(work.end, holes, dropped, lost, truncated, handshake, acked, counts))
        return found

    def _transact(self, works: Sequence[Work], reached: Sequence[Reached], now_unix_ns: int) -> None:
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
            catalog.set_positions(
                [at.position(now_unix_ns, work.stream.catalog_id) for work, at in zip(works, reached, strict=True)]
            )

    def _settle(self, works: Sequence[Work]) -> None:
        """What this process remembers follows what is committed."""
        desk = self._desk
        for work in works:
            stream = work.stream
            stream.segment = work.segment
            stream.begun_limits.clear()
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

    def _publish(self, works: Sequence[Work], reached: Sequence[Reached]) -> None:
        """STORED before DURABLE, so that stored >= durable at any moment; DURABLE last, because it is the promise."""
        words, now_ns = self._desk.state.words, time.monotonic_ns()
        for work, at in zip(works, reached, strict=True):
            base = work.stream.base
            words[base + Str.STORED] = at.end
            if work.holes:
                words[base + Str.STORED_HOLES] = at.holes
                words[base + Str.DROPPED] = at.dropped
                words[base + Str.LOST] = at.lost
                words[base + Str.DURABLE_HOLES] = at.holes
            words[base + Str.DURABLE_MONO_NS] = now_ns
            words[base + Str.DURABLE] = at.end

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
