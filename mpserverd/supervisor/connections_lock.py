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

from mpserverd.arena.state import SUPERVISOR_SLOT, Slot, StateTable
from mpserverd.errors import StartError

WAIT_S = 20.0
"""For workers that were told to die: a worker only touches memory and sockets, so more than a moment is a fault."""
_LOOK_AGAIN_S = 0.002


def lock(state: StateTable) -> int:
    """A descriptor that holds the lock, for the supervisor and its workers. Raises StartError after WAIT_S."""
    fd = os.open(f"/proc/self/fd/{state.fd}", os.O_RDWR | os.O_CLOEXEC)
    deadline_s = time.monotonic() + WAIT_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if time.monotonic() > deadline_s:
                os.close(fd)
                raise StartError(
                    "a worker of the last supervisor does not die; what it owns cannot be taken up"
                ) from None
            time.sleep(_LOOK_AGAIN_S)


def kill_leftovers(state: StateTable) -> list[int]:
    """SIGKILL whatever child of the last supervisor still lives (their parent's death should have). Returns the pids.

    A pid may be another program's by now: only one that has this very table open is ours.
    """
    killed = []
    for pid in {int(pid) for pid in state.slots[SUPERVISOR_SLOT + 1 :, Slot.PID]} - {0, os.getpid()}:
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(pid)
            try:
                if _has_open(pid, state.fd):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    killed.append(pid)
            finally:
                os.close(pidfd)
    return sorted(killed)


def _has_open(pid: int, fd: int) -> bool:
    wanted = os.fstat(fd)
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found = os.stat(f"/proc/{pid}/fd/{name}")
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    return False
