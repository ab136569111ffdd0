"""One cycle: sample, look up chunks, write, sync, commit, publish, free. In this order and no other.

What a kill leaves at any instant: bytes behind the durable offset, which are written again with the same content; or a
commit that was not published, which the successor finds in the catalog. Only chunks whose bytes are committed are
freed. A stream whose write or sync failed is left out of the commit (failures.py).
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from mpserverd.arena.chunks import USED
from mpserverd.arena.state import FIRST_WORKER_SLOT, Slot, Wants
from mpserverd.config.schema import Sync
from mpserverd.storer import plan, sampling
from mpserverd.storer.committing import Committing
from mpserverd.storer.failures import Failures
from mpserverd.storer.filesystem import BLOCK_BYTES
from mpserverd.storer.live import Desk
from mpserverd.storer.opening import Opening
from mpserverd.storer.placing import Placing, Work
from mpserverd.storer.sampling import Held, Index, Sample
from mpserverd.storer.syncing import Syncing
from mpserverd.storer.writer import Part, PartWriter, Threads

T = TypeVar("T")

STREAM_BYTES_MAX = 64 << 20
"""Of one stream in one cycle: the arena gets chunks back while the rest is written."""
PATIENCE_S = 1.0
"""So long less than a block waits, so that 4 KiB are not written for each 160 bytes."""
THREADS_BYTES = 1 << 20
"""With less to write the threads cost more than they save: 10 x 16 KiB take 0.4 ms of CPU without, 1 ms with them."""
SLOW_WRITE_S = 0.001
"""But a device that takes so long for one write is asked by several at a time."""
BATCH_PARTS_MAX = 32
BEGIN_MAX = 500
"""Streams that get their directory and first file in one cycle (0.2 s): the others shall not wait for 10,000."""
INDEX_PAIRS_PER_S = 1000
"""A stream gets a pair at most once a second, all together so many: with 10,000 streams each has one in ten seconds."""


class Cycle:
    """The caller samples, asks which streams are ``ripe``, and runs."""

    def __init__(self, desk: Desk, opening: Opening, failures: Failures) -> None:
        self._desk = desk
        self._opening = opening
        self._failures = failures
        self._threads = Threads()
        self._writer = PartWriter(desk.arena.data)
        self._placing = Placing(desk)
        self._syncing = Syncing(desk, wanted=desk.spool.sync is Sync.DURABLE)
        self._committing = Committing(desk, failures)
        self._since = np.zeros(desk.state.stream_count)
        self._write_s = 0.0
        """Recent time of one small write."""
        self.written_bytes = 0
        self.more = False
        """The last cycle left bytes behind only because it had enough to do."""

    @property
    def segment_bytes(self) -> int:
        """Length of new segments."""
        return self._placing.segment_bytes

    # -- what to do

    def ripe(self, sample: Sample, now_s: float, *, urgent: bool) -> Index:
        """Indices in the sample of the streams that are written now."""
        pending = sample.pending
        since = self._since[sample.rows]
        self._since[sample.rows] = np.where(pending, np.where(since == 0, now_s, since), 0)
        if not urgent:
            a_block = sample.offered - sample.durable >= np.uint64(BLOCK_BYTES)
            long_ago = (since != 0) & (now_s - since >= PATIENCE_S)
            pending &= a_block | long_ago | sample.draining
        pending &= self._failures.retry_at[sample.rows] <= now_s
        if now_s < self._failures.catalog_retry_s:
            pending[:] = False
        begin = np.flatnonzero(pending & ~sample.begun)
        pending[begin[BEGIN_MAX:]] = False
        ripe = np.flatnonzero(pending)
        most = max(1, self._desk.files.count_max // 2)
        self.more = len(ripe) > most or len(begin) > BEGIN_MAX
        return ripe[np.argsort(self._since[sample.rows[ripe]])][:most] if len(ripe) > most else ripe

    def pressed(self) -> bool:
        """Some worker's stream has half of what it may hold waiting, or half of the arena is in use."""
        desk, table = self._desk, self._desk.arena.table
        if (desk.state.slots[FIRST_WORKER_SLOT:, Slot.WANTS] & np.uint64(Wants.PRESSURE)).any():
            return True
        return int(np.count_nonzero((table.words & np.uint64(3)) == USED)) * 2 > table.count

    # -- doing it

    def run(self, sample: Sample, ripe: Index, now_s: float) -> int:
        """Returns how many chunks were freed."""
        began_ns = time.monotonic_ns()
        now_unix_ns = time.time_ns()
        freed = 0
        held = sampling.held_chunks(sample, self._desk.arena)
        works = self._begin(self._plan(sample, held, ripe), now_unix_ns)
        if works and self._failures.commit():
            self._place(works)
            self._write(works, now_s, now_unix_ns)
            self._syncing.sync(works)
            good = self._failures.sort_out(works, now_s)
            if good and self._committing.commit(good, now_unix_ns):
                self._since[[work.stream.row for work in good]] = 0
                freed = self._committing.free(sample, held)
        self._desk.files.trim()
        self._count(time.monotonic_ns() - began_ns)
        return freed

    def _plan(self, sample: Sample, held: Held, ripe: Index) -> list[Work]:
        desk = self._desk
        self._writer.chunks, low, high = sampling.list_chunks(sample, held, ripe, desk.arena)
        durable, offered = sample.durable[ripe].tolist(), sample.offered[ripe].tolist()
        holes = sample.holes[ripe].tolist() if sample.holes[ripe].any() else [[0] * 6] * len(ripe)
        works: list[Work] = []
        for number, row in enumerate(sample.rows[ripe].tolist()):
            stream = desk.streams.get(row) or desk.learn(row)
            found = plan.published_holes(holes[number], durable[number], offered[number])
            end = plan.target(durable[number], offered[number], found, stream.packet_size, STREAM_BYTES_MAX)
            self.more |= end < offered[number]
            found = [hole for hole in found if hole[0] < end]
            works.append(Work(stream, durable[number], end, found, low[number], high[number]))
        return works

    def free_idle(self) -> int:
        """Without a cycle: what streams let go of goes back. Returns how many chunks."""
        sample = sampling.sample_streams(self._desk.state)
        return self._committing.free(sample, sampling.held_chunks(sample, self._desk.arena))

    def close(self) -> None:
        self._threads.close()

    def _begin(self, works: list[Work], now_unix_ns: int) -> list[Work]:
        """Streams without a row in the catalog get one; without it they wait."""
        fresh = [work.stream for work in works if not work.stream.directory]
        if not fresh:
            return works
        try:
            self._opening.begin(fresh, now_unix_ns)
        except sqlite3.Error as error:
            self._failures.catalog_failed(error)
            return [work for work in works if work.stream.directory]
        return works

    def _place(self, works: Sequence[Work]) -> None:
        self._placing.fit()
        slow = [work for work in works if not self._placing.try_quickly(work)]
        if len(slow) <= BATCH_PARTS_MAX:
            for work in slow:
                self._placing.place(work, self._threads.scratch)
        else:
            self._threads.run(self._placing.place, batches(slow, BATCH_PARTS_MAX))

    def _write(self, works: Sequence[Work], now_s: float, now_unix_ns: int) -> None:
        parts: list[Part] = []
        interval_s = max(1.0, len(works) / INDEX_PAIRS_PER_S)
        for work in works:
            if work.error is not None or not work.parts:
                continue
            parts += work.parts
            stream = work.stream
            is_due = now_s >= stream.index_due_s
            if is_due:
                stream.index_due_s = now_s + interval_s * (1.0 + stream.row % 64 / 256)
            # repair takes a stream to end with its last byte that is not zero, or where the index says
            if is_due or self._writer.ends_in_zeros(work.parts[-1], stream.packet_size):
                work.parts[-1].index_pair = (work.durable, work.end, now_unix_ns)
        total = sum(part.end - part.first for part in parts)
        if total >= THREADS_BYTES or (len(parts) > 1 and self._write_s > SLOW_WRITE_S):
            each = max(1, min(BATCH_PARTS_MAX, len(parts) // 32))
            self._threads.run(self._writer.write, batches(parts, each))
            self._write_s *= 0.95  # now and then see again what it takes without threads
        elif parts:
            began_s = time.monotonic()
            for part in parts:
                self._writer.write(part, self._threads.scratch)
            self._write_s = (3 * self._write_s + (time.monotonic() - began_s) / len(parts)) / 4
        written = sum(part.written_bytes for part in parts)
        self.written_bytes += written
        self._desk.counters.add("written_bytes", written)

    def _count(self, took_ns: int) -> None:
        counters = self._desk.counters
        counters.add("cycles")
        counters.set("cycle_ns", took_ns)
        if took_ns > counters.get("cycle_ns_max"):
            counters.set("cycle_ns_max", took_ns)


def batches(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[at : at + size] for at in range(0, len(items), size)]
