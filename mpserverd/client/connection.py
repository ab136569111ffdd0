"""One TCP connection of a client that never blocks, with TLS or without. The same on every operating system.

Rules: ``step`` is called until it says True; then ``send`` and ``receive`` may be. All three return at once, and tell
"not now" by None. Whatever breaks is an OSError. One thread at a time; ``wants_write`` says what to wait for besides
something to read. Names are looked up by ``addresses_of``, which may block as long as the system's resolver does.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
from typing import Any

_UNDER_WAY = {0, errno.EINPROGRESS, errno.EWOULDBLOCK, errno.EAGAIN, getattr(errno, "WSAEWOULDBLOCK", 0)}
RECEIVE_BYTES = 65_536
TLS_SEND_BYTES_MAX = 16_384
"""One TLS record: what OpenSSL has begun to send must be given to it again, at least as long, until it is out."""

Address = tuple[int, int, int, str, Any]


def addresses_of(host: str, port: int) -> list[Address]:
    """All addresses of a server, in the order in which the system wants them tried."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [(int(family), int(kind), number, name, place) for family, kind, number, name, place in found]


class Connection:
    """To the first address that answers. ``share_s`` bounds the wait for each of them but the last."""

    def __init__(self, addresses: list[Address], share_s: float, tls: ssl.SSLContext | None, hostname: str) -> None:
        self._left = list(addresses)
        self._share_s, self._tls, self._hostname = share_s, tls, hostname
        self._socket: socket.socket | None = None
        self._is_connected = False
        self.step_at: float | None = None
        self.wants_write = True

    @property
    def socket(self) -> socket.socket | None:
        """What to wait for; another one after ``step``."""
        return self._socket

    # -- until it stands

    def step(self, now: float) -> bool:
        """Go on with connecting; True when the connection stands. Raises OSError when no address answers."""
        if self._socket is None:
            self._begin(now)
        if not self._is_connected:
            if not self._has_connected(now):
                return False
            self._is_connected, self.step_at = True, None
            self._secure()
        return self._has_shaken_hands()

    def _begin(self, now: float) -> None:
        """Start with the next address that does not fail at once."""
        while True:
            family, kind, number, _, place = self._left.pop(0)
            self._socket = socket.socket(family, kind, number)
            self._socket.setblocking(False)
            code = self._socket.connect_ex(place)
            if code in _UNDER_WAY:
                self.step_at = now + self._share_s if self._left else None
                return
            self.close()
            if not self._left:
                raise OSError(code, os.strerror(code))

    def _has_connected(self, now: float) -> bool:
        assert self._socket is not None
        code = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code == 0:
            try:
                self._socket.getpeername()
            except OSError:
                if self.step_at is None or now < self.step_at:
                    return False  # still under way
                code = errno.ETIMEDOUT
        if code == 0:
            return True
        self.close()
        if not self._left:
            raise OSError(code, os.strerror(code))
        self._begin(now)
        return False

    def _secure(self) -> None:
        assert self._socket is not None
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # we gather by ourselves
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if self._tls is not None:
            plain = self._socket
            self._socket = self._tls.wrap_socket(plain, server_hostname=self._hostname, do_handshake_on_connect=False)

    def _has_shaken_hands(self) -> bool:
        self.wants_write = False
        if isinstance(self._socket, ssl.SSLSocket):
            try:
                self._socket.do_handshake()
            except ssl.SSLWantReadError:
                return False
            except ssl.SSLWantWriteError:
                self.wants_write = True
                return False
        return True

    # -- while it stands

    def send(self, content: memoryview | bytes) -> int | None:
        """Bytes that went out; None when there is no room just now, and ``wants_write`` says so."""
        assert self._socket is not None
        piece = content[:TLS_SEND_BYTES_MAX] if self._tls is not None else content
        try:
            count = self._socket.send(piece)
        except (BlockingIOError, ssl.SSLWantWriteError):
            self.wants_write = True
            return None
        except ssl.SSLWantReadError:
            return None
        self.wants_write = False
        return count

    def receive(self) -> bytes | None:
        """What has come; empty at the end; None when nothing has."""
        assert self._socket is not None
        try:
            return self._socket.recv(RECEIVE_BYTES)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None
        except ssl.SSLEOFError:
            return b""

    def close(self) -> None:
        """May be called at any time, and again."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)
            self._socket.close()
        self._socket = None
