"""Free space of the spool's file system: what may be allocated, and the ballast that a full disk gives back.

``[spool] min_free_bytes`` is kept by refusing to allocate, as a full disk would. The ballast is a preallocated file
beside the catalog: when the disk is full it goes first, because retention must commit before it can unlink, and the
commit itself needs space. While there is no ballast, segments do not get what it would take: that is the catalog's.

It does not decide what is removed; that is retention's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3

from mpserverd.storer import filesystem

BALLAST_FILE = "ballast"
BALLAST_BYTES_MAX = 16 << 20
BALLAST_SHARE = 64
"""At most this part of the file system."""
_BALLAST_BYTES_MIN = 64 << 10
_CATALOG_BYTES = 256 << 10
"""With less the catalog has no place: a log, its index, and a commit."""
HEADROOM_S = 2
"""Retention makes place for what was allocated in so many of its looks, so that nobody has to wait for it."""
HEADROOM_SHARE = 16
"""But at most this part of the file system: one burst shall not cost what is kept."""


class Space:
    """``free_bytes`` is what the file system said last, less what was allocated since."""

    def __init__(self, streams: str, min_free_bytes: int, *, ballast_in: str) -> None:
        self._streams = streams
        self._ballast_in = ballast_in
        self._ballast = os.path.join(ballast_in, BALLAST_FILE)
        self._one_disk = os.stat(streams).st_dev == os.stat(ballast_in).st_dev
        self._reserve_bytes = 0
        self.min_free_bytes = min_free_bytes
        self.free_bytes = 0
        self.refused_bytes = 0
        """What was asked for last and not given; retention makes place for it."""
        self._taken_bytes = 0
        self.headroom_bytes = 0
        """What segments will ask for soon."""
        self.leaving_bytes = 0
        """Of segments that were given up and whose files may still be there."""
        self.measure()

    def measure(self) -> None:
        self.free_bytes = filesystem.free_bytes(self._streams)

    def look(self) -> None:
        """Once a second: measure, and reckon what is asked for soon."""
        self.measure()
        wanted = max(HEADROOM_S * self._taken_bytes, self.headroom_bytes // 2)
        self.headroom_bytes = min(wanted, filesystem.size_bytes(self._streams) // HEADROOM_SHARE)
        self._taken_bytes = 0

    @property
    def kept_bytes(self) -> int:
        """What segments may not take."""
        return max(self.min_free_bytes, self._reserve_bytes)

    @property
    def short_bytes(self) -> int:
        """How much is missing to what must be kept free and to what is asked for. 0 when nothing must be kept free."""
        if not self.min_free_bytes:
            return 0
        wanted = self.min_free_bytes + max(self.refused_bytes, self.headroom_bytes)
        return max(0, wanted - self.free_bytes - self.leaving_bytes)

    def take(self, count: int) -> None:
        """Raises OSError with ENOSPC when ``count`` more bytes would leave less free than must be kept."""
        kept = self.kept_bytes
        if kept and self.free_bytes - count < kept:
            self.measure()  # somebody may have made room since the last look
            if self.free_bytes - count < kept:
                self.refused_bytes = max(self.refused_bytes, count)
                raise OSError(errno.ENOSPC, f"{self.free_bytes} bytes are free, {kept} must stay free")
        self.free_bytes -= count
        self._taken_bytes += count

    def give_back(self, count: int) -> None:
        self.free_bytes += count
        self._taken_bytes -= count

    def is_reason_of(self, error: sqlite3.Error) -> bool:
        """Whether the catalog's disk is full. SQLite calls a quota, and a log that cannot be made, by other names."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):
            return not filesystem.has_place(self._ballast_in, _CATALOG_BYTES)
        return code == sqlite3.SQLITE_FULL

    # -- ballast

    def drop_ballast(self) -> bool:
        """True when there was one."""
        try:
            size = os.stat(self._ballast).st_size
            os.unlink(self._ballast)
        except OSError:
            return False
        self._keep_for_catalog(size)
        self.measure()
        return True

    def _ballast_bytes(self) -> int:
        try:
            return os.stat(self._ballast).st_size
        except OSError:
            return 0

    def _keep_for_catalog(self, count: int) -> None:
        self._reserve_bytes = count if self._one_disk else 0

    def make_ballast(self) -> None:
        """If there is none, or only the beginning of one, and place enough for two."""
        found = os.statvfs(self._ballast_in)
        size = min(BALLAST_BYTES_MAX, found.f_blocks * found.f_frsize // BALLAST_SHARE)
        if size < _BALLAST_BYTES_MIN or self._ballast_bytes() >= size:
            return
        self._keep_for_catalog(size)
        if found.f_bavail * found.f_frsize < 2 * size + self.min_free_bytes:
            return
        with contextlib.suppress(OSError):  # then there is none; the next call tries again
            descriptor = os.open(self._ballast, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                filesystem.allocate(descriptor, 0, size)
                if os.fstat(descriptor).st_size < size:
                    raise OSError(errno.EOPNOTSUPP, "this file system keeps no place")
                self._reserve_bytes = 0
            except OSError:
                os.unlink(self._ballast)
                raise
            finally:
                os.close(descriptor)
