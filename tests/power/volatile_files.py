"""Files in memory that remember every change in order, served to the kernel by fuse_protocol.py.

Directories, plain files, renames within a directory; no links, no times, no extended attributes. ``log`` has every
change and every sync since ``base``, so that any instant can be looked at afterwards; crash.py says what a power cut
leaves, ``after_cut`` makes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import random
import stat
import struct
import time
from collections.abc import Iterable, Mapping

from tests.power.crash import Change, Fate, Kind, surviving
from tests.power.fuse_protocol import (
    Attributes,
    Opcode,
    Operation,
    Request,
    attribute_answer,
    directory_entry,
    entry_answer,
    open_answer,
)

ROOT = 1
_SET_MODE, _SET_UID, _SET_GID, _SET_SIZE = 1, 2, 4, 8
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_BLOCK_BYTES = 4096
_RENAME_NOREPLACE = 1


@dataclasses.dataclass(slots=True)
class Node:
    """``content`` is a descriptor of anonymous memory, -1 for a directory."""

    mode: int
    uid: int
    gid: int
    content: int = -1
    names: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def is_directory(self) -> bool:
        return self.content < 0

    def copy(self) -> Node:
        content = -1 if self.is_directory else _copied(self.content)
        return Node(self.mode, self.uid, self.gid, content, dict(self.names))

    def close(self) -> None:
        if self.content >= 0:
            os.close(self.content)


Nodes = dict[int, Node]


def _copied(content: int) -> int:
    """A copy that has holes where the original has them."""
    copy = os.memfd_create("content")
    size = os.fstat(content).st_size
    os.ftruncate(copy, size)
    at = 0
    with contextlib.suppress(OSError):  # ENXIO: no data behind here
        while at < size:
            at = os.lseek(content, at, os.SEEK_DATA)
            end = os.lseek(content, at, os.SEEK_HOLE)
            os.lseek(copy, at, os.SEEK_SET)
            while at < end:
                at += os.sendfile(copy, content, at, end - at)
    return copy


def _apply(nodes: Nodes, change: Change) -> None:
    """Do what the change says."""
    node = nodes[change.node]
    match change.kind:
        case Kind.WRITE:
            os.pwrite(node.content, change.data, change.offset)
        case Kind.SIZE:
            os.ftruncate(node.content, change.length)
        case Kind.ALLOCATE:
            end = change.offset + change.length
            if os.fstat(node.content).st_size < end:
                os.ftruncate(node.content, end)
        case Kind.PUNCH:
            end = min(change.offset + change.length, os.fstat(node.content).st_size)
            if end > change.offset:
                os.pwrite(node.content, bytes(end - change.offset), change.offset)
        case Kind.LINK:
            node.names[change.name] = change.child
        case Kind.UNLINK:
            if node.names.get(change.name) == change.child:
                del node.names[change.name]
        case Kind.RENAME:
            if node.names.get(change.name) == change.child:
                del node.names[change.name]
            node.names[change.new_name] = change.child


class VolatileFiles:
    """``capacity_bytes``: what files may take together, 0 for no limit. ``direct``: the kernel caches nothing."""

    def __init__(self, nodes: Nodes | None = None, *, direct: bool = False) -> None:
        self.base: Nodes = nodes or {ROOT: Node(stat.S_IFDIR | 0o755, 0, 0)}
        self.nodes = {number: node.copy() for number, node in self.base.items()}
        self.log: list[Change] = []
        self.capacity_bytes = 0
        self.direct = direct
        self._next_node = max(self.nodes) + 1

    def settle(self) -> None:
        """Everything up to now is on the disk: the log begins here."""
        for node in self.base.values():
            node.close()
        self.base = {number: node.copy() for number, node in self.nodes.items()}
        self.log.clear()

    def after_cut(self, position: int, fate: Fate, seed: int) -> VolatileFiles:
        """The files after the power went with ``log[:position]`` done."""
        nodes = {number: node.copy() for number, node in self.base.items()}
        for change in self.log[:position]:
            if change.kind is Kind.LINK and change.child not in nodes:
                made = self.nodes[change.child]
                content = -1 if made.is_directory else os.memfd_create("content")
                nodes[change.child] = Node(made.mode, made.uid, made.gid, content)
        for change in surviving(self.log, position, fate, random.Random(seed)):
            _apply(nodes, change)
        return VolatileFiles(_reachable(nodes), direct=self.direct)

    def close(self) -> None:
        for node in (*self.base.values(), *self.nodes.values()):
            node.close()

    def operations(self) -> Mapping[int, Operation]:
        return {
            Opcode.LOOKUP: self._lookup,
            Opcode.GETATTR: lambda request: attribute_answer(self._attributes(request.node)),
            Opcode.SETATTR: self._set_attributes,
            Opcode.MKDIR: self._make_directory,
            Opcode.CREATE: self._create,
            Opcode.UNLINK: self._unlink,
            Opcode.RMDIR: self._unlink,
            Opcode.RENAME: lambda request: self._rename(request, 8, 0),
            Opcode.RENAME2: lambda request: self._rename(request, 16, struct.unpack_from("<I", request.body, 8)[0]),
            Opcode.OPEN: lambda _: open_answer(direct=self.direct),
            Opcode.OPENDIR: lambda _: open_answer(),
            Opcode.READ: self._read,
            Opcode.WRITE: self._write,
            Opcode.FALLOCATE: self._allocate,
            Opcode.READDIR: self._read_directory,
            Opcode.STATFS: self._statfs,
            Opcode.FSYNC: self._sync,
            Opcode.FSYNCDIR: self._sync,
            **dict.fromkeys((Opcode.RELEASE, Opcode.RELEASEDIR, Opcode.FLUSH, Opcode.DESTROY), lambda _: b""),
        }

    def _do(self, kind: Kind, node: int, **what: object) -> None:
        change = Change(time.monotonic_ns(), kind, node, **what)  # type: ignore[arg-type]
        self.log.append(change)
        if kind is not Kind.SYNC:
            _apply(self.nodes, change)

    # -- names

    def _attributes(self, number: int) -> Attributes:
        node = self.nodes[number]
        if node.is_directory:
            return Attributes(number, node.mode, node.uid, node.gid, 0, 0, 2)
        found = os.fstat(node.content)
        return Attributes(number, node.mode, node.uid, node.gid, found.st_size, found.st_size, 1)

    def _child(self, request: Request, name: str) -> int:
        number = self.nodes[request.node].names.get(name)
        if number is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return number

    def _lookup(self, request: Request) -> bytes:
        return entry_answer(self._attributes(self._child(request, request.names(0)[0])))

    def _new(self, request: Request, name: str, mode: int, content: int) -> bytes:
        number, self._next_node = self._next_node, self._next_node + 1
        self.nodes[number] = Node(mode, request.uid, request.gid, content)
        self._do(Kind.LINK, request.node, name=name, child=number)
        return entry_answer(self._attributes(number))

    def _make_directory(self, request: Request) -> bytes:
        mode, umask = struct.unpack_from("<2I", request.body)
        return self._new(request, request.names(8)[0], stat.S_IFDIR | (mode & 0o7777 & ~umask), -1)

    def _create(self, request: Request) -> bytes:
        _, mode, umask = struct.unpack_from("<3I", request.body)
        content = os.memfd_create("content")
        entry = self._new(request, request.names(16)[0], stat.S_IFREG | (mode & 0o7777 & ~umask), content)
        return entry + open_answer(direct=self.direct)

    def _unlink(self, request: Request) -> bytes:
        name = request.names(0)[0]
        child = self._child(request, name)
        if self.nodes[child].names:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), name)
        self._do(Kind.UNLINK, request.node, name=name, child=child)
        return b""

    def _rename(self, request: Request, names_at: int, flags: int) -> bytes:
        (directory,) = struct.unpack_from("<Q", request.body)
        name, new_name = request.names(names_at)
        if directory != request.node or flags & ~_RENAME_NOREPLACE:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), name)
        self._do(Kind.RENAME, request.node, name=name, new_name=new_name, child=self._child(request, name))
        return b""

    def _read_directory(self, request: Request) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", request.body)
        found = b""
        for position, (name, number) in enumerate(self.nodes[request.node].names.items(), 1):
            if position <= offset:
                continue
            entry = directory_entry(position, number, name, is_directory=self.nodes[number].is_directory)
            if len(found) + len(entry) > size:
                break
            found += entry
        return found

    # -- content

    def _set_attributes(self, request: Request) -> bytes:
        valid, _, _, size = struct.unpack_from("<IIQQ", request.body)
        mode, _, uid, gid = struct.unpack_from("<4I", request.body, 68)
        node = self.nodes[request.node]
        if valid & _SET_MODE:
            node.mode = stat.S_IFMT(node.mode) | mode & 0o7777
        if valid & _SET_UID:
            node.uid = uid
        if valid & _SET_GID:
            node.gid = gid
        if valid & _SET_SIZE:
            self._do(Kind.SIZE, request.node, length=size)
        return attribute_answer(self._attributes(request.node))

    def _read(self, request: Request) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", request.body)
        return os.pread(self.nodes[request.node].content, size, offset)

    def _write(self, request: Request) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", request.body)
        self._require_space(request.node, offset + size)
        self._do(Kind.WRITE, request.node, offset=offset, data=bytes(request.body[40 : 40 + size]))
        return struct.pack("<II", size, 0)

    def _allocate(self, request: Request) -> bytes:
        _, offset, length, mode = struct.unpack_from("<QQQI", request.body)
        if mode == 0:
            self._require_space(request.node, offset + length)
            self._do(Kind.ALLOCATE, request.node, offset=offset, length=length)
        elif mode == _KEEP_SIZE | _PUNCH_HOLE:
            self._do(Kind.PUNCH, request.node, offset=offset, length=length)
        else:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return b""

    def _sync(self, request: Request) -> bytes:
        self._do(Kind.SYNC, request.node)
        return b""

    # -- space

    def _used_bytes(self) -> int:
        reachable = _reachable_numbers(self.nodes)
        contents = (self.nodes[number].content for number in reachable)
        return sum(os.fstat(content).st_size for content in contents if content >= 0)

    def _require_space(self, number: int, size: int) -> None:
        more = size - os.fstat(self.nodes[number].content).st_size
        if self.capacity_bytes and more > 0 and self._used_bytes() + more > self.capacity_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _statfs(self, _: Request) -> bytes:
        capacity = self.capacity_bytes or 1 << 34
        free = max(0, capacity - self._used_bytes()) // _BLOCK_BYTES
        return struct.pack(
            "<5Q4I", capacity // _BLOCK_BYTES, free, free, 1 << 20, 1 << 20, _BLOCK_BYTES, 255, _BLOCK_BYTES, 0
        ) + bytes(24)


def _reachable_numbers(nodes: Nodes) -> Iterable[int]:
    waiting, found = [ROOT], {ROOT}
    while waiting:
        for number in nodes[waiting.pop()].names.values():
            if number not in found:
                found.add(number)
                waiting.append(number)
    return found


def _reachable(nodes: Nodes) -> Nodes:
    """What a path leads to; the rest is closed."""
    found = _reachable_numbers(nodes)
    for number, node in nodes.items():
        if number not in found:
            node.close()
    return {number: nodes[number] for number in found}
