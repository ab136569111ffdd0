"""A small ext4 of the test's own that can be frozen: whoever writes to it then sleeps in the kernel, and not even
SIGKILL ends it (state D), until it is thawed.

Rules: it is an image within an image, so that nothing but the inner file system is frozen. It is thawed and unmounted
whatever happens, also when the test process itself is killed: a guard process reads a pipe of ours and does it then.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Self

import pytest

PROGRAMS = ("mkfs.ext4", "fsfreeze", "losetup", "mount", "umount")
DETACHED_S = 20.0
"""The last user of the file system may be dying still."""
_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
_OUTER_MIB_MORE = 16
_GUARD = 'read -r _; fsfreeze -u "$1"; umount -l "$1"; umount -l "$2"'
MIB = 1 << 20


class Disk:
    """``with Disk(directory, mount_point, size_mib) as disk``: mounted; ``freeze`` and ``thaw`` at will."""

    def __init__(self, directory: pathlib.Path, mount_point: pathlib.Path, size_mib: int) -> None:
        if os.geteuid() != 0:
            pytest.skip("needs root to mount a file system")
        missing = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
        if missing:
            pytest.skip(f"not installed: {', '.join(missing)} (packages e2fsprogs, util-linux, mount)")
        self.mount_point, self._outer = mount_point, directory / "outer"
        self.frozen = False
        for path in (self.mount_point, self._outer):
            path.mkdir(exist_ok=True)
        self._image = directory / "outer.img"
        _make(self._image, size_mib + _OUTER_MIB_MORE)
        _mount(self._image, self._outer)
        try:
            _make(self._outer / "inner.img", size_mib)
            _mount(self._outer / "inner.img", self.mount_point)
        except BaseException:
            _run("umount", "-l", str(self._outer))
            raise
        self._guard = subprocess.Popen(
            ["sh", "-c", _GUARD, "sh", str(self.mount_point), str(self._outer)],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PATH": _PATH},
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """The guard does what there is to do; it never fails for a file system that is not frozen."""
        self._guard.communicate(b"\n", timeout=60)
        deadline_s = time.monotonic() + DETACHED_S
        while _run("losetup", "-j", str(self._image)).stdout:
            assert time.monotonic() < deadline_s, "a loop device is left"
            time.sleep(0.02)

    def freeze(self) -> None:
        _run("fsfreeze", "-f", str(self.mount_point), check=True)
        self.frozen = True

    def thaw(self) -> None:
        _run("fsfreeze", "-u", str(self.mount_point), check=True)
        self.frozen = False

    @contextlib.contextmanager
    def frozen_here(self) -> Iterator[None]:
        """Frozen inside, unless it was thawed there."""
        self.freeze()
        try:
            yield
        finally:
            if self.frozen:
                self.thaw()


def thread_states(pid: int) -> str:
    """One letter for each thread, as proc(5) has them: D is an uninterruptible sleep in the kernel."""
    states = ""
    for entry in pathlib.Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):
            states += entry.read_text().rpartition(") ")[2][0]
    return states


def _make(image: pathlib.Path, size_mib: int) -> None:
    with image.open("wb") as file:
        file.truncate(size_mib * MIB)
    _run("mkfs.ext4", "-q", "-F", "-m", "0", str(image), check=True)


def _mount(image: pathlib.Path, mount_point: pathlib.Path) -> None:
    answer = _run("mount", "-o", "loop", str(image), str(mount_point))
    if answer.returncode:
        pytest.skip(f"cannot mount a loop device here: {answer.stderr.strip()}")


def _run(*command: str, check: bool = False) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PATH": _PATH}, check=check, timeout=60
    )
