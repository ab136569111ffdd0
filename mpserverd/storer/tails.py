"""How far a segment file was really written, which its length does not say: place is allocated ahead, reads as zeros.

Facts: allocated place that was never written is a hole for SEEK_DATA on ext4, xfs, btrfs and tmpfs, and becomes data
only after the device has the bytes. So what lies in one piece of data was written whole. A file system that does not
tell calls the whole file data; then the last byte that is not zero is all there is to go by.

It knows no offsets of streams: everything here is bytes of one file.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence

Extent = tuple[int, int]
"""File bytes [first, end)."""

_READ_BYTES = 1 << 20
_NO_ANSWER = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY}


def data_extents(descriptor: int, first: int, end: int) -> Iterator[Extent]:
    """What of [first, end) may hold data, in order."""
    at = first
    while at < end:
        try:
            begin = os.lseek(descriptor, at, os.SEEK_DATA)
            stop = os.lseek(descriptor, begin, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data from here on
                return
            if error.errno not in _NO_ANSWER:
                raise
            begin, stop = at, end
        if begin >= end:
            return
        yield begin, min(stop, end)
        at = stop


def in_one_piece(descriptor: int, first: int, end: int, zeros: Sequence[Extent] = ()) -> int:
    """Where the data that begin at ``first`` end; ``zeros`` are parts that need not be there, sorted."""
    at = first
    for begin, stop in sorted([*data_extents(descriptor, first, end), *zeros]):
        if begin > at:
            break
        at = max(at, stop)
    return min(at, end)


def last_written(descriptor: int, first: int, end: int) -> int:
    """One past the last byte of [first, end) that is not zero; ``first`` when there is none."""
    for begin, stop in reversed(list(data_extents(descriptor, first, end))):
        at = stop
        while at > begin:
            start = max(begin, at - _READ_BYTES)
            piece = os.pread(descriptor, at - start, start).rstrip(b"\0")
            if piece:
                return start + len(piece)
            at = start
    return first


def written_behind(path: str, length: int) -> int:
    """How many bytes of a file may have been written behind its first ``length``. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        return max(0, last_written(descriptor, length, size) - length) if size > length else 0
    finally:
        os.close(descriptor)
