"""The guard: a process that shares the supervisor's descriptor table, and outlives it with every descriptor in hand.

Between ``accept`` and the carrier a connection is known to nobody but the supervisor; one that is killed there would
take it along. The guard waits for the supervisor's death, puts into the carriers what has no row yet, and exits; who
adopts drops doubles by cookie.

Rules: it is made by clone(2) with CLONE_FILES, so it holds nothing back: what the supervisor closes is closed. It does
nothing while the supervisor lives, since a descriptor that it closed, or an object that it finalised, would be closed
for both. Then it touches sockets by SO_COOKIE alone, as the supervisor does. It shares no memory but the state table
and the two words that name the carriers.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import gc
import mmap
import os
import select
import signal
import socket
import struct
import traceback
from collections.abc import Iterable, Sequence
from typing import NoReturn

from mpserverd.arena.state import Con, ConnectionState, StateTable
from mpserverd.net.tcp_info import SO_COOKIE
from mpserverd.supervisor.spawn import name_process

_CARRIERS_MAX = 2
_SYS_CLONE = 56
"""x86-64, as the rest (docs/decisions/0004)."""
_CLONE_FILES = 0x400
_COOKIE_BYTES = 8

_locked = ctypes.PyDLL(None, use_errno=True)
"""Calls through it keep the interpreter's lock: the clone would otherwise wait for a thread that it does not have."""


class Guard:
    """One guard. ``pid`` is that of the process, and ``pidfd`` becomes readable when it dies, until ``end``."""

    def __init__(self, state: StateTable) -> None:
        self._state = state
        self._carriers = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")[:_CARRIERS_MAX]
        self.pid = 0
        self.pidfd = self._supervisor = -1

    def begin(self) -> None:
        """Start the process; call it in the main thread. Raises OSError; then there is none, and nothing is left."""
        old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # it keeps them blocked
        was_collecting = gc.isenabled()
        gc.disable()  # in the guard for good: what it collected would be closed for both
        try:
            self._supervisor = os.pidfd_open(os.getpid())
            pid = _locked.syscall(*map(ctypes.c_long, (_SYS_CLONE, _CLONE_FILES | signal.SIGCHLD, 0, 0, 0, 0)))
            if pid == 0:
                self._watch()
            if pid < 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            self.pid = pid
            self.pidfd = os.pidfd_open(pid)
        except OSError:
            self.end()
            raise
        finally:
            if was_collecting:
                gc.enable()
            signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)

    def point_at(self, carriers: Sequence[int]) -> None:
        """The ends that take connections, of the carriers in use. Call it before one of them is closed."""
        newest = carriers[-_CARRIERS_MAX:]
        for place in range(_CARRIERS_MAX):
            self._carriers[place] = newest[place] + 1 if place < len(newest) else 0

    def end(self) -> None:
        """Kill it, or collect it when it is dead."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        for fd in (self.pidfd, self._supervisor):
            if fd >= 0:
                os.close(fd)
        self.pid, self.pidfd, self._supervisor = 0, -1, -1

    # -- in the guard

    def _watch(self) -> NoReturn:
        try:
            name_process("guard")
            poll = select.poll()
            poll.register(self._supervisor, select.POLLIN)
            poll.poll()
            self._rescue()
        except BaseException:  # the one broad handler of this process: nobody is left to be told
            traceback.print_exc()
        finally:
            os._exit(0)

    def _rescue(self) -> None:
        carriers = [int(word) - 1 for word in self._carriers if word]
        rows = self._state.connections
        known = set(rows[rows[:, Con.STATE] != ConnectionState.FREE, Con.COOKIE].tolist())
        for cookie, fd in _connections(int(name) for name in os.listdir("/proc/self/fd")):
            if cookie not in known:
                for carrier in carriers:
                    _put(carrier, cookie, fd)


def _connections(fds: Iterable[int]) -> list[tuple[int, int]]:
    """(cookie, descriptor) of those that are TCP and not listeners."""
    found = []
    for fd in fds:
        if _option(fd, socket.SO_PROTOCOL) == socket.IPPROTO_TCP and not _option(fd, socket.SO_ACCEPTCONN):
            cookie = _option(fd, SO_COOKIE, _COOKIE_BYTES)
            if cookie is not None:
                found.append((cookie, fd))
    return found


def _option(fd: int, name: int, size: int = 4) -> int | None:
    """Without a socket object, which would ask for the socket's lock, and close the descriptor one day."""
    value = ctypes.create_string_buffer(size)
    length = ctypes.c_uint(size)
    if _locked.getsockopt(fd, socket.SOL_SOCKET, name, value, ctypes.byref(length)):
        return None
    return int.from_bytes(value.raw[: length.value], "little")


def _put(carrier: int, cookie: int, fd: int) -> None:
    """As Carrier.put does; a full carrier is nothing that could be mended here."""
    with contextlib.suppress(OSError):
        into = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=carrier)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        try:
            into.sendmsg([struct.pack("<Q", cookie)], rights, socket.MSG_DONTWAIT)
        finally:
            into.detach()
