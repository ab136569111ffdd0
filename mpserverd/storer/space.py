"""Free space of the spool's file system: what may be allocated, and the ballast that a full disk gives back.

``[spool] min_free_bytes`` is kept by refusing to allocate, as a full disk would. The ballast is a preallocated file
beside the catalog: when the disk is full it goes first, because retention must commit before it can unlink, and the
commit itself needs space.

It does not decide what is removed; that is retention's.
"""

from __future__ import annotations

import contextlib
import errno
import os

from mpserverd.storer import filesystem

BALLAST_FILE = "ballast"
BALLAST_BYTES_MAX = 16 << 20
BALLAST_SHARE = 64
"""At most this part of the file system."""
_BALLAST_BYTES_MIN = 64 << 10


class Space:
    """``free_bytes`` is what the file system said last, less what was allocated since."""

    def __init__(self, streams: str, min_free_bytes: int, *, ballast_in: str) -> None:
        self._streams = streams
        self._ballast_in = ballast_in
        self._ballast = os.path.join(ballast_in, BALLAST_FILE)
        self.min_free_bytes = min_free_bytes
        self.free_bytes = 0
        self.refused_bytes = 0
        """What was asked for last and not given; retention makes place for it."""
        self.measure()

    def measure(self) -> None:
        self.free_bytes = filesystem.free_bytes(self._streams)

    @property
    def short_bytes(self) -> int:
        """How much is missing to what must be kept free, and to what was refused because of that."""
        return max(0, self.min_free_bytes + self.refused_bytes - self.free_bytes) if self.min_free_bytes else 0

    def take(self, count: int) -> None:
        """Raises OSError with ENOSPC when ``count`` more bytes would leave less free than must be kept."""
        if self.min_free_bytes and self.free_bytes - count < self.min_free_bytes:
            self.refused_bytes = max(self.refused_bytes, count)
            raise OSError(errno.ENOSPC, f"{self.free_bytes} bytes are free, {self.min_free_bytes} must stay free")
        self.free_bytes -= count

    def give_back(self, count: int) -> None:
        self.free_bytes += count

    # -- ballast

    def drop_ballast(self) -> bool:
        """True when there was one."""
        try:
            os.unlink(self._ballast)
        except OSError:
            return False
        self.measure()
        return True

    def make_ballast(self) -> None:
        """If there is none, and place enough for two."""
        found = os.statvfs(self._ballast_in)
        size = min(BALLAST_BYTES_MAX, found.f_blocks * found.f_frsize // BALLAST_SHARE)
        if (
            size < _BALLAST_BYTES_MIN
            or os.path.exists(self._ballast)
            or self.free_bytes < 2 * size + self.min_free_bytes
        ):
            return
        with contextlib.suppress(OSError):  # then there is none; the next call tries again
            descriptor = os.open(self._ballast, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                filesystem.allocate(descriptor, 0, size)
            finally:
                os.close(descriptor)
