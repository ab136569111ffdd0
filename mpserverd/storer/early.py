"""Files are lengthened, and next segments made, before they are needed, while nothing else is to be done.

Each stream does so at a phase of its own: a thousand streams that began together and go at one pace would otherwise do
it in one cycle (0.35 s for 1,000 files). A stream that is faster than this lengthens its file when it must.
"""

from __future__ import annotations

import time

from mpserverd.arena.state import Str
from mpserverd.storer import plan
from mpserverd.storer.filesystem import NO_SPACE
from mpserverd.storer.live import Desk, LiveStream
from mpserverd.storer.segment_file import SegmentFile

BUDGET_S = 0.02
"""At most so long in one go."""
_GOLDEN = 0.6180339887


def phase_of(row: int) -> float:
    """How full a file is when it is lengthened: 0.5 to 0.9, spread evenly over the rows."""
    return 0.5 + row * _GOLDEN % 1 * 0.4


class Early:
    """``prepare`` once a second."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def prepare(self, segment_bytes: int) -> None:
        """Stops after BUDGET_S, and when the disk is full. Another error is one stream's, which meets it again. Of two
        files each that do not fit into ``max_bytes`` none is made early: it could not be retired."""
        until_s = time.monotonic() + BUDGET_S
        max_bytes = self._desk.spool.max_bytes
        has_place_for_next = not max_bytes or 2 * len(self._desk.streams) * segment_bytes <= max_bytes
        for stream in self._desk.streams.values():
            file = stream.segment
            if file is None or not file.in_catalog or stream.begun_limits:
                continue
            used = self._desk.word(stream, Str.DURABLE) - file.first
            due = phase_of(stream.row)
            try:
                if file.allocated < file.limit - file.first:
                    if used > due * file.allocated:
                        self._lengthen(file)
                elif has_place_for_next and used > due * (file.limit - file.first) and stream.early is None:
                    self._make_next(stream, file, segment_bytes)
            except OSError as error:
                if error.errno in NO_SPACE:
                    return
            if time.monotonic() > until_s:
                return

    def _lengthen(self, file: SegmentFile) -> None:
        if file.fd < 0:
            file.open()
            self._desk.files.used(file)
        file.grow(file.allocated + 1, self._desk.space)

    def _make_next(self, stream: LiveStream, file: SegmentFile, segment_bytes: int) -> None:
        first, limit = plan.segment_bounds(file.limit, file.limit, segment_bytes)
        following = SegmentFile(stream.directory, first, limit, direct=self._desk.filesystem.direct)
        following.early = True
        following.create()
        try:
            following.grow(limit - first, self._desk.space)
        finally:
            following.close()
        stream.early = following
