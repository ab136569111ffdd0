"""The lock on connections: who holds it may read sockets and write into the arena.

It is a flock on the state table itself, so it belongs to exactly what it guards. The supervisor takes it and workers
inherit it; it is free when the last of them is gone, whatever became of the supervisor. A new supervisor adopts
connections only when it has the lock. (The storer's lock is another one, on the spool: spool_lock.py. So a disk that
hangs keeps no client waiting.)
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Iterable, Iterator

from mpserverd.errors import StartError

WAIT_S = 20.0
GUARD_S = 2.0
"""A guard that has not put everything into the carriers by then (it takes milliseconds) stands still."""
"""For workers that were told to die: a worker only touches memory and sockets, so more than a moment is a fault."""
_LOOK_AGAIN_S = 0.002


def lock(state_fd: int, *, guard_pid: int = 0) -> int:
    """A descriptor that holds the lock, for the supervisor and its workers. Raises StartError after WAIT_S.

    ``guard_pid``: the earlier supervisor's guard, which holds the lock until it has done its work; 0 for none.
    """
    fd = os.open(f"/proc/self/fd/{state_fd}", os.O_RDWR | os.O_CLOEXEC)
    deadline_s = time.monotonic() + WAIT_S
    while True:
        if guard_pid and time.monotonic() > deadline_s - WAIT_S + GUARD_S:
            kill_leftovers([guard_pid], state_fd)
            guard_pid = 0
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if time.monotonic() > deadline_s:
                os.close(fd)
                raise StartError(
                    "a process of the last supervisor does not die; what it owns cannot be taken up"
                ) from None
            time.sleep(_LOOK_AGAIN_S)


def kill_leftovers(pids: Iterable[int], state_fd: int) -> list[int]:
    """SIGKILL whatever child of the last supervisor still lives (their parent's death should have). Returns the pids.

    A pid may be another program's by now: only one that has this very table open is ours.
    """
    killed = []
    for pid in set(pids) - {0, os.getpid()}:
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(pid)
            try:
                if _has_open(pid, state_fd):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    killed.append(pid)
            finally:
                os.close(pidfd)
    return sorted(killed)


def wait_until_still(pids: Iterable[int], state_fd: int, wait_s: float) -> list[int]:
    """Wait until none of these killed processes runs a step of its own program any more. Returns those that may.

    Dead ones do not, nor do threads that sleep uninterruptibly in the kernel: with SIGKILL pending they never come back
    from there to their program. What a system call had begun is finished from the memory that it was given.
    """
    deadline_s = time.monotonic() + wait_s
    while (moving := [pid for pid in pids if _has_open(pid, state_fd) and not _is_still(pid)]) != []:
        if time.monotonic() > deadline_s:
            break
        time.sleep(_LOOK_AGAIN_S)
    return moving


def _is_still(pid: int) -> bool:
    return all(state in "DZX" for state in _thread_states(pid))


def _thread_states(pid: int) -> Iterator[str]:
    for thread in _threads(pid):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/stat", encoding="ascii") as file:
            yield file.read().rpartition(") ")[2][:1]


def _threads(pid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []


def _has_open(pid: int, fd: int) -> bool:
    """Asked of each thread: when the first one has ended, its list of files is empty, while others still write."""
    wanted = os.fstat(fd)
    for thread in _threads(pid):
        path = f"/proc/{pid}/task/{thread}/fd"
        with contextlib.suppress(OSError):
            for name in os.listdir(path):
                with contextlib.suppress(OSError):
                    found = os.stat(f"{path}/{name}")
                    if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                        return True
    return False
