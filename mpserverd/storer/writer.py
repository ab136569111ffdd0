"""Writing pieces of streams from arena memory to segment files, and the threads that do it.

Direct writes are whole blocks. The last, partial one goes through a scratch block padded with zeros, never with what
lies behind it in the arena (that is another stream's, or not offered yet). A first block whose beginning is not in the
arena is read back from the file and completed. A write that comes back short is repeated once as a whole.

Threads: while they write, whoever gave them the work waits, because a busy interpreter beside them delays every
completion from 35 us to 1.2 ms. Small work is done without them: handing it over costs more than it saves.
"""

from __future__ import annotations

import collections
import dataclasses
import errno
import mmap
import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

from mpserverd.storer.plan import ChunkList
from mpserverd.storer.segment_file import SegmentFile

THREADS = 8
PART_BYTES = 2 << 20
"""A fat stream is written in parts of so much, several at a time."""
_BLOCK_MAX = 65536


@dataclasses.dataclass(slots=True, eq=False)
class Part:
    """Bytes [first, end) of a stream for one file. ``zeros_below`` is the end of the last hole below ``first``.

    ``index_pair``: (durable now, durable then, unix ns), written after the bytes. ``error`` is what went wrong.
    """

    file: SegmentFile
    first: int
    end: int
    low: int
    high: int
    zeros_below: int
    index_pair: tuple[int, int, int] | None = None
    written_bytes: int = 0
    index_fd: int = -1
    error: OSError | None = None


class Scratch:
    """Two aligned blocks of one thread, for the head and the tail of a write."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, 2 * _BLOCK_MAX)
        view = memoryview(self._map)
        self.head, self.tail = view[:_BLOCK_MAX], view[_BLOCK_MAX:]


class PartWriter:
    """Writes parts; ``data`` is the arena's memory, ``chunks`` this cycle's list of chunks."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self.chunks = ChunkList(1, (), (), ())

    def write(self, part: Part, scratch: Scratch) -> None:
        """Write ``part`` and its index pair; sets ``error`` instead of raising OSError. Raises MissingChunkError."""
        try:
            self._write(part, scratch)
        except OSError as error:
            part.error = error
            return
        if part.index_pair is not None:
            try:
                part.index_fd = part.file.append_index(*part.index_pair)
            except OSError:
                part.index_fd = -1  # the index is a help for people, no promise: the next pair is tried in its time

    def ends_in_zeros(self, part: Part, packet_size: int) -> bool:
        """Whether the last packet of a part that ends a cycle is nothing but zeros: the file cannot show that it is
        there. Nearly always one look at its last bytes says no."""
        for size in (min(8, packet_size), packet_size):
            if b"".join(self._views(part, part.end - size, part.end)).strip(b"\0"):
                return False
        return True

    def _write(self, part: Part, scratch: Scratch) -> None:
        file = part.file
        if file.block == 1:
            start, views = part.first, self._views(part, part.first, part.end)
        else:
            start, views = self._blocks(part, scratch, file.block)
        wanted = sum(map(len, views))
        for _ in range(2):
            part.written_bytes += (done := os.pwritev(file.fd, views, start - file.first))
            if done == wanted:
                return
        raise OSError(errno.EIO, f"short write: {done} of {wanted} bytes, twice")

    def _views(self, part: Part, first: int, end: int) -> list[memoryview]:
        data = self._data
        return [data[at : at + length] for at, length in self.chunks.pieces(first, end, part.low, part.high)]

    def _blocks(self, part: Part, scratch: Scratch, block: int) -> tuple[int, list[memoryview]]:
        """Whole blocks that contain the part, and the offset of the first."""
        first, end = part.first, part.end
        start = first - first % block
        tail = end - end % block
        views: list[memoryview] = []
        at = start
        if first != start and start < self._valid_from(part):
            views.append(self._head(part, scratch.head[:block], start))
            at = start + block
        if at < tail:
            views += self._views(part, at, tail)
        if tail >= at and tail != end:
            views.append(self._tail(part, scratch.tail[:block], tail))
        return start, views

    def _valid_from(self, part: Part) -> int:
        """From here on the arena has what the file shall have, up to the part's end."""
        chunks = self.chunks
        return max(chunks.firsts[chunks.index_of(part.first, part.low, part.high)], part.zeros_below)

    def _head(self, part: Part, block: memoryview, start: int) -> memoryview:
        """The first block: what the file has of it, then the part's bytes, then zeros."""
        size, first = len(block), part.first
        got = os.preadv(part.file.fd, [block], start - part.file.first)
        within, end = first - start, min(part.end - start, size)
        if got < within:
            block[got:within] = bytes(within - got)  # past the end of the file: a hole, which reads as zeros
        self._copy(part, block[within:end], first)
        block[end:size] = bytes(size - end)
        return block

    def _tail(self, part: Part, block: memoryview, start: int) -> memoryview:
        length = part.end - start
        self._copy(part, block[:length], start)
        block[length:] = bytes(len(block) - length)
        return block

    def _copy(self, part: Part, place: memoryview, first: int) -> None:
        at = 0
        for view in self._views(part, first, first + len(place)):
            place[at : at + len(view)] = view
            at += len(view)


Job = Callable[[Any, Scratch], None]
_Order = tuple[Job, collections.deque[Sequence[Any]]]


class Threads:
    """A few threads, started with the first work. An exception in one is raised in ``run``."""

    def __init__(self, count: int = THREADS) -> None:
        self._count = count
        self._inboxes: list[queue.SimpleQueue[_Order | None]] = []
        self._threads: list[threading.Thread] = []
        self._done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self.scratch = Scratch()
        """For work that the caller does itself."""

    def run(self, job: Job, batches: Sequence[Sequence[Any]]) -> None:
        """``job(item, scratch)`` for every item of every batch. Returns when all are done."""
        if not self._inboxes:
            self._start()
        waiting = collections.deque(batches)
        busy = min(self._count, len(batches))
        for inbox in self._inboxes[:busy]:
            inbox.put((job, waiting))
        failures = [failure for failure in (self._done.get() for _ in range(busy)) if failure is not None]
        if failures:
            raise failures[0]

    def _start(self) -> None:
        for number in range(self._count):
            inbox: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
            self._inboxes.append(inbox)
            thread = threading.Thread(target=self._work, args=(inbox,), name=f"writer-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        for inbox in self._inboxes:
            inbox.put(None)
        for thread in self._threads:
            thread.join()
        self._inboxes, self._threads = [], []

    def _work(self, inbox: queue.SimpleQueue[_Order | None]) -> None:
        scratch = Scratch()
        while (order := inbox.get()) is not None:
            job, waiting = order
            failure: BaseException | None = None
            try:
                while (batch := _next(waiting)) is not None:
                    for item in batch:
                        job(item, scratch)
            except BaseException as error:
                failure = error
            self._done.put(failure)


def _next(waiting: collections.deque[Sequence[Any]]) -> Sequence[Any] | None:
    try:
        return waiting.popleft()
    except IndexError:
        return None
