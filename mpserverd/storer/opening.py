"""Streams that begin or go on: rows that are OPENING, rows that offer their first packet, and their files.

A stream is one row in the catalog and one directory from its first whole packet on; the row is committed first, so that
a directory without a row is always a stranger's, and is never touched. A known name goes on where the catalog says;
with another packet size, or when its files are missing or cannot be used, the name gets a new epoch in a directory of
its own.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import sqlite3
import stat
from collections.abc import Iterable, Sequence

from mpserverd.arena.state import Check, Str, StreamFlag, StreamState
from mpserverd.errors import DamageError
from mpserverd.limits import STREAM_NAME_BYTES_MAX
from mpserverd.log import MessageId
from mpserverd.net.channel import Kind, Message
from mpserverd.protocol.layout import PacketLayout
from mpserverd.storer.accounts import GoneBlock, totals_of_record
from mpserverd.storer.advice import advice
from mpserverd.storer.catalog import SegmentRecord, StreamRecord
from mpserverd.storer.live import Desk, LiveStream
from mpserverd.storer.segment_file import SegmentFile, segment_name
from mpserverd.storer.sidecar import identity_of

logger = logging.getLogger(__name__)

_SAFE = re.compile(r"[A-Za-z0-9._@+,=-]")
_NAMES_TRIED_MAX = 10_000


class Opening:
    """``open_rows`` answers OPENING; ``begin`` gives streams their row and directory; ``attach`` finds their files."""

    def __init__(self, desk: Desk, gone: GoneBlock) -> None:
        self._desk = desk
        self._gone = gone

    # -- rows that are OPENING

    def open_rows(self, rows: Sequence[int]) -> None:
        """Fill the rows in and publish OPEN. Raises sqlite3.Error; nothing has changed then."""
        desk = self._desk
        try:
            opened = self._connect(rows)
        except sqlite3.Error:
            for row in rows:
                desk.streams.pop(row, None)
            raise
        for stream, record in opened:
            with self._gone.changing():
                if record is not None:
                    self._gone.subtract(totals_of_record(record))
                    self._fill(stream, record)
                desk.state.words[stream.base + Str.STATE] = StreamState.OPEN
            if record is not None:
                desk.wake(stream, record.durable)
            desk.outbox.append(Message(Kind.OPENED, stream.row))

    def _connect(self, rows: Iterable[int]) -> list[tuple[LiveStream, StreamRecord | None]]:
        """Find what they continue, and commit that it is connected."""
        desk = self._desk
        opened = [self._find(desk.learn(row)) for row in rows]
        known = [record.id for _, record in opened if record is not None]
        if known:
            with desk.catalog.transaction():
                desk.catalog.set_connected(known, 1)
        return opened

    def _find(self, stream: LiveStream) -> tuple[LiveStream, StreamRecord | None]:
        """The catalog's stream that this one continues; None begins a new one, at the first packet."""
        record = self._desk.catalog.current(stream.name)
        if record is None or self._begins_anew(stream, record):
            return stream, None
        if record.packet_size != stream.packet_size and self._desk.word(stream, Str.FLAGS) & StreamFlag.MPS:
            self._take_packet_size(stream, record)
        if record.packet_size != stream.packet_size:
            self._desk.note(
                logger,
                logging.WARNING,
                "new epoch: packet size differs",
                stream=stream.name,
                epoch=record.epoch,
                packet_size=stream.packet_size,
                packet_size_before=record.packet_size,
            )
            return stream, None
        if not self.attach(stream, record):
            return stream, None
        return stream, record

    def _begins_anew(self, stream: LiveStream, record: StreamRecord) -> bool:
        """Whether its client asked for a new epoch, not knowing the present one."""
        asked = self._desk.word(stream, Str.ASKED_EPOCH)
        new = self._desk.word(stream, Str.FLAGS) & StreamFlag.NEW_EPOCH
        return bool(new) and f"{asked:016x}" != record.epoch

    def _take_packet_size(self, stream: LiveStream, record: StreamRecord) -> None:
        """A client that says hello is told of it by whoever asked for the stream; it stays as it is."""
        stream.packet_size = record.packet_size
        self._desk.state.words[stream.base + Str.PACKET_SIZE] = record.packet_size

    def _fill(self, stream: LiveStream, record: StreamRecord) -> None:
        words, base = self._desk.state.words, stream.base
        for column in (Str.POSITION, Str.OFFERED, Str.STORED, Str.DURABLE, Str.STARTED_AT):
            words[base + column] = record.durable
        for column, value in (
            (Str.EPOCH, int(record.epoch, 16)),
            (Str.CREATED_UNIX_NS, record.created_unix_ns),
            (Str.CATALOG_ID, record.id),
            (Str.FIRST_OFFSET, record.first_offset),
            (Str.DROPPED, record.dropped),
            (Str.LOST, record.lost),
            (Str.STORED_HOLES, record.stored_holes),
            (Str.DURABLE_HOLES, record.stored_holes),
            (Str.RETIRED, record.retired),
            (Str.TRUNCATED, record.truncated),
            (Str.HANDSHAKE, record.handshake),
            (Str.SOCKET, record.socket),
            (Str.ACKED, record.acked),
            (Str.CHECK0 + Check.CHECKED, record.durable),
            (Str.CHECK0 + Check.GAPS, record.gaps),
            (Str.CHECK0 + Check.MISSING, record.missing),
            (Str.CHECK0 + Check.REPEATS, record.repeats),
            (Str.CHECK0 + Check.REORDERED, record.reordered),
            (Str.CHECK_SELECT, 0),
        ):
            words[base + column] = value

    # -- files of a stream that the catalog knows

    def attach(self, stream: LiveStream, record: StreamRecord) -> bool:
        """Take up the stream's directory and its open segment, which the caller wakes (``Desk.wake``). False, loudly,
        when its files are missing, too short or not to be used: that is this stream's trouble and nobody else's."""
        desk = self._desk
        segments = desk.catalog.segments(record.id)
        path = desk.path_of(record.directory)
        try:
            _check_directory(path)
            for segment in segments:
                _check_file(path, segment, record.durable)
        except (OSError, DamageError) as error:
            fault = advice(error) if isinstance(error, OSError) else str(error)
            desk.note(
                logger,
                logging.ERROR,
                "stream stopped: its files are not complete",
                MessageId.SPOOL_DAMAGED,
                stream=record.name,
                epoch=record.epoch,
                fault=fault,
            )
            return False
        stream.catalog_id = record.id
        stream.directory = path
        stream.directory_synced = bool(segments)
        stream.zeros_below = desk.catalog.last_hole_end(record.id)
        if segments and segments[-1].end is None:
            stream.segment = self._reopen(stream, segments[-1].first, record.durable)
        return True

    def _reopen(self, stream: LiveStream, first: int, durable: int) -> SegmentFile:
        """Its length is found when it is opened, its limit may not be the one that it was begun with."""
        size = self._desk.fitting_segment_bytes()
        file = SegmentFile(
            stream.directory, first, durable - durable % size + size, direct=self._desk.filesystem.direct
        )
        file.allocated = durable - first
        with contextlib.suppress(OSError):
            file.allocated = os.stat(file.path).st_size
        file.in_catalog = True
        return file

    # -- streams that offer their first packet

    def begin(self, streams: Sequence[LiveStream], now_unix_ns: int) -> None:
        """Commit their rows in the catalog. Raises sqlite3.Error; nothing has changed then."""
        desk = self._desk
        with desk.catalog.transaction():
            made = [(stream, self._begin(stream, now_unix_ns)) for stream in streams]
        for stream, (catalog_id, name, directory) in made:
            if name != stream.name:
                desk.state.set_stream_name(stream.row, name)
                stream.name = name
            stream.catalog_id = catalog_id
            stream.directory = desk.path_of(directory)
            record = desk.catalog.by_id(catalog_id)
            stream.identity = identity_of(record) if record is not None else b""
            desk.state.words[stream.base + Str.CATALOG_ID] = catalog_id

    def _begin(self, stream: LiveStream, now_unix_ns: int) -> tuple[int, str, str]:
        desk = self._desk
        epoch = f"{desk.word(stream, Str.EPOCH):016x}"
        record = desk.catalog.by_epoch(stream.name, epoch)
        if record is not None:  # a storer was killed right after it had committed this
            return record.id, record.name, record.directory
        name, directory = self._names(stream, epoch)
        durable = desk.word(stream, Str.DURABLE)
        catalog_id = desk.catalog.add_stream(
            StreamRecord(
                id=0,
                name=name,
                epoch=epoch,
                directory=directory,
                packet_size=stream.packet_size,
                layout=self._layout(stream),
                created_unix_ns=desk.word(stream, Str.CREATED_UNIX_NS) or now_unix_ns,
                connected=1,
                first_offset=durable,
                durable=durable,
                stored_holes=desk.word(stream, Str.DURABLE_HOLES),
                dropped=desk.word(stream, Str.DROPPED),
                lost=desk.word(stream, Str.LOST),
                truncated=0,
                handshake=0,
                socket=0,
                retired=desk.word(stream, Str.RETIRED),
                acked=0,
                gaps=0,
                missing=0,
                repeats=0,
                reordered=0,
                named=int(stream.named),
            )
        )
        return catalog_id, name, directory

    def _names(self, stream: LiveStream, epoch: str) -> tuple[str, str]:
        """Name and directory. A client's name stays; a name that was made up gives way to one that exists."""
        if stream.named and self._desk.catalog.current(stream.name) is not None:
            return stream.name, self._free_directory(f"{directory_name(stream.name)}@{epoch}")
        if stream.named:
            return stream.name, self._free_directory(directory_name(stream.name))
        for number in range(1, _NAMES_TRIED_MAX):
            name = _with_suffix(stream.name, number)
            if self._desk.catalog.current(name) is None and self._is_free(directory_name(name)):
                return name, directory_name(name)
        raise RuntimeError(f"{_NAMES_TRIED_MAX} streams are called like {stream.name}")

    def _free_directory(self, wanted: str) -> str:
        return next(
            directory
            for number in range(1, _NAMES_TRIED_MAX)
            if self._is_free(directory := wanted if number == 1 else f"{wanted}.{number}")
        )

    def _is_free(self, directory: str) -> bool:
        return not self._desk.catalog.directory_is_known(directory) and not os.path.lexists(
            self._desk.path_of(directory)
        )

    def _layout(self, stream: LiveStream) -> str | None:
        listener = self._desk.listeners.get(self._desk.word(stream, Str.LISTENER))
        if listener is None or listener.layout is None:
            return None
        layout = PacketLayout.from_config(self._desk.config.layouts[listener.layout])
        return layout.to_json() if layout.size == stream.packet_size else None


