"""Writes what the directory of a stream says about itself (streams/sidecar.py), durable before positions inside are.

``identity_of`` when a stream gets its row, ``put`` when it gets its directory, ``sync`` in the same cycle, before the
commit. ``note_holes`` with the bytes behind them. A stream of an older version gets its identity at the next start.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence

from mpserverd.storer.catalog import StreamRecord
from mpserverd.storer.segment_file import FILE_MODE
from mpserverd.streams.sidecar import HOLE_ENTRY, IDENTITY_FILE, RETIRED_FILE, Identity, encode_holes, holes_name

STREAM_SUFFIXES = (".seg", ".idx", ".holes", ".new")


def identity_of(record: StreamRecord) -> bytes:
    """Content of ``stream.json``."""
    return Identity(
        number=record.id,
        name=record.name,
        epoch=record.epoch,
        packet_size=record.packet_size,
        layout=record.layout,
        named=bool(record.named),
        created_unix_ns=record.created_unix_ns,
        start=record.first_offset,
    ).encode()


def put(directory: str, identity: bytes) -> None:
    """Write it, also over one that a killed storer left half written. Raises OSError."""
    descriptor = os.open(
        os.path.join(directory, IDENTITY_FILE), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE
    )
    try:
        os.pwrite(descriptor, identity, 0)
        if os.fstat(descriptor).st_size != len(identity):
            os.ftruncate(descriptor, len(identity))
    finally:
        os.close(descriptor)


def retire(directory: str) -> None:
    """Before the stream's row goes: its files are nobody's then, and a storer that finds them removes them."""
    with contextlib.suppress(FileNotFoundError):
        os.rename(os.path.join(directory, IDENTITY_FILE), os.path.join(directory, RETIRED_FILE))


def is_retired(directory: str) -> bool:
    return os.path.lexists(os.path.join(directory, RETIRED_FILE))


def take_back(directory: str) -> None:
    """A storer was killed before the row went."""
    os.rename(os.path.join(directory, RETIRED_FILE), os.path.join(directory, IDENTITY_FILE))


def remove_retired(directory: str) -> None:
    """The directory of a stream that has no row any more, all but what was set aside there. Its identity may be
    missing, or still be called so. Raises OSError."""
    for name in os.listdir(directory):
        if name.endswith(STREAM_SUFFIXES):
            os.unlink(os.path.join(directory, name))
    left = os.listdir(directory)
    if set(left) <= {RETIRED_FILE, IDENTITY_FILE}:
        for name in left:
            os.unlink(os.path.join(directory, name))
        os.rmdir(directory)


def sync(directory: str) -> None:
    """The content; the name goes with the directory. Raises OSError."""
    descriptor = os.open(os.path.join(directory, IDENTITY_FILE), os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def note_holes(directory: str, segment: tuple[int, int], holes: Iterable[tuple[int, int, int]], durable: int) -> int:
    """Add the holes that reach into ``segment`` (first, limit). Returns a descriptor to sync and close, or -1 for none.

    What was noted behind ``durable`` by somebody who died before his commit is cut. Raises OSError.
    """
    first, limit = segment
    ours = [hole for hole in holes if hole[0] < limit and hole[1] > first]
    if not ours:
        return -1
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    descriptor = os.open(os.path.join(directory, holes_name(first)), flags, FILE_MODE)
    try:
        _mend(descriptor, durable)
        os.write(descriptor, encode_holes(ours))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def cut_holes(directory: str, firsts: Sequence[int], durable: int) -> None:
    """Forget holes behind ``durable``: the stream goes on there, with other bytes. Raises OSError."""
    for first in firsts:
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(os.path.join(directory, holes_name(first)), os.O_RDWR | os.O_CLOEXEC)
            try:
                _mend(descriptor, durable)
            finally:
                os.close(descriptor)


def _mend(descriptor: int, durable: int) -> None:
    """Cut a torn entry at the end, and those that begin at or behind ``durable``."""
    size = os.fstat(descriptor).st_size
    keep = size - size % HOLE_ENTRY.size
    while keep and HOLE_ENTRY.unpack(os.pread(descriptor, HOLE_ENTRY.size, keep - HOLE_ENTRY.size))[0] >= durable:
        keep -= HOLE_ENTRY.size
    if keep != size:
        os.ftruncate(descriptor, keep)
