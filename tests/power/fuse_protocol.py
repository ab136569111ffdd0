"""The kernel's FUSE protocol, spoken over /dev/fuse without a library: mounting, reading requests, writing answers.

Version 7.31 of <linux/fuse.h>. One request at a time, in the order in which the kernel hands them out; so the order in
which ``serve`` calls its operations is an order in which a device may have seen them. No writeback cache, so that each
write() is one request before it returns; pages of shared mappings come when the kernel writes them back.

It knows nothing of what the files are; that is volatile_files.py.
"""

from __future__ import annotations

import ctypes
import errno
import os
import pathlib
import stat
import struct
from collections.abc import Callable, Mapping
from typing import NamedTuple

WRITE_BYTES_MAX = 1 << 20
_REQUEST_BYTES_MAX = WRITE_BYTES_MAX + (64 << 10)
_CACHED_S = 1 << 30
"""Nobody but the kernel changes the files, so it may keep names and attributes."""

_HEADER = struct.Struct("<IIQQIIIHH")
_ANSWER = struct.Struct("<IiQ")
_MINOR = 31
_ASYNC_READ, _BIG_WRITES, _PARALLEL_LOOKUPS, _MAX_PAGES = 1, 1 << 5, 1 << 18, 1 << 22
_ATTRIBUTES = struct.Struct("<6Q10I")
_MS_NOSUID_NODEV = 2 | 4
_MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p] * 3 + [ctypes.c_ulong, ctypes.c_char_p]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]


class Opcode:
    """Requests that are served or known to need no answer."""

    LOOKUP, FORGET, GETATTR, SETATTR, MKDIR, UNLINK, RMDIR = 1, 2, 3, 4, 9, 10, 11
    RENAME, OPEN, READ, WRITE, STATFS, RELEASE, FSYNC, FLUSH, INIT = 12, 14, 15, 16, 17, 18, 20, 25, 26
    OPENDIR, READDIR, RELEASEDIR, FSYNCDIR, CREATE, INTERRUPT = 27, 28, 29, 30, 35, 36
    DESTROY, BATCH_FORGET, FALLOCATE, RENAME2 = 38, 42, 43, 45


_SILENT = {Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT}


class Request(NamedTuple):
    """``body`` is what follows the header."""

    opcode: int
    node: int
    uid: int
    gid: int
    body: memoryview

    def names(self, at: int) -> list[str]:
        """The strings that begin at byte ``at`` of the body."""
        return [os.fsdecode(name) for name in bytes(self.body[at:]).split(b"\0")[:-1]]


class Attributes(NamedTuple):
    """What stat() says; ``mode`` with the kind of file."""

    node: int
    mode: int
    uid: int
    gid: int
    size: int
    allocated: int
    links: int

    def pack(self) -> bytes:
        times = (0, 0, 0)
        blocks = -(-self.allocated // 512)
        return _ATTRIBUTES.pack(
            self.node, self.size, blocks, *times, *times, self.mode, self.links, self.uid, self.gid, 0, 4096, 0
        )


Operation = Callable[[Request], bytes]
"""Returns the body of the answer. Raises OSError, whose errno the caller sees."""


def attribute_answer(attributes: Attributes) -> bytes:
    return struct.pack("<QII", _CACHED_S, 0, 0) + attributes.pack()


def entry_answer(attributes: Attributes) -> bytes:
    return struct.pack("<QQQQII", attributes.node, 0, _CACHED_S, _CACHED_S, 0, 0) + attributes.pack()


def open_answer(*, direct: bool = False) -> bytes:
    """``direct``: the kernel keeps no pages of the file."""
    return struct.pack("<QII", 0, int(direct), 0)


def directory_entry(position: int, node: int, name: str, *, is_directory: bool) -> bytes:
    raw = os.fsencode(name)
    kind = (stat.S_IFDIR if is_directory else stat.S_IFREG) >> 12
    return struct.pack("<QQII", node, position, len(raw), kind) + raw + b"\0" * (-len(raw) % 8)


def mount(path: pathlib.Path) -> int:
    """Mount at ``path``; returns the descriptor to serve; until it is served, whoever looks there waits."""
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
    if _libc.mount(b"volatile", os.fsencode(path), b"fuse", _MS_NOSUID_NODEV, options.encode()) != 0:
        number = ctypes.get_errno()
        os.close(device)
        raise OSError(number, os.strerror(number), str(path))
    return device


def unmount(path: pathlib.Path) -> None:
    """At once, also when somebody still has files open there."""
    if _libc.umount2(os.fsencode(path), _MNT_DETACH) != 0 and ctypes.get_errno() != errno.EINVAL:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))


class Server:
    """Answers what the kernel asks on ``device``."""

    def __init__(self, device: int, operations: Mapping[int, Operation]) -> None:
        self.device = device
        self._operations = {**operations, Opcode.INIT: _initialize}
        self._buffer = bytearray(_REQUEST_BYTES_MAX)

    def serve_one(self) -> bool:
        """Read one request and answer it. False when the file system is no longer mounted."""
        try:
            size = os.readv(self.device, [self._buffer])
        except OSError as error:
            if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):  # ENOENT: it was interrupted meanwhile
                return True
            if error.errno == errno.ENODEV:
                return False
            raise
        view = memoryview(self._buffer)
        _, opcode, unique, node, uid, gid, _, _, _ = _HEADER.unpack_from(view)
        request = Request(opcode, node, uid, gid, view[_HEADER.size : size])
        if opcode not in _SILENT:
            self._answer(unique, request)
        return opcode != Opcode.DESTROY

    def _answer(self, unique: int, request: Request) -> None:
        operation = self._operations.get(request.opcode)
        try:
            if operation is None:
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
            body, failure = operation(request), 0
        except OSError as error:
            body, failure = b"", error.errno or errno.EIO
        try:
            os.write(self.device, _ANSWER.pack(_ANSWER.size + len(body), -failure, unique) + body)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):  # who asked is gone
                raise


def _initialize(request: Request) -> bytes:
    major, _, readahead, offered = struct.unpack_from("<4I", request.body)
    flags = offered & (_ASYNC_READ | _BIG_WRITES | _PARALLEL_LOOKUPS | _MAX_PAGES)
    answer = struct.pack(
        "<4I2H2I2H", major, _MINOR, readahead, flags, 16, 12, WRITE_BYTES_MAX, 1, WRITE_BYTES_MAX >> 12, 0
    )
    return answer + b"\0" * (64 - len(answer))
