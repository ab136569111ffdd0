"""Streams whose connection was live when all processes died: they end at their durable offset.

What was written behind it was never acknowledged, may be torn, and is cut, so that it is never taken for packets. How
much that was is counted before, from what the files hold: an upper bound, since padding and torn blocks count too. What
was in memory only is not known. The count is committed before files are cut, so a kill in between counts twice rather
than never.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from mpserverd.config.schema import Sync
from mpserverd.log import MessageId
from mpserverd.log_text import RateLimiter
from mpserverd.storer import sidecar
from mpserverd.storer.catalog import StreamRecord
from mpserverd.storer.last_life import LastLife
from mpserverd.storer.live import Desk
from mpserverd.storer.segment_file import segment_name
from mpserverd.storer.syncing import sync_whole
from mpserverd.storer.tails import written_behind

logger = logging.getLogger(__name__)

CUT_TOTAL = "cut_bytes"
"""In the catalog's table ``total``; no account of the ledger, since these bytes count as never received."""
_LINES_A_MINUTE = 20


class Tail(NamedTuple):
    """``bytes`` is an upper bound; ``path`` is the open segment, "" for none that could be cut."""

    record: StreamRecord
    path: str
    bytes: int


class Cutting:
    """``run`` once, before streams are said to be disconnected."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._limiter = RateLimiter(60.0, _LINES_A_MINUTE)

    def run(self, adrift: Iterable[StreamRecord], firsts: Mapping[int, set[int]], life: LastLife) -> int:
        """Count, commit, say, cut. Returns the bytes."""
        tails = [self._look(record, firsts.get(record.id, set())) for record in adrift]
        if not tails:
            return 0
        total = sum(tail.bytes for tail in tails)
        if total:
            with self._desk.catalog.transaction():
                self._desk.catalog.add_totals([(CUT_TOTAL, total)])
        self._cut(tails, firsts)
        for tail in tails:
            self._say(tail)
        self._desk.note(
            logger,
            logging.ERROR if total else logging.WARNING,
            "streams end at their durable offset",
            MessageId.STREAMS_CUT,
            why=life.value,
            streams=len(tails),
            cut_bytes_max=total,
            not_known="what was in memory only",
            totals="as committed with the durable offset",
        )
        return total

    def _look(self, record: StreamRecord, firsts: set[int]) -> Tail:
        """Also what lies in segments that were begun and not committed."""
        directory = self._desk.path_of(record.directory)
        path, behind = "", 0
        if firsts and max(firsts) <= record.durable:
            path = os.path.join(directory, segment_name(max(firsts)))
            with contextlib.suppress(OSError):
                behind += written_behind(path, record.durable - max(firsts))
        with contextlib.suppress(OSError):
            for name in os.listdir(directory):
                stem, suffix = os.path.splitext(name)
                if suffix == ".seg" and stem.isdecimal() and int(stem) >= record.durable and int(stem) not in firsts:
                    with contextlib.suppress(OSError):
                        behind += written_behind(os.path.join(directory, name), 0)
        return Tail(record, path, behind)

    def _cut(self, tails: Iterable[Tail], firsts: Mapping[int, set[int]]) -> None:
        """Durable before anybody is told that the stream is not connected. A file that cannot be cut stays as it is."""
        cut = ""
        for record, path, _ in tails:
            known = firsts.get(record.id, set())
            with contextlib.suppress(OSError):
                sidecar.cut_holes(self._desk.path_of(record.directory), sorted(known), record.durable)
            if not path:
                continue
            with contextlib.suppress(OSError):
                length = record.durable - max(known)
                if os.stat(path).st_size > length:
                    os.truncate(path, length)
                    cut = path
        if cut and self._desk.spool.sync is Sync.DURABLE:
            with contextlib.suppress(OSError), open(cut, "rb") as file:
                sync_whole(self._desk, file.fileno())

    def _say(self, tail: Tail) -> None:
        if not tail.bytes:
            return
        suppressed = self._limiter.admit(time.monotonic())
        if suppressed is not None:
            self._desk.note(
                logger,
                logging.WARNING,
                "stream cut at its durable offset",
                MessageId.STREAMS_CUT,
                stream=tail.record.name,
                epoch=tail.record.epoch,
                durable=tail.record.durable,
                cut_bytes_max=tail.bytes,
                suppressed=suppressed,
            )
