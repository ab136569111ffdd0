"""Mounts of a test's own: whatever happens, none of them outlives its test.

A mount that is left cannot be removed with the test's directory, and what cleans up at the session's end fails for it.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import time
from collections.abc import Iterator

import pytest

UNMOUNT_S = 10.0
"""A process that was killed may still be on its way out of the kernel."""


@contextlib.contextmanager
def mounted(mount_point: pathlib.Path, *arguments: str) -> Iterator[pathlib.Path]:
    """``mount ARGUMENTS MOUNT_POINT``, gone afterwards. Skips the test where that is not possible."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a file system")
    mount_point.mkdir()
    answer = subprocess.run(["mount", *arguments, str(mount_point)], capture_output=True, text=True, check=False)
    if answer.returncode:
        pytest.skip(f"cannot mount {' '.join(arguments)} here: {answer.stderr.strip()}")
    try:
        yield mount_point
    finally:
        unmount(mount_point)


def unmount(mount_point: pathlib.Path, patience_s: float = UNMOUNT_S) -> None:
    """Raises AssertionError when somebody still uses it; it is out of the way then, too. May be gone already."""
    deadline_s = time.monotonic() + patience_s
    while os.path.ismount(mount_point) and (answer := _umount(mount_point)).returncode:
        if time.monotonic() >= deadline_s:
            _umount("--lazy", mount_point)
            raise AssertionError(f"not unmounted within {patience_s:g} s: {answer.stderr.strip()}")
        time.sleep(0.02)


def _umount(*arguments: str | pathlib.Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["umount", *arguments], capture_output=True, text=True, check=False)
