"""File systems of a test's own, to be filled: tmpfs, and ext4 and xfs images on loop devices."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests import mounts

MIB = 1 << 20


@contextlib.contextmanager
def mounted(tmp_path: pathlib.Path, kind: str, size_mib: int) -> Iterator[pathlib.Path]:
    """A file system of its own below ``tmp_path``, gone afterwards."""
    command = ["-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs"]
    if kind != "tmpfs":
        image = tmp_path / f"{kind}.img"
        with image.open("wb") as file:
            file.truncate(size_mib * MIB)
        make = {"ext4": ["mkfs.ext4", "-q", "-m", "0"], "xfs": ["mkfs.xfs", "-q"]}[kind]
        if shutil.which(make[0], path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
            pytest.skip(f"not installed: {make[0]}; `make test` as root installs it")
        subprocess.run([*make, str(image)], check=True, capture_output=True)
        command = ["-o", "loop", str(image)]
    with mounts.mounted(tmp_path / kind, *command) as mount_point:
        yield mount_point


def fill(disk: pathlib.Path, *, leave_bytes: int = 0) -> pathlib.Path:
    """Take all space that is left, or all but so much; the file that has it."""
    ballast = disk / "stranger"
    with ballast.open("ab", buffering=0) as file:
        for size in (MIB, 4096):
            with contextlib.suppress(OSError):
                while free_bytes(disk) - size >= leave_bytes:
                    file.write(b"\0" * size)
        with contextlib.suppress(OSError):
            os.fsync(file.fileno())
    return ballast


def free_bytes(disk: pathlib.Path) -> int:
    found = os.statvfs(disk)
    return found.f_bavail * found.f_frsize


def used_bytes(spool: pathlib.Path) -> int:
    """What the segments take on the disk; they may be unlinked meanwhile."""
    used = 0
    for path in (spool / "streams").rglob("*.seg"):
        with contextlib.suppress(FileNotFoundError):
            used += path.stat().st_blocks * 512
    return used
