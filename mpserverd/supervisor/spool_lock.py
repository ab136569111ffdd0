"""One daemon a spool: a lock (flock) on its directory, taken once and inherited by every storer.

A flock is free when the last process that inherited it is gone. So a storer that hangs in the kernel, after its
supervisor died, keeps the next daemon from writing the same files; nothing is to be cleaned up after a crash. Opened
at the start only: later the disk may hang, and the supervisor must not.
"""

from __future__ import annotations

import fcntl
import os
import time

from mpserverd.errors import StartError

WAIT_S = 3.0
"""A storer that was just killed may need a moment to be gone."""
_RETRY_S = 0.02
_DIRECTORY_MODE = 0o750


def open_spool(path: str) -> int:
    """A descriptor for the lock, or -1 where the directory cannot be opened: the storer will say why.

    Makes the directory if it is not there.
    """
    try:
        _make(path)
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return -1


def is_locked_now(fd: int) -> bool:
    """Try once. True also where there is nothing to lock."""
    try:
        if fd >= 0:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def try_lock_spool(path: str) -> int:
    """A descriptor that holds the lock, or -1 where the directory cannot be opened: the storer will say why.

    Makes the directory if it is not there. Raises StartError when another daemon has it.
    """
    fd = open_spool(path)
    if fd < 0:
        return -1
    deadline_s = time.monotonic() + WAIT_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if time.monotonic() < deadline_s:
                time.sleep(_RETRY_S)
                continue
            holders = lock_holders(fd)
            os.close(fd)
            by = f" by pid {', '.join(map(str, holders))}" if holders else ""
            raise StartError(
                f"the spool {path} is in use{by}: another mpserverd writes it; stop that one, or change [spool] path"
            ) from None
        except OSError:  # a file system without locks
            os.close(fd)
            return -1


def _make(path: str) -> None:
    """With its name durable: what is committed inside must be found again."""
    if os.path.isdir(path):
        return
    os.makedirs(path, _DIRECTORY_MODE)
    parent = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def lock_holders(fd: int) -> list[int]:
    """Who holds the lock, by pid of who took it, as far as /proc/locks tells."""
    there = os.fstat(fd)
    wanted = f"{os.major(there.st_dev):02x}:{os.minor(there.st_dev):02x}:{there.st_ino}"
    try:
        with open("/proc/locks", encoding="ascii") as file:
            rows = [line.split() for line in file]
    except OSError:
        return []
    return sorted({int(row[4]) for row in rows if row[1] == "FLOCK" and row[5] == wanted})
