"""Disks whose power can be cut, and cut again: each is served by a process of its own that remembers every change.

A disk of kind ``fuse`` is a file system by itself: the daemon's spool lies directly on it. ``ext4`` and ``xfs`` lie on
a loop device whose backing file is the only file there, so that the log holds every write and flush of a device.
``cut`` gives another disk, as the power cut left this one; mounting it replays the journal, as after any power cut. It
may be asked for any number of instants of one disk's life.

``split-ext4`` and ``split-xfs`` have the catalog on a disk of kind ``fuse`` and the streams on another: on one disk the
commit of the catalog flushes the streams too, and would hide that nobody had synced them (seen).

Needs root and a mount namespace of its own (power.py), so that nothing is left mounted whatever happens.
"""

from __future__ import annotations

import bisect
import enum
import gc
import json
import os
import pathlib
import select
import socket
import subprocess
import time
from typing import Any, NamedTuple

from tests.power import fuse_protocol
from tests.power.crash import Fate, unsettled
from tests.power.volatile_files import VolatileFiles

MIB = 1 << 20
_IMAGE = "image"
_MESSAGE_BYTES_MAX = 1 << 16

UNMOUNT_S = 10.0


class FileSystemKind(enum.Enum):
    """What the spool lies on."""

    EXT4 = "ext4"
    XFS = "xfs"
    FUSE = "fuse"
    SPLIT_EXT4 = "split-ext4"
    SPLIT_XFS = "split-xfs"


_MAKE = {
    FileSystemKind.EXT4: ["mkfs.ext4", "-q", "-m", "0", "-b", "4096", "-E", "nodiscard"],
    FileSystemKind.XFS: ["mkfs.xfs", "-q", "-K", "--unsupported", "-l", "size=8m"],
}
_STREAMS_ON = {FileSystemKind.SPLIT_EXT4: FileSystemKind.EXT4, FileSystemKind.SPLIT_XFS: FileSystemKind.XFS}
SPOOL = pathlib.PurePath("spool")
_IMAGE_BYTES = 96 * MIB
"""Small, so that a cut is made in milliseconds; xfs means more only for those who want its support."""


class Cut(NamedTuple):
    """An instant: how many changes were done, and when the next one came (monotonic)."""

    position: int
    at_ns: int
    unsettled: int


class Disk:
    """Mounted below ``directory``; ``path`` is where files may be put. ``close`` unmounts and ends its server."""

    _count = 0

    def __init__(
        self, kind: FileSystemKind, directory: pathlib.Path, control: socket.socket, pid: int, below: pathlib.Path
    ):
        self.kind = kind
        self._directory = directory
        self._control = control
        self._pid = pid
        self._below = below
        self.path = below
        self._mounted = True

    # -- where they come from

    @classmethod
    def fresh(cls, kind: FileSystemKind, directory: pathlib.Path) -> Disk:
        """An empty one. Forks: only for a process with one thread."""
        below, device = _mount_below(directory)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            ours.close()
            _serve_and_exit(VolatileFiles(direct=kind is not FileSystemKind.FUSE), device, theirs)
        os.close(device)
        theirs.close()
        disk = cls(kind, directory, ours, pid, below)
        if kind in _MAKE:
            image = below / _IMAGE
            with image.open("wb") as file:
                file.truncate(_IMAGE_BYTES)
            subprocess.run([*_MAKE[kind], str(image)], check=True, capture_output=True)
            disk._mount_image()
        disk.settle()
        return disk

    def cut(self, position: int, fate: Fate, seed: int) -> Disk:
        """This disk after a power cut with ``position`` changes done, mounted."""
        below, device = _mount_below(self._directory)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        answer = self._ask(device, theirs.fileno(), cut=[position, fate.value, seed])
        os.close(device)
        theirs.close()
        disk = Disk(self.kind, self._directory, ours, answer["pid"], below)
        if self.kind in _MAKE:
            disk._mount_image()
        return disk

    def _mount_image(self) -> None:
        self.path = self._directory / f"{self._below.name}-{self.kind.value}"
        self.path.mkdir()
        options = "loop,nodiscard" + (",nouuid" if self.kind is FileSystemKind.XFS else "")
        subprocess.run(["mount", "-t", self.kind.value, "-o", options, self._below / _IMAGE, self.path], check=True)

    # -- its life

    def instants(self) -> int:
        """How many changes there were since the beginning."""
        return int(self._ask(length=True)["length"])

    def instant(self, position: int) -> Cut:
        """``position`` is below ``instants()``."""
        return Cut(**self._ask(instant=position))

    def position(self, at_ns: int) -> int:
        """How many changes there were before that time."""
        return int(self._ask(before=at_ns)["position"])

    def unsettled(self, position: int) -> int:
        """How many of the first ``position`` changes no sync covers."""
        return int(self._ask(unsettled=position)["unsettled"])

    def limit(self, capacity_bytes: int) -> None:
        """From now on files take at most so much together; 0 is no limit. For ``fuse`` only."""
        self._ask(capacity=capacity_bytes)

    def settle(self) -> None:
        """Everything up to now is on the disk, and its log begins here."""
        subprocess.run(["sync", "--file-system", self.path], check=True)
        self._ask(settle=True)

    def unmount(self) -> None:
        """The log stays, and may be cut."""
        if not self._mounted:
            return
        self._mounted = False
        if self.path != self._below:
            _unmount_patiently(self.path)
            self.path.rmdir()
        fuse_protocol.unmount(self._below)
        self._below.rmdir()

    def close(self) -> None:
        self.unmount()
        self._control.close()

    def _ask(self, *descriptors: int, **order: Any) -> dict[str, Any]:
        socket.send_fds(self._control, [json.dumps(order).encode()], descriptors)
        answer = self._control.recv(_MESSAGE_BYTES_MAX)
        if not answer:
            raise RuntimeError("the server of a disk is gone")
        found: dict[str, Any] = json.loads(answer)
        return found


