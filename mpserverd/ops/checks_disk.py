"""Checks of the spool's disk: space, file system, and, when asked for, speed. The rows stand in doctor.py.

Only the probe writes: one file of a few MiB in the spool, bounded in time, removed whatever happens.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mpserverd.ops.findings import Finding, fault, note, ok, warning
from mpserverd.ops.site import Site
from mpserverd.storer import filesystem

PROBE_BYTES = 16 << 20
PROBE_BLOCK_BYTES = 1 << 20
PROBE_SYNCS = 8
PROBE_S_MAX = 3.0
PROBE_PREFIX = ".doctor-"
SYNC_SLOW_S = 0.1
"""A commit that takes longer than the default commit_interval_s sets the pace."""
INODES_LOW = 10_000

_MEMORY_FILE_SYSTEMS = {0x0102_1994: "tmpfs", 0x8584_58F6: "ramfs"}
_OTHER_FILE_SYSTEMS = {
    0x6969: "nfs",
    0xFF53_4D42: "cifs",
    0xFE53_4D42: "smb",
    0x0102_1997: "9p",
    0x6573_5546: "fuse",
    0x794C_7630: "overlayfs",
    0x9123_683E: "btrfs",
    0x2FC1_2FC1: "zfs",
    0xF2F5_2010: "f2fs",
}
_NETWORK_FILE_SYSTEMS = {"nfs", "cifs", "smb", "9p"}
_MOVE = "put the spool on ext4 or xfs: [spool] path"


_OUT_OF_REACH = "all segments together could not make the room, so none goes for it, and nothing more is stored"


def spool_directory(site: Site) -> Path:
    """The spool, or the nearest directory above it that is there."""
    path = Path(site.settings.spool.path)
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


# -- space


def space(site: Site) -> Iterator[Finding]:
    """What is free against what must stay free, and whether max_bytes can ever be reached."""
    spool = site.settings.spool
    directory = spool_directory(site)
    there = os.statvfs(directory)
    free, held = there.f_bavail * there.f_frsize, _held_bytes(Path(spool.path))
    if there.f_files and there.f_favail < INODES_LOW:
        yield warning(f"{directory}: {there.f_favail:,} files may still be made, {INODES_LOW:,} are wanted", "df -i")
    if free < spool.min_free_bytes:
        is_enough = free + held >= spool.min_free_bytes
        yield fault(
            f"{directory}: {free:,} bytes are free, spool.min_free_bytes is {spool.min_free_bytes:,}: "
            + ("retention removes the oldest segments for it" if is_enough else _OUT_OF_REACH),
            f"du -xh {directory} | sort -h | tail; free space, or lower min_free_bytes",
        )
        return
    reachable = held + free - spool.min_free_bytes
    if not spool.max_bytes:
        yield note(
            f"{directory}: {free:,} bytes are free, spool.max_bytes is 0: streams grow until "
            f"{spool.min_free_bytes:,} bytes are left",
            "set [spool] max_bytes; mpserverctl plan says how much",
        )
    elif reachable < spool.max_bytes:
        yield warning(
            f"{directory}: spool.max_bytes is {spool.max_bytes:,}, the disk has room for {reachable:,} "
            f"({held:,} held, {free:,} free, {spool.min_free_bytes:,} stay free): retention comes earlier",
            f"lower max_bytes to {reachable}, or use a larger disk",
        )
    else:
        yield ok(f"{directory}: {free:,} bytes are free, {held:,} of at most {spool.max_bytes:,} are held")


def _held_bytes(spool: Path) -> int:
    """Allocated size of all segments."""
    total = 0
    with contextlib.suppress(OSError), os.scandir(spool / "streams") as streams:
        for stream in streams:
            with contextlib.suppress(OSError), os.scandir(stream.path) as files:
                total += sum(file.stat(follow_symlinks=False).st_blocks * 512 for file in files)
    return total


# -- file system


def file_system(site: Site) -> Iterator[Finding]:
    """Direct writes cost a third of buffered ones, and a file system in memory keeps nothing."""
    directory = spool_directory(site)
    if os.statvfs(directory).f_flag & os.ST_RDONLY:
        yield fault(f"{directory}: mounted read-only", f"findmnt -T {directory}; mount -o remount,rw ...")
        return
    found = filesystem.probe(str(directory))
    number = int(found.name, 16) if found.name.startswith("0x") else 0
    name = _MEMORY_FILE_SYSTEMS.get(number) or _OTHER_FILE_SYSTEMS.get(number) or found.name
    where = f"{directory}: {name}"
    if number in _MEMORY_FILE_SYSTEMS:
        yield fault(f"{where} is memory: nothing of it is there after a restart of the machine", _MOVE)
    elif name in _NETWORK_FILE_SYSTEMS:
        yield fault(f"{where} is a network file system: its syncs and locks are not what the storer needs", _MOVE)
    elif not found.direct:
        yield warning(f"{where}: no O_DIRECT, so writes are buffered: about 33 ns more a packet than 2.5", _MOVE)
    else:
        yield ok(f"{where}, written past the page cache (O_DIRECT), synced by {found.whole_sync.value}")


# -- speed


def speed(site: Site) -> Iterator[Finding]:
    """Only with ``--probe``: how fast the spool's disk writes and syncs, against what comes in."""
    if not site.probe:
        yield ok("not measured; --probe does")
        return
    directory = spool_directory(site)
    if os.statvfs(directory).f_bavail * os.statvfs(directory).f_frsize < site.settings.spool.min_free_bytes:
        yield note(f"{directory}: not measured, because less than spool.min_free_bytes is free")
        return
    try:
        bytes_per_s, sync_s, direct = measure(directory)
    except OSError as error:
        yield fault(f"{directory}: {PROBE_BYTES:,} bytes could not be written: {error.strerror}", "dmesg | tail")
        return
    how = "O_DIRECT" if direct else "buffered, synced"
    text = f"{directory}: {bytes_per_s:,.0f} bytes/s ({how}), {1000 * sync_s:.1f} ms a sync"
    incoming = _incoming_bytes_per_s(site)
    if incoming > bytes_per_s:
        yield fault(f"{text}; {incoming:,.0f} bytes/s come in", _MOVE + " on a faster disk")
    elif sync_s > max(SYNC_SLOW_S, site.settings.spool.commit_interval_s):
        yield warning(f"{text}; commit_interval_s is {site.settings.spool.commit_interval_s:g} s", "iostat -x 1")
    else:
        yield ok(text)


