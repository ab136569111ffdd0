"""Which files the bytes of a cycle go to: segments are taken up, begun, lengthened and finished here.

A stream whose present segment has room, which is nearly every one in nearly every cycle, costs no system call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Sequence

from mpserverd.arena.state import Str
from mpserverd.log import MessageId
from mpserverd.storer import plan, sidecar
from mpserverd.storer.filesystem import NO_DESCRIPTOR
from mpserverd.storer.live import Desk, LiveStream
from mpserverd.storer.plan import Extent, Hole
from mpserverd.storer.segment_file import DIRECTORY_MODE, SegmentFile, rename_aside
from mpserverd.storer.writer import PART_BYTES, Part, Scratch

logger = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False, slots=True)
class Work:
    """What one stream does in a cycle: bytes and holes from ``durable`` to ``end``.

    ``low`` and ``high`` are its part of the cycle's chunk list; ``segment`` is where the stream stands afterwards.
    ``error`` says why nothing comes of it, ``bad`` which files are finished because of that.
    """

    stream: LiveStream
    durable: int
    end: int
    holes: Sequence[Hole]
    low: int
    high: int
    parts: list[Part] = dataclasses.field(default_factory=list)
    begun: list[SegmentFile] = dataclasses.field(default_factory=list)
    closed: list[SegmentFile] = dataclasses.field(default_factory=list)
    touched: list[SegmentFile] = dataclasses.field(default_factory=list)
    notes: list[int] = dataclasses.field(default_factory=list)
    """Descriptors of what was noted beside the segments, to be synced and closed."""
    segment: SegmentFile | None = None
    error: OSError | None = None
    bad: Sequence[SegmentFile] = ()
    sync_failed: bool = False

    def fail_sync(self, error: OSError, *files: SegmentFile) -> None:
        """Whatever the error is, these files are finished."""
        self.sync_failed = True
        self.fail(error, *files)

    def fail(self, error: OSError, *files: SegmentFile) -> None:
        """The first error counts; ``files`` are those that it says something about."""
        if self.error is None:
            self.error, self.bad = error, files


class Placing:
    """``place`` gives a work its parts. Several threads may call it for different streams."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self.segment_bytes = desk.spool.segment_bytes

    def fit(self) -> None:
        """Once a cycle: how long new segments are."""
        self.segment_bytes = self._desk.fitting_segment_bytes()

    def try_quickly(self, work: Work) -> bool:
        """Place without a system call, if that is possible."""
        file = work.stream.segment
        if work.holes or file is None or file.fd < 0 or work.end >= file.limit:
            return False
        if work.end - file.first > file.allocated or work.end - work.durable > PART_BYTES:
            return False
        work.segment = file
        work.touched.append(file)
        work.parts.append(Part(file, work.durable, work.end, work.low, work.high, work.stream.zeros_below))
        return True

    def place(self, work: Work, _: Scratch) -> None:
        """Find, make and lengthen the files. Sets the work's error instead of raising OSError. No packet is written
        here: for want of a descriptor no file is finished."""
        file = None
        try:
            self._clear_the_way(work.stream)
            file = work.stream.segment
            if file is not None and work.holes and work.holes[0][0] < file.limit:
                self._touch(work, file)
            for extent in plan.extents(work.durable, work.end, work.holes):
                at = extent[0]
                while at < extent[1]:
                    file = self._file_for(work, file, at)
                    stop = min(extent[1], file.limit)
                    file.grow(stop - file.first, self._desk.space)
                    self._add_parts(work, file, (at, stop))
                    at = stop
            if file is not None:
                self._finish(work, file)
        except OSError as error:
            work.fail(error, *([file] if file is not None and error.errno not in NO_DESCRIPTOR else []))

    def _file_for(self, work: Work, file: SegmentFile | None, at: int) -> SegmentFile:
        if file is None or at >= file.limit:
            below = work.durable
            if file is not None:
                self._close(work, file)
                below = file.limit
            file = self._begin(work, at, below)
        self._touch(work, file)
        return file

    def _touch(self, work: Work, file: SegmentFile) -> None:
        if file in work.touched:
            return
        if file.fd < 0:
            file.open()
        work.touched.append(file)
        for first, end, _ in work.holes:
            file.make_zero(first, end)
        if work.holes:
            note = sidecar.note_holes(file.directory, (file.first, file.limit), work.holes, work.durable)
            if note >= 0:
                work.notes.append(note)

    def _begin(self, work: Work, at: int, below: int) -> SegmentFile:
        """Bytes below ``below`` lie in other segments: the grid may have become wider since they were begun."""
        stream = work.stream
        bounds = plan.segment_bounds(at, below, self.segment_bytes)
        first, limit = plan.bounds_as_begun(at, bounds, stream.begun_limits)
        file = self._take_early(stream, first) or self._create(work, first, limit)
        work.begun.append(file)
        with contextlib.suppress(OSError):  # the stream has proven that it grows; if there is no place, a step will do
            file.grow(min(limit - first, at - self._desk.word(stream, Str.STARTED_AT)), self._desk.space)
        return file

    def _take_early(self, stream: LiveStream, first: int) -> SegmentFile | None:
        """The next segment that was made early, or None. It waits for the next try when there is no descriptor for it;
        one that cannot be used is given up."""
        early = stream.early
        if early is None or early.first != first:
            return None
        try:
            if early.fd < 0:
                early.open()
            early.begin()
        except OSError as error:
            if error.errno in NO_DESCRIPTOR:
                raise
            with contextlib.suppress(OSError):
                early.remove()
            stream.early = None
            return None
        early.fresh = True
        stream.early = None
        return early

    def _create(self, work: Work, first: int, limit: int) -> SegmentFile:
        """An error of this says nothing about the segment before; what is in the place of the new one goes aside."""
        file = SegmentFile(work.stream.directory, first, limit, direct=self._desk.filesystem.direct)
        try:
            file.create()
        except OSError as error:
            is_bad = error.errno not in NO_DESCRIPTOR and os.path.lexists(file.path)
            work.fail(error, *([file] if is_bad else []))
            raise
        return file

    def _finish(self, work: Work, file: SegmentFile) -> None:
        """The file that the last byte went to; a hole may reach beyond it."""
        if work.end >= file.limit:
            self._close(work, file)
            work.segment = None
        else:
            work.segment = file

    def _close(self, work: Work, file: SegmentFile) -> None:
        self._touch(work, file)
        file.cut(file.limit - file.first)
        work.closed.append(file)

    def _add_parts(self, work: Work, file: SegmentFile, extent: Extent) -> None:
        """Parts end on the file's grid of PART_BYTES, so that each but the last has whole blocks."""
        at, end = extent
        below = [hole_end for _, hole_end, _ in work.holes if hole_end <= at]
        zeros_below = max([work.stream.zeros_below, *below])
        while at < end:
            within = at - file.first
            stop = min(end, file.first + within - within % PART_BYTES + PART_BYTES)
            work.parts.append(Part(file, at, stop, work.low, work.high, zeros_below))
            at = stop

    def _clear_the_way(self, stream: LiveStream) -> None:
        """The directory is there, and no failed file has the name of the next one."""
        if not stream.directory_synced:
            try:
                os.mkdir(stream.directory, DIRECTORY_MODE)
            except FileExistsError:
                self._replace_a_file(stream)
            if stream.identity:
                sidecar.put(stream.directory, stream.identity)
        if stream.in_the_way:
            rename_aside(stream.in_the_way)
            stream.in_the_way = ""

    def _replace_a_file(self, stream: LiveStream) -> None:
        """Somebody's file in the place of the directory is set aside; a link is an operator's, and stays."""
        path = stream.directory
        if os.path.isdir(path) or os.path.islink(path):
            return
        self._desk.note(
            logger,
            logging.ERROR,
            "a file was in the place of a stream's directory: set aside",
            MessageId.SPOOL_DAMAGED,
            stream=stream.name,
            file=rename_aside(path),
        )
        os.mkdir(path, DIRECTORY_MODE)
