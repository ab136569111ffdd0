"""``mpserverctl repair``: makes the catalog anew from the segments, and says what it could not know.

The caller holds the spool's lock: no daemon writes it. Nothing is deleted. Files that do not fit are renamed to
``*.aside``, bytes behind a stream's end go to ``<end>.tail.aside`` before the file is cut, the old catalog becomes
``catalog.sqlite.<time>.aside``. Where nothing is wrong nothing is changed. A kill at any instant is mended by running
it again.

    scan -> salvage what the old catalog says -> judge each stream -> write the new catalog beside -> move files -> swap
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mpserverd.errors import SpoolError
from mpserverd.storer import filesystem, repair_swap, sidecar
from mpserverd.storer.catalog import CATALOG_FILE, Catalog, StreamRecord
from mpserverd.storer.cutting import CUT_TOTAL
from mpserverd.storer.last_life import CLOSED_KEY
from mpserverd.storer.live import STREAMS_DIRECTORY
from mpserverd.storer.repair_judge import Known, Rebuilt, guessed_identity, identity_of_record, judge
from mpserverd.storer.repair_salvage import KnownSegment, Salvaged, salvage
from mpserverd.storer.repair_scan import Scanned, scan
from mpserverd.storer.segment_file import rename_aside, segment_name
from mpserverd.streams.sidecar import RETIRED_FILE, Identity, is_lost_and_found
from mpserverd.streams.text import counted
from mpserverd.streams.verify_spool import unreadable

_COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class Wishes:
    """``checksums``: read sealed segments and compare. ``packet_size``: of streams that nothing says it of, or 0."""

    checksums: bool = False
    packet_size: int = 0


@dataclass
class StreamReport:
    name: str
    epoch: str
    directory: str
    packet_size: int
    first_offset: int
    durable_offset: int
    lost_bytes: int
    cut_bytes: int
    changed: bool
    notes: list[str]


@dataclass
class Report:
    """``fine``: nothing is missing and nothing was left out. ``catalog_fault``: why the old one was not believed.
    ``uncompared_segments`` have a checksum that was not asked for."""

    changed: bool = False
    catalog_fault: str = ""
    catalog_aside: str = ""
    streams: list[StreamReport] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    set_aside: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    uncompared_segments: int = 0

    @property
    def lost_bytes(self) -> int:
        return sum(stream.lost_bytes for stream in self.streams)

    @property
    def fine(self) -> bool:
        return not self.lost_bytes and not self.left_out

    def as_json(self) -> dict[str, Any]:
        return {"fine": self.fine, "lost_bytes": self.lost_bytes, **asdict(self)}


def repair(spool: str, wishes: Wishes = Wishes()) -> Report:
    """Raises SpoolError, LayoutError, OSError. The caller holds the lock on ``spool``."""
    streams = os.path.join(spool, STREAMS_DIRECTORY)
    if not os.path.isdir(streams):
        raise SpoolError(f"{spool} is not a spool: there is no directory {STREAMS_DIRECTORY} in it")
    place = repair_swap.begin(spool)
    try:
        return _Repair(spool, place, wishes).run()
    finally:
        repair_swap.end(place)


class _Repair:
    def __init__(self, spool: str, place: str, wishes: Wishes) -> None:
        self._spool, self._place, self._wishes = spool, place, wishes
        self._streams = os.path.join(spool, STREAMS_DIRECTORY)
        self._old: Salvaged = salvage(spool, place)
        self._report = Report(catalog_fault=self._old.fault)
        self._moves: list[str] = []
        """Paths of what is set aside whole."""

    def run(self) -> Report:
        rebuilt = [(found, judged) for found, judged in self._judge_all()]
        rebuilt += self._without_directory([judged.record for _, judged in rebuilt])
        report = self._report
        report.changed = bool(self._old.fault or self._moves or any(judged.changed for _, judged in rebuilt))
        report.streams = [_stream_report(judged) for _, judged in rebuilt]
        if not self._wishes.checksums:
            report.uncompared_segments = sum(bool(row.sha256) for _, judged in rebuilt for row in judged.segments)
        if not report.changed:
            return report
        self._write_catalog([judged for _, judged in rebuilt])
        for found, judged in rebuilt:
            if found is not None:
                self._mend_files(found, judged)
        for path in self._moves:
            self._set_aside(path)
        filesystem.sync_directory(self._streams)
        report.catalog_aside = repair_swap.swap(
            self._spool, self._place, time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        )
        return report

    # -- judging

    def _judge_all(self) -> Iterator[tuple[Scanned | None, Rebuilt]]:
        by_epoch = {record.epoch: record for record in self._old.streams.values()}
        by_directory = {record.directory: record for record in self._old.streams.values()}
        seen: set[str] = set()
        names = sorted(name for name in os.listdir(self._streams) if not name.endswith(".aside"))
        names.sort(key=lambda name: name not in by_directory)  # of two with one epoch the one that is known counts
        for name in names:
            path = os.path.join(self._streams, name)
            if name not in by_directory and is_lost_and_found(path):
                continue
            if not os.path.isdir(path):
                if name not in by_directory:
                    self._moves.append(path)
                continue
            if name not in by_directory and os.path.lexists(os.path.join(path, RETIRED_FILE)):
                continue  # the daemon was about to remove it
            try:
                found = scan(path)
            except OSError as error:
                self._report.left_out.append(unreadable(Path(path), error))
                continue
            identity = self._identify(found, by_directory.get(name))
            if identity is None:
                continue
            if identity.epoch in seen:
                self._report.left_out.append(f"{name} has the epoch of another directory: set aside as a copy of it")
                self._moves.append(found.path)
                continue
            seen.add(identity.epoch)
            known = self._known(by_epoch.get(identity.epoch))
            yield found, judge(found, identity, known, self._bad(found, known))

    def _identify(self, found: Scanned, record: StreamRecord | None) -> Identity | None:
        if found.identity is not None:
            return found.identity
        if record is not None:
            return identity_of_record(record)
        if not found.segments:
            self._moves.append(found.path)
            return None
        if not self._wishes.packet_size:
            self._report.left_out.append(
                f"{found.name} has segments, and nothing says how large their packets are; give --packet-size"
            )
            return None
        created = min(segment.mtime_ns for segment in found.segments)
        identity = guessed_identity(found.name, self._wishes.packet_size, secrets.token_hex(8), created)
        found.faults.append(f"name and packet size are guessed, the epoch is {identity.epoch}, a layout is not known")
        return identity

    def _known(self, record: StreamRecord | None) -> Known:
        if record is None:
            return Known()
        old = self._old
        return Known(
            record,
            old.updated_unix_ns.get(record.id, 0),
            old.segments.get(record.id, {}),
            old.holes.get(record.id, []),
            trusted=old.whole,
        )

    def _bad(self, found: Scanned, known: Known) -> list[int]:
        """Sealed segments whose checksum says that they are not what they were."""
        if not self._wishes.checksums:
            return []
        bad = []
        for segment in found.segments:
            row = known.segments.get(segment.first)
            if row is None or row.end is None or row.state != "sealed" or not row.sha256:
                continue
            length = row.end - row.first
            path = os.path.join(found.path, segment_name(segment.first))
            if segment.size >= length and _digest(path, length) != row.sha256:
                bad.append(segment.first)
        return bad

    def _without_directory(self, found_ones: Sequence[StreamRecord]) -> list[tuple[Scanned | None, Rebuilt]]:
        """Streams that the old catalog knows and that have no directory any more keep their offsets, as a hole. One
        whose directory is another stream's now gets a name that is free; it is made when the stream goes on."""
        epochs, taken = ({getattr(record, name) for record in found_ones} for name in ("epoch", "directory"))
        result: list[tuple[Scanned | None, Rebuilt]] = []
        for record in self._old.streams.values():
            path = os.path.join(self._streams, record.directory)
            is_anothers = record.directory in taken
            if record.epoch in epochs or not (is_anothers or (record.durable and not os.path.isdir(path))):
                continue
            name = f"{record.directory}@{record.epoch}" if is_anothers else record.directory
            found = Scanned(name, os.path.join(self._streams, name))
            judged = judge(found, identity_of_record(record), self._known(record))
            if judged.lost_bytes:
                judged.notes.insert(0, f"its directory {path} is missing")
            result.append((None, judged))
        return result

    # -- writing

    def _write_catalog(self, rebuilt: list[Rebuilt]) -> None:
        """In the place of work: a copy of the old one where that is whole, else a new one. It ends without a log."""
        if not self._old.whole:
            for name in os.listdir(self._place):
                os.unlink(os.path.join(self._place, name))
        cut = sum(judged.cut_bytes for judged in rebuilt if judged.changed or not self._old.whole)
        catalog = Catalog(self._place, durable=True)
        try:
            with catalog.transaction():
                known = {record.epoch: record.id for record in self._old.streams.values()}
                anew = [judged for judged in _in_order(rebuilt, known) if judged.changed or not self._old.whole]
                for judged in anew:  # all of them first: two may have swapped what only one can have
                    if judged.record.epoch in known:
                        catalog.remove_stream(known[judged.record.epoch])
                for judged in anew:
                    _restore(catalog, judged)
                if not self._old.whole:
                    catalog.add_totals(sorted(self._old.totals.items()))
                    if not self._old.totals:
                        self._report.notes.append("totals of streams that are gone are not known: they begin at 0")
                    self._note_lost_checksums(rebuilt)
                    catalog.set_meta([(CLOSED_KEY, "1")])  # who is connected is not known: nobody
                if cut:
                    catalog.add_totals([(CUT_TOTAL, cut)])
            catalog.settle()
        finally:
            catalog.close()
        self._dress(os.path.join(self._place, CATALOG_FILE))

    def _note_lost_checksums(self, rebuilt: list[Rebuilt]) -> None:
        bare = sum(row.state == "sealed" and not row.sha256 for judged in rebuilt for row in judged.segments)
        if bare:
            text = f"no checksum any more: {counted(bare, 'sealed segment')}; it is made anew of what is there now"
            self._report.notes.append(f"{text}, flipped bits included")

    def _dress(self, path: str) -> None:
        """Durable, and the daemon's, whoever repairs."""
        os.chmod(path, 0o640)
        if os.geteuid() == 0:
            there = os.stat(self._spool)
            os.chown(path, there.st_uid, there.st_gid)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _mend_files(self, found: Scanned, judged: Rebuilt) -> None:
        if judged.cut_at is not None and (judged.changed or not self._old.whole):
            self._cut(found, judged)
        for name in judged.aside:
            self._set_aside(os.path.join(found.path, name))
        if found.identity is None:
            with contextlib.suppress(OSError):
                sidecar.put(found.path, sidecar.identity_of(judged.record))
                sidecar.sync(found.path)
        if judged.aside or judged.cut_at is not None or found.identity is None:
            filesystem.sync_directory(found.path)

    def _cut(self, found: Scanned, judged: Rebuilt) -> None:
        assert judged.cut_at is not None
        first, length, tail_bytes = judged.cut_at
        path = os.path.join(found.path, segment_name(first))
        if tail_bytes:
            tail = os.path.join(found.path, f"{first + length:020d}.tail")
            self._report.set_aside.append(_copy_tail(path, length, tail_bytes, tail))
            filesystem.sync_directory(found.path)
        os.truncate(path, length)

    def _set_aside(self, path: str) -> None:
        if os.path.lexists(path):
            self._report.set_aside.append(rename_aside(path))