class Pair:
    """Two disks that lose their power at one instant. As a Disk; positions count the changes of both, one's first."""

    def __init__(self, catalog: Disk, streams: Disk) -> None:
        self._catalog = catalog
        self._streams = streams
        self.path = catalog.path
        self._place = catalog.path / SPOOL / "streams"
        subprocess.run(["mount", "--bind", streams.path / "streams", self._place], check=True)
        self._mounted = True

    @classmethod
    def fresh(cls, kind: FileSystemKind, directory: pathlib.Path) -> Pair:
        catalog, streams = Disk.fresh(FileSystemKind.FUSE, directory), Disk.fresh(kind, directory)
        (catalog.path / SPOOL / "streams").mkdir(parents=True)
        (streams.path / "streams").mkdir()
        catalog.settle()
        streams.settle()
        return cls(catalog, streams)

    def cut(self, position: int, fate: Fate, seed: int) -> Pair:
        catalog_at, streams_at = self._positions(position)
        return Pair(self._catalog.cut(catalog_at, fate, seed), self._streams.cut(streams_at, fate, seed + 1))

    def instants(self) -> int:
        return self._catalog.instants() + self._streams.instants()

    def instant(self, position: int) -> Cut:
        at_ns = self._at_ns(position)
        both = zip((self._catalog, self._streams), self._positions(position), strict=True)
        return Cut(position, at_ns, sum(disk.unsettled(at) for disk, at in both))

    def _at_ns(self, position: int) -> int:
        streams_at = position - self._catalog.instants()
        disk, at = (self._catalog, position) if streams_at < 0 else (self._streams, streams_at)
        return disk.instant(at).at_ns

    def _positions(self, position: int) -> tuple[int, int]:
        """What each had done by then."""
        at_ns = self._at_ns(position)
        return self._catalog.position(at_ns), self._streams.position(at_ns)

    def unmount(self) -> None:
        if self._mounted:
            self._mounted = False
            _unmount_patiently(self._place)
            self._streams.unmount()
            self._catalog.unmount()

    def close(self) -> None:
        self.unmount()
        self._streams.close()
        self._catalog.close()


def fresh_disk(kind: FileSystemKind, directory: pathlib.Path) -> Disk | Pair:
    """An empty one of any kind. Forks: only for a process with one thread."""
    streams_on = _STREAMS_ON.get(kind)
    return Disk.fresh(kind, directory) if streams_on is None else Pair.fresh(streams_on, directory)


def _unmount_patiently(path: pathlib.Path) -> None:
    """A process that was killed may still be on its way out of the kernel."""
    deadline_s = time.monotonic() + UNMOUNT_S
    while subprocess.run(["umount", "-d", path], capture_output=True, check=False).returncode:
        if time.monotonic() > deadline_s:
            raise AssertionError(f"{path} is busy after {UNMOUNT_S:g} s")
        time.sleep(0.05)


def _mount_below(directory: pathlib.Path) -> tuple[pathlib.Path, int]:
    Disk._count += 1
    below = directory / f"disk-{Disk._count}"
    below.mkdir()
    return below, fuse_protocol.mount(below)


# -- the server


def _serve_and_exit(files: VolatileFiles, device: int, control: socket.socket) -> None:
    """The child's whole life."""
    status = 1
    try:
        gc.disable()
        _serve(files, device, control)
        status = 0
    finally:
        os._exit(status)


def _serve(files: VolatileFiles, device: int, control: socket.socket) -> None:
    """Until nobody controls it any more."""
    server = fuse_protocol.Server(device, files.operations())
    poll = select.poll()
    poll.register(device, select.POLLIN)
    poll.register(control, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor == device:
                if not server.serve_one():
                    poll.unregister(device)
                    os.close(device)
            elif not _obey(files, control):
                return


def _obey(files: VolatileFiles, control: socket.socket) -> bool:
    message, descriptors, _, _ = socket.recv_fds(control, _MESSAGE_BYTES_MAX, 2)
    if not message:
        return False
    answer: dict[str, Any] = {}
    match json.loads(message):
        case {"settle": _}:
            files.settle()
        case {"length": _}:
            answer["length"] = len(files.log)
        case {"instant": position}:
            answer = Cut(position, files.log[position].at_ns, unsettled(files.log, position))._asdict()
        case {"before": at_ns}:
            answer["position"] = bisect.bisect_left(files.log, at_ns, key=lambda change: change.at_ns)
        case {"unsettled": position}:
            answer["unsettled"] = unsettled(files.log, position)
        case {"capacity": capacity_bytes}:
            files.capacity_bytes = capacity_bytes
        case {"cut": [position, fate, seed]}:
            device, theirs = descriptors
            answer["pid"] = pid = os.fork()
            if pid == 0:
                control.close()
                _serve_and_exit(files.after_cut(position, Fate(fate), seed), device, socket.socket(fileno=theirs))
            for descriptor in descriptors:
                os.close(descriptor)
    control.send(json.dumps(answer).encode())
    return True
