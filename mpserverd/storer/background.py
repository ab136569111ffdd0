"""What can wait: unlinking what retention gave up, and the checksums of sealed segments.

One thread of the lowest priority. Checksums are made only while the storer writes little, a piece at a time, from the
file itself, which does not stay in the page cache for it. The catalog is not touched here: whoever owns it collects
the results.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterable

from mpserverd import log
from mpserverd.log import MessageId
from mpserverd.storer.advice import advice
from mpserverd.storer.sidecar import remove_retired

logger = logging.getLogger(__name__)

PIECE_BYTES = 1 << 20
PAUSE_S = 0.2
"""While the storer is busy, so often is looked whether it still is."""
_NICE_LEAST = 19

Sealed = tuple[int, str, int, int]
"""(stream, directory, first, end)."""
Sum = tuple[str, int, int, int]
"""(sha256, stream, first, end)."""


class Background:
    """``unlink`` and ``add`` give it work, ``sums`` is what came of it. ``busy`` holds checksums up."""

    def __init__(self) -> None:
        self.busy = False
        self.sums: collections.deque[Sum] = collections.deque()
        self.unreadable: set[tuple[int, int]] = set()
        """(stream, first) of segments that are not tried again by this process: the others shall have their turn."""
        self.unlinked_bytes = 0
        """Of all segments whose files are gone, or could not be removed."""
        self._paths: collections.deque[tuple[str, int]] = collections.deque()
        self._sealed: collections.deque[tuple[str, Sealed]] = collections.deque()
        self._asked = threading.Event()
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def has_sums_to_make(self) -> bool:
        return bool(self._sealed)

    def unlink(self, path: str, size_bytes: int) -> None:
        """A file, or the directory of a retired stream: that ends with a slash."""
        self._paths.append((path, size_bytes))
        self._ask()

    def add(self, path: str, sealed: Sealed) -> None:
        self._sealed.append((path, sealed))
        self._ask()

    def close(self) -> None:
        """Let go of what is not done: a successor finds it in the catalog and in the directories."""
        self._closed = True
        self._asked.set()
        if self._thread is not None:
            self._thread.join()

    def finish(self, paths: Iterable[tuple[str, int]], until_s: float) -> None:
        """For a stop: close, and unlink these and what is left, until then (monotonic). The rest is a successor's."""
        self.close()
        self._paths.extend(paths)
        while self._paths and time.monotonic() < until_s:
            _unlink(self._paths.popleft()[0])

    def _ask(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="background", daemon=True)
            self._thread.start()
        self._asked.set()

    def _work(self) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE_LEAST)
        while not self._closed:
            self._asked.wait()
            self._asked.clear()
            while (self._paths or self._sealed) and not self._closed:
                self._unlink_all()
                if self._sealed:
                    path, sealed = self._sealed[0]
                    self._sum(path, sealed)
                    self._sealed.popleft()

    def _unlink_all(self) -> None:
        while self._paths and not self._closed:
            path, size_bytes = self._paths[0]
            _unlink(path)
            self.unlinked_bytes += size_bytes
            self._paths.popleft()

    def _sum(self, path: str, sealed: Sealed) -> None:
        stream, _, first, end = sealed
        try:
            digest = self._digest(path, end - first)
        except FileNotFoundError:
            self.unreadable.add((stream, first))  # retired meanwhile, or somebody took it away
            return
        except InterruptedError:
            return
        except OSError as error:
            log.event(
                logger,
                logging.ERROR,
                "sealed segment not readable",
                message_id=MessageId.SPOOL_DAMAGED,
                file=path,
                error=advice(error),
            )
            self.unreadable.add((stream, first))
            return
        self.sums.append((digest, stream, first, end))

    def _digest(self, path: str, length: int) -> str:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(PIECE_BYTES))
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            at = 0
            while at < length:
                if self._closed:
                    raise OSError(errno.EINTR, "the storer leaves")
                self._unlink_all()  # room that somebody waits for, perhaps
                while self.busy and not self._closed:
                    self._unlink_all()
                    self._asked.wait(PAUSE_S)
                    self._asked.clear()
                got = os.preadv(descriptor, [buffer[: min(PIECE_BYTES, length - at)]], at)
                if got == 0:
                    raise OSError(errno.EIO, f"it ends at byte {at} of {length}")
                digest.update(buffer[:got])
                at += got
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
        return digest.hexdigest()


def _unlink(path: str) -> None:
    try:
        if path.endswith(os.sep):
            remove_retired(path)
        else:
            os.unlink(path)
    except FileNotFoundError:
        return
    except OSError as error:
        log.event(logger, logging.ERROR, "retired file not removed", file=path, error=advice(error))
