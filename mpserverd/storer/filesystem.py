"""What the file system under the spool can do, and the few calls that Python's os module lacks.

Facts: O_DIRECT is used on ext4 and xfs only, because others accept the flag and buffer all the same. ``syncfs``
alone is safe on ext4; on xfs it can find a clean log and flush nothing, so one of the files is fdatasynced after it.
``fallocate`` is called directly: the C library's posix_fallocate writes a byte into every block where the file system
cannot allocate.

It knows nothing of streams.
"""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import errno
import os
import tempfile

BLOCK_BYTES = 4096
"""Unit of direct writes: the page and the block of ext4 and xfs. Chunks and segments are multiples of it."""

_EXT4_MAGIC = 0xEF53
_XFS_MAGIC = 0x58465342
_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
_STATX_BYTES = 256
_FALLOC_KEEP_SIZE = 1
_FALLOC_PUNCH_HOLE = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
NO_DESCRIPTOR = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""Where a file is opened: these say nothing about it."""
_UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


class WholeSync(enum.Enum):
    """How everything that was written is made durable at once."""

    NONE = "none"  # each file by itself
    SYNCFS = "syncfs"
    SYNCFS_AND_FILE = "syncfs and one file"


@dataclasses.dataclass(frozen=True, slots=True)
class FileSystem:
    """What was found out about the spool's file system. ``direct``: O_DIRECT with blocks of BLOCK_BYTES."""

    name: str
    direct: bool
    whole_sync: WholeSync


def probe(directory: str) -> FileSystem:
    """Ask about the file system of ``directory``, where a file can be made."""
    kind = _f_type(directory)
    if kind == _EXT4_MAGIC:
        return FileSystem("ext4", _takes_blocks(directory), WholeSync.SYNCFS)
    if kind == _XFS_MAGIC:
        return FileSystem("xfs", _takes_blocks(directory), WholeSync.SYNCFS_AND_FILE)
    return FileSystem(f"{kind:#x}", direct=False, whole_sync=WholeSync.NONE)


def _f_type(file: str) -> int:
    buffer = (ctypes.c_long * 32)()
    if _libc.statfs(os.fsencode(file), buffer) != 0:
        _raise(file)
    return int(buffer[0])


def _takes_blocks(directory: str) -> bool:
    """Whether direct I/O is possible in units of BLOCK_BYTES. Kernels before 6.1 do not say; ext4 and xfs can."""
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    try:
        with tempfile.TemporaryFile(dir=directory) as file:  # it has no name: nothing is left of it
            answer = _libc.statx(file.fileno(), b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, buffer)
    except (OSError, AttributeError):  # not ours to write in, or a C library without it
        return True
    if answer != 0:
        return True
    if not int.from_bytes(buffer.raw[0:4], "little") & _STATX_DIOALIGN:
        return True
    memory, offset = (int.from_bytes(buffer.raw[at : at + 4], "little") for at in (152, 156))
    return 0 < memory <= BLOCK_BYTES and 0 < offset <= BLOCK_BYTES and BLOCK_BYTES % offset == 0


def syncfs(descriptor: int) -> None:
    """Write everything of the file system that holds ``descriptor`` to the device."""
    if _libc.syncfs(descriptor) != 0:
        _raise("syncfs")


def allocate(descriptor: int, first: int, length: int) -> None:
    """Make place for file bytes [first, first + length), which read as zeros. Where that is unknown, nothing is done.

    Raises OSError; ENOSPC or EDQUOT mean that there is no place.
    """
    if _libc.fallocate(descriptor, 0, first, length) != 0 and ctypes.get_errno() not in _UNSUPPORTED:
        _raise("fallocate")


def make_zero(descriptor: int, first: int, length: int) -> None:
    """Give file bytes [first, first + length) back to the file system, so that they read as zeros."""
    if _libc.fallocate(descriptor, _FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE, first, length) == 0:
        return
    if ctypes.get_errno() not in _UNSUPPORTED:
        _raise("fallocate")
    zeros = bytes(1 << 16)
    while length > 0:
        part = min(length, len(zeros))
        os.pwrite(descriptor, zeros[:part], first)
        first, length = first + part, length - part


def sync_directory(path: str) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(path: str) -> int:
    """Bytes that an ordinary process may still allocate."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def size_bytes(path: str) -> int:
    """All bytes of the file system."""
    found = os.statvfs(path)
    return found.f_blocks * found.f_frsize


def has_place(directory: str, count: int) -> bool:
    """Whether a file there may still get so many bytes. Asked by writing them: a quota shows in no number."""
    try:
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            while count > 0:
                count -= file.write(bytes(min(count, BLOCK_BYTES)))
    except OSError as error:
        return error.errno not in NO_SPACE
    return True


def _raise(what: str) -> None:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), what)
