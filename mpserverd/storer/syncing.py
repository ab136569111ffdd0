"""Making what was written durable, names first and device caches included.

One file: fdatasync. Many: one syncfs, which on ext4 flushes the device; on xfs it may find a clean log and flush
nothing, so one of the files is fdatasynced after it. New names need their directories synced; a syncfs does that too.
A stream's directory may be a link to another file system, of which a syncfs knows nothing: its files go one by one.

A failed sync is not repeated: the kernel says it once, and a second call would claim that all is well.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence

from mpserverd.storer import filesystem, sidecar
from mpserverd.storer.filesystem import WholeSync
from mpserverd.storer.live import Desk
from mpserverd.storer.placing import Work

WHOLE_SYNC_FILES = 4
"""From so many files on one syncfs is cheaper than an fdatasync each (ext4, 16 KiB a file): 0.38 against 0.57 ms for 4
files, 30 against 64 ms for 512."""
SLOW_SYNC_S = 0.5
SLOW_SYNC_FILES_MAX = 1000
AVOID_S = 30.0
"""syncfs writes back everybody's data. One that took SLOW_SYNC_S for few files of ours met a stranger's: avoid it."""


class Syncing:
    """``sync`` makes a cycle's files durable and gives errors to the works that they concern."""

    def __init__(self, desk: Desk, *, wanted: bool) -> None:
        self._desk = desk
        self._wanted = wanted
        self._avoid_until_s = 0.0
        self._device = os.fstat(desk.root).st_dev

    def sync(self, works: Sequence[Work]) -> None:
        try:
            if self._wanted:
                self._sync([work for work in works if work.error is None and work.touched])
        finally:
            for descriptor in [*_indexes(works), *(note for work in works for note in work.notes)]:
                os.close(descriptor)
        for work in works:
            if work.error is None and work.touched:
                work.stream.directory_synced = True

    def _sync(self, works: Sequence[Work]) -> None:
        whole, alone = self._desk.filesystem.whole_sync, works
        if whole is not WholeSync.NONE and time.monotonic() >= self._avoid_until_s:
            together, alone = self._parted(works)
            count = sum(len(work.touched) for work in together)
            if count >= WHOLE_SYNC_FILES:
                self._sync_whole(together, count)
            else:
                alone = works
        if alone:
            self._sync_each(alone)

    def _parted(self, works: Sequence[Work]) -> tuple[Sequence[Work], Sequence[Work]]:
        """Those whose files are all on the spool's file system, and the others."""
        if {file.device for work in works for file in work.touched} <= {self._device}:  # 1 ms with 10,000 streams
            return works, []
        elsewhere = [any(file.device != self._device for file in work.touched) for work in works]
        pairs = list(zip(works, elsewhere, strict=True))
        return [work for work, is_there in pairs if not is_there], [work for work, is_there in pairs if is_there]

    def _sync_whole(self, works: Sequence[Work], count: int) -> None:
        began_s = time.monotonic()
        self._desk.counters.add("syncs")
        try:
            sync_whole(self._desk, works[0].touched[0].fd)
        except OSError as error:
            for work in works:  # it covered them all, and does not say which failed
                work.fail_sync(error, *work.touched)
            return
        took_s = time.monotonic() - began_s
        if took_s > SLOW_SYNC_S and count < SLOW_SYNC_FILES_MAX:
            self._avoid_until_s = began_s + took_s + AVOID_S

    def _sync_each(self, works: Sequence[Work]) -> None:
        syncs = 0
        for work in works:
            for file in work.touched:
                syncs += 1
                try:
                    os.fdatasync(file.fd)
                except OSError as error:
                    work.fail_sync(error, file)
            for descriptor in work.notes:
                syncs += 1
                try:
                    os.fdatasync(descriptor)
                except OSError as error:
                    work.fail_sync(error)
        for descriptor in _indexes(works):
            syncs += 1
            _sync_quietly(descriptor)
        self._desk.counters.add("syncs", syncs)
        self._sync_names(works)

    def _sync_names(self, works: Iterable[Work]) -> None:
        parent_synced = False
        for work in works:
            if work.error is not None or not work.begun:
                continue
            try:
                if not work.stream.directory_synced and work.stream.identity:
                    sidecar.sync(work.stream.directory)
                filesystem.sync_directory(work.stream.directory)
                if not work.stream.directory_synced and not parent_synced:
                    filesystem.sync_directory(self._desk.streams_path)
                    parent_synced = True
            except OSError as error:
                work.fail_sync(error, work.begun[-1])


def sync_whole(desk: Desk, descriptor: int) -> None:
    """Make everything below ``streams`` durable; ``descriptor`` is of one of the files that were written or cut."""
    filesystem.syncfs(desk.root)
    if desk.filesystem.whole_sync is WholeSync.SYNCFS_AND_FILE:
        os.fdatasync(descriptor)


def _indexes(works: Sequence[Work]) -> list[int]:
    return [part.index_fd for work in works for part in work.parts if part.index_fd >= 0]


def _sync_quietly(descriptor: int) -> None:
    """The time index is a help for people: what it lacks after a power cut, it lacks."""
    try:
        os.fdatasync(descriptor)
    except OSError:
        return
