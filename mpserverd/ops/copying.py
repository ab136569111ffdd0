"""Copies one file's first bytes so that they are durable under their name, or not there at all.

A copy has a name of its own (``*.part``) until it is complete and synced. Where the file system can share blocks
(xfs, btrfs) the kernel does so by itself; a copy is never a second name of the same file, because the daemon may still
write it.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

PART_SUFFIX = ".part"
_PIECE_BYTES = 8 << 20
_NOT_BY_KERNEL = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM})


class ShortFileError(OSError):
    """The source has fewer bytes than are durable: damage."""


def copy_file(source: Path, target: Path, length: int | None) -> int:
    """Copy the first ``length`` bytes, all with None, and sync them. Returns how many.

    Raises FileNotFoundError when the source is gone, ShortFileError when it is too short, OSError for the rest.
    """
    source_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        there = os.fstat(source_fd)
        wanted = there.st_size if length is None else length
        if there.st_size < wanted:
            raise ShortFileError(errno.EIO, f"has {there.st_size} bytes, {wanted} are durable", str(source))
        part = target.with_name(target.name + PART_SUFFIX)
        target_fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
        try:
            if os.geteuid() == 0:
                os.fchown(target_fd, there.st_uid, there.st_gid)
            _copy(source_fd, target_fd, wanted, source)
            os.fdatasync(target_fd)
            for descriptor in (source_fd, target_fd):  # what was read for this alone does not stay in memory
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(target_fd)
        os.replace(part, target)
    finally:
        os.close(source_fd)
    return wanted


def _copy(source_fd: int, target_fd: int, length: int, source: Path) -> None:
    at, by_kernel = 0, True
    while at < length:
        count = min(_PIECE_BYTES, length - at)
        try:
            done = os.copy_file_range(source_fd, target_fd, count, at, at) if by_kernel else -1
        except OSError as error:
            if error.errno not in _NOT_BY_KERNEL:
                raise
            by_kernel, done = False, -1
        if done < 0:
            content = os.pread(source_fd, count, at)
            done = os.pwrite(target_fd, content, at) if content else 0
        if done == 0:
            raise ShortFileError(errno.EIO, f"ends at byte {at} of {length}", str(source))
        at += done


def same_owner(source: Path, target: Path) -> None:
    """Root gives what it copies to whom the original belongs, so that a daemon may be started on it."""
    if os.geteuid() == 0:
        there = source.stat()
        os.chown(target, there.st_uid, there.st_gid)


def sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
