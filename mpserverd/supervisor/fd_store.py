"""systemd's descriptor store: what is pushed there waits while the daemon is dead, and comes back at its next start.

Rules: pushes are datagrams to NOTIFY_SOCKET and may be made by the main process only. systemd takes them in order, and
drops silently what exceeds FileDescriptorStoreMax. A name is removed with all descriptors that were stored under it.
Before an old copy of something is removed, a barrier must have come back: it says that everything sent earlier has been
taken.

Nothing here waits: what cannot leave now is kept in order and sent by ``flush``; a barrier is a descriptor to watch.
"""

from __future__ import annotations

import array
import collections
import contextlib
import errno
import os
import socket
from collections.abc import Mapping, MutableMapping, Sequence

LISTEN_FDS_START = 3
_NO_ROOM = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS})
"""Of the socket, or of the kernel; ETOOMANYREFS says that the user has as many descriptors in flight as it may."""
_OURS_NO_MORE = ""
"""Put in the place of a name that was taken, so that nobody takes it for a socket unit's."""


def inherited(environ: MutableMapping[str, str] = os.environ) -> dict[str, list[int]]:
    """Descriptors that systemd hands over, by name.

    They arrive in another order than they were pushed in (systemd 252), so each thing has a name of its own. Empty when
    LISTEN_PID is not this process.
    """
    pid, count = environ.get("LISTEN_PID", ""), environ.get("LISTEN_FDS", "")
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdecimal() or len(names) != int(count):
        return {}
    found: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        fd = LISTEN_FDS_START + index
        os.set_inheritable(fd, False)
        found.setdefault(name, []).append(fd)
    return found


def claim(names: set[str], environ: MutableMapping[str, str] = os.environ) -> None:
    """These names were ours; what a socket unit passed keeps its place and its name."""
    known = environ.get("LISTEN_FDNAMES", "").split(":")
    environ["LISTEN_FDNAMES"] = ":".join(_OURS_NO_MORE if name in names else name for name in known)


class FdStore:
    """The way to the store. ``present`` is False outside systemd: then every call does nothing."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        path = environ.get("NOTIFY_SOCKET", "")
        self.present = bool(path)
        self._unsent: collections.deque[tuple[str, tuple[int, ...]]] = collections.deque()
        self._socket: socket.socket | None = None
        if not self.present:
            return
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            self._socket.connect("\0" + path[1:] if path.startswith("@") else path)
        except OSError:
            self._socket.close()
            self._socket, self.present = None, False

    @property
    def waiting_count(self) -> int:
        """Messages that could not leave yet; call ``flush`` a little later."""
        return len(self._unsent)

    def push(self, name: str, fds: Sequence[int]) -> None:
        """Store dups of ``fds`` under ``name``."""
        dups = tuple(os.dup(fd) for fd in fds) if self.present else ()
        self._queue(f"FDSTORE=1\nFDNAME={name}", dups)

    def remove(self, name: str) -> None:
        """Drop everything stored under ``name``."""
        self._queue(f"FDSTOREREMOVE=1\nFDNAME={name}", ())

    def barrier(self) -> int | None:
        """A descriptor that hangs up once systemd has taken all that was sent before; the caller owns it. None outside
        systemd."""
        if not self.present:
            return None
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._queue("BARRIER=1", (write_fd,))
        return read_fd

    def flush(self) -> None:
        """Send what waits, as far as the socket takes it."""
        while self._unsent:
            text, fds = self._unsent[0]
            if not self._send(text, fds):
                return
            self._unsent.popleft()
            for fd in fds:
                os.close(fd)

    def _queue(self, text: str, fds: tuple[int, ...]) -> None:
        if self.present:
            self._unsent.append((text, fds))
            self.flush()

    def _send(self, text: str, fds: Sequence[int]) -> bool:
        """False when it must wait. Whoever does not listen any more gets nothing."""
        if self._socket is None:
            return True
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._socket.sendmsg([text.encode()], rights, socket.MSG_NOSIGNAL)
        except OSError as error:
            return error.errno not in _NO_ROOM
        return True

    def close(self) -> None:
        for _, fds in self._unsent:
            for fd in fds:
                os.close(fd)
        self._unsent.clear()
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.close()
            self._socket = None