def measure(directory: Path) -> tuple[float, float, bool]:
    """Bytes/s of large writes, the median of small synced ones in s, and whether O_DIRECT was used. Raises OSError."""
    descriptor, path = tempfile.mkstemp(prefix=PROBE_PREFIX, dir=directory)
    os.close(descriptor)
    try:
        descriptor, direct = _open_direct(path, wanted=filesystem.probe(str(directory)).direct)
        try:
            return (*_measure(descriptor), direct)
        finally:
            os.close(descriptor)
    finally:
        os.unlink(path)


def _open_direct(path: str, *, wanted: bool) -> tuple[int, bool]:
    if wanted:
        with contextlib.suppress(OSError):
            return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC), True
    return os.open(path, os.O_WRONLY | os.O_CLOEXEC), False


def _measure(descriptor: int) -> tuple[float, float]:
    began_s = time.monotonic()
    with mmap.mmap(-1, PROBE_BLOCK_BYTES) as block:  # aligned, as direct writes want it
        block[:] = os.urandom(PROBE_BLOCK_BYTES)
        at = 0
        while at < PROBE_BYTES and time.monotonic() < began_s + PROBE_S_MAX:
            written = os.pwrite(descriptor, block, at)
            if written < PROBE_BLOCK_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            at += written
        os.fdatasync(descriptor)
        bytes_per_s = at / (time.monotonic() - began_s)
        syncs: list[float] = []
        with memoryview(block) as view:
            while len(syncs) < PROBE_SYNCS and (not syncs or time.monotonic() < began_s + 2 * PROBE_S_MAX):
                sync_began_s = time.monotonic()
                os.pwrite(descriptor, view[: filesystem.BLOCK_BYTES], 0)
                os.fdatasync(descriptor)
                syncs.append(time.monotonic() - sync_began_s)
    return bytes_per_s, statistics.median(syncs)


def _incoming_bytes_per_s(site: Site) -> float:
    if site.live is None:
        return 0.0
    from mpserverd.arena.report import stats  # noqa: PLC0415  (only for the probe)

    return float(stats(site.live)["bytes_per_s"])
