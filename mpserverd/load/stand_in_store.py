"""The descriptors that a service manager keeps for its service, by the rules of systemd 252.

Rules, each as seen there: an entry has a name, and a name may have many entries; a file that is stored already is not
stored again, and keeps its first name; past the maximum a descriptor is dropped without a word to the service; an entry
whose file hangs up or fails (EPOLLHUP, EPOLLERR) is removed, unless it was pushed with FDPOLL=0; what is handed back
comes in another order than it was pushed. One thread.

It reads no messages; that is ``stand_in.py``.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import random
import re
import select
from collections.abc import Sequence

DEFAULT_NAME = "stored"
_NAME = re.compile(r"[\x20-\x39\x3b-\x7e]{0,255}")
"""Printable ASCII without a colon, which separates names in LISTEN_FDNAMES."""
_SYS_KCMP, _KCMP_FILE = 312, 0
"""x86-64's number; elsewhere the call fails and inodes are compared."""
_libc = ctypes.CDLL(None, use_errno=True)


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    name: str
    fd: int
    polled: bool


class FdStore:
    """Owns what is pushed. ``fileno`` is readable when an entry has hung up: then call ``drop_dead``."""

    def __init__(self, entries_max: int, seed: int = 0) -> None:
        self.entries_max = entries_max
        self.pushed = self.dropped_full = self.dropped_dead = 0
        self._entries: dict[int, Entry] = {}
        self._epoll = select.epoll()
        self._random = random.Random(seed)

    def __len__(self) -> int:
        return len(self._entries)

    def fileno(self) -> int:
        return self._epoll.fileno()

    def names(self) -> list[str]:
        """One for each entry, sorted."""
        return sorted(entry.name for entry in self._entries.values())

    def push(self, fds: Sequence[int], name: str | None, *, polled: bool = True) -> int:
        """Take the descriptors of one message, in no particular order. Returns how many were new and fitted."""
        name = name if name is not None and is_valid_name(name) else DEFAULT_NAME
        return sum(self._push(fd, name, polled) for fd in self._random.sample(list(fds), len(fds)))

    def _push(self, fd: int, name: str, polled: bool) -> bool:
        if len(self._entries) >= self.entries_max:
            self.dropped_full += 1
            os.close(fd)
            return False
        if any(is_same_file(fd, known) for known in self._entries):
            os.close(fd)
            return False
        if polled:
            try:
                self._epoll.register(fd, 0)  # EPOLLHUP and EPOLLERR come unasked
            except PermissionError:
                polled = False  # a memfd or a plain file cannot be polled
        self._entries[fd] = Entry(name, fd, polled)
        self.pushed += 1
        return True

    def remove(self, name: str) -> int:
        """Every entry of that name; returns how many there were."""
        found = [entry for entry in self._entries.values() if entry.name == name]
        for entry in found:
            self._drop(entry)
        return len(found)

    def drop_dead(self) -> int:
        """Remove what has hung up."""
        dead = [fd for fd, _ in self._epoll.poll(0)]
        for fd in dead:
            self._drop(self._entries[fd])
        self.dropped_dead += len(dead)
        return len(dead)

    def hand_back(self) -> list[Entry]:
        """All entries, as the next start gets them; they stay in the store."""
        entries = list(self._entries.values())
        return self._random.sample(entries, len(entries))

    def clear(self) -> None:
        for entry in list(self._entries.values()):
            self._drop(entry)

    def close(self) -> None:
        self.clear()
        self._epoll.close()

    def _drop(self, entry: Entry) -> None:
        del self._entries[entry.fd]
        if entry.polled:
            self._epoll.unregister(entry.fd)  # before the close: the service may hold a copy, and its events stay
        os.close(entry.fd)


def is_valid_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def is_same_file(one: int, other: int) -> bool:
    """Whether both are copies of one open file, as dup or SCM_RIGHTS make them."""
    own = os.getpid()
    order = int(_libc.syscall(_SYS_KCMP, own, own, _KCMP_FILE, one, other))
    if order >= 0:
        return order == 0
    here, there = os.fstat(one), os.fstat(other)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