def _restore(catalog: Catalog, judged: Rebuilt) -> None:
    number = catalog.restore_stream(judged.record, judged.updated_unix_ns)
    catalog.restore_segments(
        (number, row.first, row.end, row.state, row.sha256, row.closed_unix_ns or None) for row in judged.segments
    )
    catalog.add_holes((number, first, end, kind) for first, end, kind in judged.holes)


def _in_order(rebuilt: list[Rebuilt], known: Container[str]) -> list[Rebuilt]:
    """The youngest epoch of a name is the one with the highest number. Those of the old catalog keep theirs; those
    without a number were made last."""

    def place(judged: Rebuilt) -> tuple[bool, bool, int, int]:
        record = judged.record
        return record.epoch not in known, not record.id, record.id, record.created_unix_ns

    return sorted(rebuilt, key=place)


def _stream_report(judged: Rebuilt) -> StreamReport:
    record = judged.record
    return StreamReport(
        record.name, record.epoch, record.directory, record.packet_size, record.first_offset, record.durable,
        judged.lost_bytes, judged.cut_bytes, judged.changed, judged.notes,
    )  # fmt: skip


def _digest(path: str, length: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while length > 0 and (piece := file.read(min(_COPY_BYTES, length))):
            digest.update(piece)
            length -= len(piece)
    return digest.hexdigest()


def _copy_tail(path: str, first: int, length: int, target: str) -> str:
    """Returns the name that it got; what a killed repair left under ``target`` is the same bytes, or some of them."""
    with open(path, "rb") as source, open(target, "wb") as file:
        source.seek(first)
        while length > 0 and (piece := source.read(min(_COPY_BYTES, length))):
            file.write(piece)
            length -= len(piece)
        file.flush()
        os.fsync(file.fileno())
    return rename_aside(target)


__all__ = ["KnownSegment", "Report", "Wishes", "repair"]
