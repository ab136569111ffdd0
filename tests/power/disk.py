"""Disks whose power can be cut, and cut again: each is served by a process of its own that remembers every change.

A disk of kind ``fuse`` is a file system by itself: the daemon's spool lies directly on it. ``ext4`` and ``xfs`` lie on
a loop device whose backing file is the only file there, so that the log holds every write and flush of a device.
``cut`` gives another disk, as the power cut left this one; mounting it replays the journal, as after any power cut. It
may be asked for any number of instants of one disk's life.

Needs root and a mount namespace of its own (power.py), so that nothing is left mounted whatever happens.
"""

from __future__ import annotations

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


_MAKE = {
    FileSystemKind.EXT4: ["mkfs.ext4", "-q", "-m", "0", "-b", "4096", "-E", "nodiscard"],
    FileSystemKind.XFS: ["mkfs.xfs", "-q", "-K", "--unsupported", "-l", "size=8m"],
}
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
        disk._ask(settle=True)
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

    def limit(self, capacity_bytes: int) -> None:
        """From now on files take at most so much together; 0 is no limit. For ``fuse`` only."""
        self._ask(capacity=capacity_bytes)

    def unmount(self) -> None:
        """The log stays, and may be cut."""
        if not self._mounted:
            return
        self._mounted = False
        if self.path != self._below:
            self._unmount_patiently()
            self.path.rmdir()
        fuse_protocol.unmount(self._below)
        self._below.rmdir()

    def _unmount_patiently(self) -> None:
        """A process that was killed may still be on its way out of the kernel."""
        deadline_s = time.monotonic() + UNMOUNT_S
        while subprocess.run(["umount", "-d", self.path], capture_output=True, check=False).returncode:
            if time.monotonic() > deadline_s:
                raise AssertionError(f"{self.path} is busy after {UNMOUNT_S:g} s")
            time.sleep(0.05)

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
