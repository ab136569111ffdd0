"""The datagram socket that a service sends its state to, read as systemd 252 reads it.

Rules: a datagram is lines of NAME=VALUE; one with a NUL byte inside, or one that is too long, is ignored whole, and its
descriptors are closed. The sender's pid comes from the kernel. What the lines mean is decided in ``stand_in.py``.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import os
import pathlib
import socket
import struct

TEXT_BYTES_MAX = 4095
FDS_MAX = 253
"""What the kernel lets one message carry."""
_CREDENTIALS = struct.Struct("iII")
_RECEIVE_BUFFER_BYTES = 8 << 20
_CONTROL_BYTES = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(FDS_MAX * 4)


@dataclasses.dataclass(frozen=True)
class Notification:
    """``fds`` belong to whoever got it."""

    pid: int
    lines: tuple[str, ...]
    fds: tuple[int, ...] = ()

    def says(self, line: str) -> bool:
        return line in self.lines

    def value(self, name: str) -> str | None:
        """Of the first line of that name."""
        return next((line[len(name) + 1 :] for line in self.lines if line.startswith(f"{name}=")), None)

    @property
    def is_barrier(self) -> bool:
        return self.says("BARRIER=1")


class NotifySocket:
    """``name`` is what NOTIFY_SOCKET is to say."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path, self.name = path, str(path)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            with contextlib.suppress(PermissionError):
                self._sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER_BYTES)
            self._sock.bind(self.name)
        except BaseException:
            self._sock.close()
            raise

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()
        self.path.unlink(missing_ok=True)

    def receive(self) -> Notification | None:
        """The next one that makes sense; None when nothing waits."""
        while True:
            try:
                text, ancillary, flags, _ = self._sock.recvmsg(
                    TEXT_BYTES_MAX, _CONTROL_BYTES, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return None
            pid, fds = _unpack(ancillary)
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or b"\0" in text[:-1]:
                for fd in fds:
                    os.close(fd)
                continue
            lines = text.rstrip(b"\0").decode("utf-8", "surrogateescape").split("\n")
            return Notification(pid, tuple(line for line in lines if line), tuple(fds))


_SO_RCVBUFFORCE = 33


def _unpack(ancillary: list[tuple[int, int, bytes]]) -> tuple[int, list[int]]:
    pid, fds = 0, array.array("i")
    for level, kind, raw in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            pid = _CREDENTIALS.unpack(raw[: _CREDENTIALS.size])[0]
        elif level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
    return pid, fds.tolist()
