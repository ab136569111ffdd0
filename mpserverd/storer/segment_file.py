"""One segment file that is being written, and its time index.

A segment holds stream offsets [first, limit); its file byte is the offset minus ``first``. Place is allocated ahead in
doubling steps, so that a full disk shows before anything is acknowledged and direct writes find blocks. Where the file
system allows it, files are opened with O_DIRECT; a segment that begins inside a block (after an earlier file failed)
cannot be, because memory and file would not line up.

It decides neither what is written nor when it is durable.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct

from mpserverd.storer import filesystem
from mpserverd.storer.filesystem import BLOCK_BYTES
from mpserverd.storer.space import Space

FIRST_STEP_BYTES = 1 << 20
FILE_MODE = 0o640
DIRECTORY_MODE = 0o750
INDEX_PAIR = struct.Struct("<QQ")
_MEND_BYTES = 4096 * INDEX_PAIR.size


def segment_name(first: int) -> str:
    return f"{first:020d}.seg"


def index_name(first: int) -> str:
    return f"{first:020d}.idx"


def early_name(first: int) -> str:
    """A next segment before its first byte; recovery removes what has this name."""
    return f"{first:020d}.new"


class SegmentFile:
    """``allocated`` is the file's length. ``in_catalog``: its row is committed. ``fresh``: made empty by us.
    ``device``: of the file system that it is on, which may be another one behind a link."""

    __slots__ = (
        "allocated",
        "block",
        "device",
        "directory",
        "early",
        "fd",
        "first",
        "fresh",
        "in_catalog",
        "index_mended",
        "limit",
    )

    def __init__(self, directory: str, first: int, limit: int, *, direct: bool) -> None:
        self.directory = directory
        self.first = first
        self.limit = limit
        self.block = BLOCK_BYTES if direct and first % BLOCK_BYTES == 0 and limit % BLOCK_BYTES == 0 else 1
        self.fd = -1
        self.allocated = self.device = 0
        self.fresh = self.in_catalog = self.index_mended = self.early = False

    @property
    def path(self) -> str:
        return os.path.join(self.directory, early_name(self.first) if self.early else segment_name(self.first))

    def create(self) -> None:
        """Make the file. One that is there was left by a storer that was killed before its commit: it is written again
        with the same bytes."""
        try:
            self.fd = self._open(os.O_CREAT | os.O_EXCL)
            self.fresh = True
            self.device = os.fstat(self.fd).st_dev
        except FileExistsError:
            self.open()

    def open(self) -> None:
        """Open a file that is there. Raises FileNotFoundError."""
        self.fd = self._open(0)
        found = os.fstat(self.fd)
        self.allocated, self.device = found.st_size, found.st_dev

    def _open(self, flags: int) -> int:
        flags |= os.O_RDWR | os.O_CLOEXEC
        if self.block > 1:
            try:
                return os.open(self.path, flags | os.O_DIRECT, FILE_MODE)
            except FileExistsError:
                raise
            except OSError as error:
                if error.errno != errno.EINVAL:  # the file system does not do it after all
                    raise
                self.block = 1
                flags &= ~os.O_EXCL  # the refused open may have made it
        return os.open(self.path, flags, FILE_MODE)

    def close(self) -> None:
        if self.fd >= 0:
            descriptor, self.fd = self.fd, -1
            with contextlib.suppress(OSError):  # what was promised was synced before
                os.close(descriptor)

    def begin(self) -> None:
        """An early file becomes the stream's segment."""
        os.rename(self.path, os.path.join(self.directory, segment_name(self.first)))
        self.early = False

    # -- length

    def next_step(self, at_least: int) -> int:
        """Length to grow to, so that the file holds ``at_least`` bytes."""
        size = max(FIRST_STEP_BYTES, 2 * self.allocated)
        while size < at_least:
            size *= 2
        return min(size + -size % BLOCK_BYTES, self.limit - self.first)

    def grow(self, at_least: int, space: Space) -> None:
        """Allocate so much, and a step ahead as far as there is place. Raises OSError with ENOSPC when the disk, or
        what it must keep free, has none for ``at_least``."""
        if at_least <= self.allocated:
            return
        step = self.next_step(at_least)
        least = min(at_least + -at_least % BLOCK_BYTES, step)
        while True:
            try:
                self._allocate(step - self.allocated, space)
                break
            except OSError as error:
                if error.errno not in filesystem.NO_SPACE or step == least:
                    raise
            step = max(least, least + (step - least) // 2 // BLOCK_BYTES * BLOCK_BYTES)
        self.allocated = step

    def _allocate(self, more: int, space: Space) -> None:
        space.take(more)
        try:
            filesystem.allocate(self.fd, self.allocated, more)
        except OSError:
            space.give_back(more)
            with contextlib.suppress(OSError):  # part of it may have been given: others can use that
                os.ftruncate(self.fd, self.allocated)
            raise

    def cut(self, length: int) -> bool:
        """Make the file exactly so long. True when that changed it."""
        if length == self.allocated:
            return False
        os.ftruncate(self.fd, length)
        self.allocated = length
        return True

    def make_zero(self, first: int, end: int) -> None:
        """Stream offsets [first, end) are a hole. What a killed storer may have left there goes."""
        first, end = max(first, self.first), min(end, self.first + self.allocated)
        if not self.fresh and first < end:
            filesystem.make_zero(self.fd, first - self.first, end - first)

    # -- time index

    def append_index(self, durable: int, offset: int, unix_ns: int) -> int:
        """Add a pair; ``durable`` is what the catalog says now. The caller syncs and closes the descriptor."""
        path = os.path.join(self.directory, index_name(self.first))
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, FILE_MODE)
        try:
            if not self.index_mended:
                mend_index(descriptor, durable)
                self.index_mended = True
            os.write(descriptor, INDEX_PAIR.pack(offset, unix_ns))
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def mend_index(self, durable: int) -> None:
        """Cut what was added to the time index ahead of a commit that never came. It is no promise: errors pass."""
        with contextlib.suppress(OSError):
            path = os.path.join(self.directory, index_name(self.first))
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                mend_index(descriptor, durable)
                self.index_mended = True
            finally:
                os.close(descriptor)

    def remove(self) -> None:
        """Unlink a file in which nothing was ever acknowledged."""
        self.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


def mend_index(descriptor: int, durable: int) -> None:
    """Cut what an earlier process wrote ahead of its commit, or only in part."""
    size = os.fstat(descriptor).st_size
    keep = size - size % INDEX_PAIR.size
    while keep:
        start = max(0, keep - _MEND_BYTES)
        tail = os.pread(descriptor, keep - start, start)
        while tail and INDEX_PAIR.unpack_from(tail, len(tail) - INDEX_PAIR.size)[0] > durable:
            tail = tail[: -INDEX_PAIR.size]
        keep = start + len(tail)
        if tail:
            break
    if keep != size:
        os.ftruncate(descriptor, keep)


def rename_aside(path: str) -> str:
    """Give the file a name that nobody uses, and return that. A file that is gone is none. Raises OSError."""
    for number in range(1, 1_000_000):
        name = f"{path}.aside" if number == 1 else f"{path}.{number}.aside"
        if not os.path.lexists(name):
            try:
                os.rename(path, name)
            except FileNotFoundError:
                return path
            return name
    raise RuntimeError(f"a million files were set aside beside {path}")