def directory_name(name: str) -> str:
    """The name, with what has a meaning in paths written as %XX; never hidden, never empty."""
    text = "".join(c if _SAFE.fullmatch(c) else "".join(f"%{byte:02X}" for byte in c.encode()) for c in name)
    return f"%2E{text[1:]}" if text.startswith(".") else text or "%"


def _with_suffix(name: str, number: int) -> str:
    if number == 1:
        return name
    suffix = f".{number}"
    return name.encode()[: STREAM_NAME_BYTES_MAX - len(suffix)].decode(errors="ignore") + suffix


def _check_directory(path: str) -> None:
    """Raises OSError when files cannot be made in it. One that is not there can be made."""
    try:
        kind = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(kind):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
    _check_permission(path, os.R_OK | os.W_OK | os.X_OK)


def _check_file(directory: str, segment: SegmentRecord, durable: int) -> None:
    """Raises DamageError when bytes are missing, OSError when the file cannot be used."""
    path = os.path.join(directory, segment_name(segment.first))
    needed = (durable if segment.end is None else segment.end) - segment.first
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise DamageError(f"{path} is missing") from None
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if found.st_size < needed:
        raise DamageError(f"{path} has {found.st_size} bytes, {needed} were durable")
    if segment.end is None:
        _check_permission(path, os.R_OK | os.W_OK)


def _check_permission(path: str, mode: int) -> None:
    """A file system that turned read-only is everybody's trouble, and passes: no reason for a new epoch."""
    if not os.access(path, mode, effective_ids=True) and not os.statvfs(path).f_flag & os.ST_RDONLY:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
