"""What holds for every test: it ends with the processes and threads that it began with."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import threading
import time
from collections.abc import Iterator

import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)
"""A shell starts what it runs in the background with SIGINT ignored, and every child inherits that: tests that press
Ctrl-C would wait for ever. What has a handler is default again in a child."""

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
