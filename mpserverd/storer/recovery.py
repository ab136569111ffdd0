"""The storer's start: tables, catalog and directories are brought together before anything is written.

The catalog is the truth about what is durable; the table says what the workers still hold. Files that the catalog does
not account for are renamed to ``*.aside`` and named in the journal, never deleted; only empty early segments, files
that retention had already given up, and files of bytes that are in memory still, not committed, are removed. Nothing is
cut. A missing file stops its stream, loudly. What cannot be read, renamed or removed is named, and the start goes on:
one stream's files are no reason to store nobody's.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Mapping

from mpserverd.arena.state import Str, StreamFlag
from mpserverd.config.schema import Sync
from mpserverd.errors import StartError
from mpserverd.log import MessageId
from mpserverd.log_text import RateLimiter
from mpserverd.storer import sidecar
from mpserverd.storer.accounts import GoneBlock
from mpserverd.storer.advice import advice
from mpserverd.storer.catalog import StreamRecord
from mpserverd.storer.cutting import CUT_TOTAL, Cutting
from mpserverd.storer.last_life import BOOT_KEY, CLOSED_KEY, SYNC_KEY, boot_id, judge
from mpserverd.storer.live import Desk, LiveStream
from mpserverd.storer.opening import Opening
from mpserverd.storer.segment_file import rename_aside
from mpserverd.storer.trust import NEXT_STEP, require_current
from mpserverd.streams.sidecar import IDENTITY_FILE, RETIRED_FILE, is_lost_and_found

logger = logging.getLogger(__name__)

_SUFFIXES = (".seg", ".idx", ".holes")


class Recovery:
    """``run`` once, before the first cycle."""

    def __init__(self, desk: Desk, opening: Opening, gone: GoneBlock) -> None:
        self._desk = desk
        self._opening = opening
        self._gone = gone
        self._limiter = RateLimiter(60.0, 50)

    def run(self) -> None:
        """Raises StartError, before anything is changed, when the catalog is not to be believed."""
        desk, catalog = self._desk, self._desk.catalog
        meta, boot = catalog.meta(), boot_id()
        life = judge(meta, boot)
        self._require_whole()
        desk.resting_bytes = catalog.segment_bytes()
        records = {record.id: record for record in catalog.streams()}
        firsts = catalog.segment_firsts()
        if Sync.NONE.value not in (desk.spool.sync.value, meta.get(SYNC_KEY)):  # else a power cut takes commits, too
            require_current(desk, records, firsts)
        live = self._adopt(records)
        adrift = [r for r in records.values() if r.id not in live and r.connected]
        Cutting(desk).run(adrift, firsts, life)
        records = self._tidy(records, firsts, live)
        self._look_at_files(records, firsts, live)
        with catalog.transaction():
            catalog.set_meta([(BOOT_KEY, boot), (CLOSED_KEY, "0"), (SYNC_KEY, desk.spool.sync.value)])
        desk.counters.set("cut_bytes", catalog.totals().get(CUT_TOTAL, 0))
        self._gone.compute(catalog, live, self._released_rows())

    def _require_whole(self) -> None:
        """A damaged page would show only when it is read, perhaps in the middle of a commit."""
        fault = self._desk.catalog.first_fault()
        if fault:
            raise StartError(f"the catalog {self._desk.catalog.path} is damaged ({fault}); {NEXT_STEP}")

    # -- rows

    def _adopt(self, records: Mapping[int, StreamRecord]) -> dict[int, int]:
        """Take up the streams in the table. Returns their catalog ids, and where each one's bytes in memory begin."""
        desk = self._desk
        by_epoch = {record.epoch: record for record in records.values()}
        live = {}
        for row in desk.live_rows().tolist():
            stream = desk.learn(row)
            if not desk.word(stream, Str.FLAGS) & StreamFlag.STORE:
                continue
            record = records.get(stream.catalog_id) or by_epoch.get(f"{desk.word(stream, Str.EPOCH):016x}")
            stream.catalog_id = 0
            if record is not None:
                self._take_up(stream, record)
                live[record.id] = desk.word(stream, Str.DURABLE)
            elif desk.word(stream, Str.CATALOG_ID):
                self._say("catalog does not know a stream: it goes on as a new one", stream=stream.name)
                desk.state.words[stream.base + Str.CATALOG_ID] = 0
        return live

    def _take_up(self, stream: LiveStream, record: StreamRecord) -> None:
        desk = self._desk
        words, base = desk.state.words, stream.base
        if record.name != stream.name:
            desk.state.set_stream_name(stream.row, record.name)
            stream.name = record.name
        words[base + Str.CATALOG_ID] = record.id
        if record.durable > words[base + Str.DURABLE]:  # committed, but not published
            for column, value in (
                (Str.STORED, record.durable),
                (Str.STORED_HOLES, record.stored_holes),
                (Str.DROPPED, record.dropped),
                (Str.LOST, record.lost),
                (Str.DURABLE_HOLES, record.stored_holes),
                (Str.DURABLE_MONO_NS, time.monotonic_ns()),
                (Str.DURABLE, record.durable),
            ):
                words[base + column] = value
        words[base + Str.FIRST_OFFSET] = record.first_offset
        words[base + Str.RETIRED] = record.retired
        if not self._opening.attach(stream, record):
            self._go_on_beside(stream, record)
        elif stream.segment is not None:
            desk.wake(stream, record.durable)
            stream.segment.mend_index(record.durable)  # never are two pairs ahead, in whichever files

    def _go_on_beside(self, stream: LiveStream, record: StreamRecord) -> None:
        """A live stream lost a file: what comes now goes to a fresh segment, the old ones stay as they are."""
        desk = self._desk
        stream.catalog_id = record.id
        stream.directory = desk.path_of(record.directory)
        stream.zeros_below = desk.catalog.last_hole_end(record.id)
        now_unix_ns = time.time_ns()
        with desk.catalog.transaction():
            for segment in desk.catalog.segments(record.id):
                if segment.end is None:
                    desk.catalog.close_segments([(record.durable, "aside", now_unix_ns, record.id, segment.first)])

    def _released_rows(self) -> list[list[int]]:
        """Rows still in the table whose totals were already added to ``total``."""
        released = self._desk.catalog.released()
        rows = [stream.row for stream in self._desk.streams.values() if stream.number in released]
        found: list[list[int]] = self._desk.state.streams[rows].tolist() if rows else []
        return found

    # -- the catalog

    def _tidy(
        self, records: Mapping[int, StreamRecord], firsts: Mapping[int, set[int]], live: Mapping[int, int]
    ) -> dict[int, StreamRecord]:
        """Streams that began but never stored a byte go; those not in the table are not connected, and the last segment
        of one whose name was made up will never be continued."""
        catalog = self._desk.catalog
        empty = [r.id for r in records.values() if r.id not in live and not r.durable and not firsts.get(r.id)]
        adrift = [r.id for r in records.values() if r.id not in live and r.connected]
        if empty or adrift:
            with catalog.transaction():
                catalog.set_connected(adrift, 0)
                catalog.close_open_segments([n for n in adrift if not records[n].named], time.time_ns())
                for stream in empty:
                    catalog.remove_stream(stream)
        return {number: record for number, record in records.items() if number not in set(empty)}

    # -- files

    def _look_at_files(
        self, records: Mapping[int, StreamRecord], firsts: Mapping[int, set[int]], live: Mapping[int, int]
    ) -> None:
        known = {record.directory: record for record in records.values()}
        seen = set()
        with os.scandir(self._desk.streams_path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                record = known.get(entry.name)
                if record is not None:
                    seen.add(entry.name)
                    self._look_into(entry.path, record, firsts.get(record.id, set()), live.get(record.id, math.inf))
                elif sidecar.is_retired(entry.path):
                    self._remove_retired(entry.path)
                elif not entry.name.endswith(".aside") and not is_lost_and_found(entry.path):
                    self._set_aside("directory unknown to the catalog set aside", entry.path)
        for name in known.keys() - seen:
            if firsts.get(known[name].id):
                self._say("directory of a stream is missing", stream=known[name].name, directory=name)

    def _look_into(self, path: str, record: StreamRecord, expected: set[int], memory_from: float) -> None:
        """From ``memory_from`` on the stream's bytes are in memory: what a storer that was killed had begun there goes.
        They are written again, perhaps on another grid, and repair would find two files with them."""
        missing = set(expected)
        identified = False
        try:
            names = os.listdir(path)
        except OSError as error:
            self._say(
                "directory of a stream cannot be read", stream=record.name, epoch=record.epoch, fault=advice(error)
            )
            return
        for name in names:
            stem, suffix = os.path.splitext(name)
            first = int(stem) if suffix in (*_SUFFIXES, ".new") and stem.isdecimal() else -1
            if name == RETIRED_FILE:
                with contextlib.suppress(OSError):
                    sidecar.take_back(path)
                    identified = True
            elif name == IDENTITY_FILE:
                identified = True
            elif first in expected and suffix in _SUFFIXES:
                if suffix == ".seg":
                    missing.discard(first)
            elif suffix == ".aside":
                continue
            elif suffix == ".new" or (first >= 0 and not record.first_offset <= first < memory_from):
                self._remove(os.path.join(path, name))
            else:
                self._set_aside("file unknown to the catalog set aside", os.path.join(path, name))
        for first in sorted(missing):
            self._say("segment is missing", stream=record.name, epoch=record.epoch, first=first)
        if not identified:
            with contextlib.suppress(OSError):  # of an older version; without it repair knows less, and says so
                sidecar.put(path, sidecar.identity_of(record))

    def _remove_retired(self, path: str) -> None:
        try:
            sidecar.remove_retired(path)
        except OSError as error:
            self._say("directory of a retired stream cannot be removed", fault=advice(error))

    def _remove(self, path: str) -> None:
        try:
            os.unlink(path)
        except OSError as error:
            self._say("file that is not needed any more cannot be removed", fault=advice(error))

    def _set_aside(self, text: str, path: str) -> None:
        try:
            name = rename_aside(path)
        except OSError as error:
            self._say("what the catalog does not know cannot be set aside", fault=advice(error))
        else:
            self._say(text, file=name)

    def _say(self, text: str, **fields: object) -> None:
        suppressed = self._limiter.admit(time.monotonic())
        if suppressed is not None:
            self._desk.note(logger, logging.ERROR, text, MessageId.SPOOL_DAMAGED, suppressed=suppressed, **fields)
