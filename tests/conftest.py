"""What holds for every test: it ends with the processes and threads that it began with, and leaves nothing mounted."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
import signal
import tempfile
import threading
import time
from collections.abc import Iterator

import hypothesis
import pytest

hypothesis.settings.register_profile("project", deadline=None)
hypothesis.settings.load_profile("project")
"""Examples may take as long as a busy machine makes them: Hypothesis would fail one of 342 ms (seen)."""

signal.signal(signal.SIGINT, signal.default_int_handler)
"""A shell starts what it runs in the background with SIGINT ignored, and every child inherits that: tests that press
Ctrl-C would wait for ever. What has a handler is default again in a child."""

_CLONE_NEWNS, _MS_PRIVATE_ALL, _MNT_DETACH = 0x20000, 0x44000, 2


def keep_mounts_to_this_session() -> None:
    """What a test mounts goes with the session, however it ends: the kernel unmounts it with its mount namespace.

    pytest removes the directories of older sessions. One with something mounted in it is busy, and was an error at the
    end of every session from then on (seen). So what others left mounted there is not to be seen here. Loop devices
    that ``mount`` made go with their mount. Called before there are threads: each has a namespace of its own.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() != 0 or libc.unshare(_CLONE_NEWNS) != 0:
        return  # nothing can be mounted then
    if libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_PRIVATE_ALL), None) != 0:
        raise OSError(ctypes.get_errno(), "mounts cannot be made private")
    older = os.path.join(os.environ.get("PYTEST_DEBUG_TEMPROOT") or tempfile.gettempdir(), "pytest-of-")
    for line in pathlib.Path("/proc/self/mounts").read_text().splitlines():
        mount_point = line.split(" ")[1]
        if mount_point.startswith(older):
            libc.umount2(os.fsencode(mount_point), _MNT_DETACH)


keep_mounts_to_this_session()

SETTLE_S = 2.0
"""The last reaping and closing may still be going on when a test returns."""


def children() -> set[int]:
    """Processes that this one has forked and that still run, or that nobody has waited for."""
    found: set[int] = set()
    for task in pathlib.Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    """Fails the test that leaves a child process or a thread behind."""
    children_before, threads_before = children(), set(threading.enumerate())
    yield
    deadline = time.monotonic() + SETTLE_S
    while True:
        left = children() - children_before
        threads = set(threading.enumerate()) - threads_before
        if not left and not threads:
            return
        if time.monotonic() > deadline:
            commands = {pid: _command(pid) for pid in left}
            raise AssertionError(f"left running: processes {commands}, threads {threads}")
        time.sleep(0.01)


def _command(pid: int) -> str:
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return "gone"


def pytest_report_header() -> str:
    root = "root" if os.geteuid() == 0 else "not root: tests that need it are skipped"
    return f"mpserverd: {os.cpu_count()} cores, {root}"
