"""What the kernel knows about a TCP socket: how many bytes were taken out of it, and its cookie.

Only the owner of a connection may call ``consumed``: a ``recv`` of another process that sleeps in a page fault holds
the socket lock, and these calls would wait for it uninterruptibly. ``cookie`` takes no lock.
"""

from __future__ import annotations

import dataclasses
import fcntl
import socket
import struct
import termios

SO_COOKIE = 57
TCP_INQ = 36
_SO_PEERNAME = 28
_TCP_INFO_BYTES = 256
_BYTES_ACKED_AT, _BYTES_RECEIVED_AT = 120, 128
"""Offsets of tcpi_bytes_acked and tcpi_bytes_received in struct tcp_info (linux/tcp.h)."""
_READS_MAX = 1000


@dataclasses.dataclass(frozen=True, slots=True)
class Consumed:
    """``error`` is the errno that asking used up (a pending RST is reported once), 0 if none."""

    consumed_bytes: int
    unread_bytes: int
    fin: bool
    error: int


def cookie(sock: socket.socket) -> int:
    """The kernel's own number of the socket, the same in every process that holds a dup of it."""
    return int(struct.unpack("<Q", sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))[0])


def peer(sock: socket.socket) -> tuple[str, int]:
    """Address and port of the peer, also of one that has reset the connection; getpeername fails for that."""
    first, end = (4, 8) if sock.family == socket.AF_INET else (8, 24)  # of the address in struct sockaddr_in, _in6
    raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERNAME, end)  # EINVAL for more bytes than it has
    return socket.inet_ntop(sock.family, raw[first:end]), int.from_bytes(raw[2:4], "big")


def unread_bytes(sock: socket.socket) -> int:
    """Bytes that wait in the receive queue (FIONREAD)."""
    return int(struct.unpack("<i", fcntl.ioctl(sock.fileno(), termios.FIONREAD, b"\0\0\0\0"))[0])


def bytes_received(sock: socket.socket) -> int:
    """Bytes that the peer has sent and the kernel has acknowledged; a FIN counts as one."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    return int(struct.unpack_from("<Q", info, _BYTES_RECEIVED_AT)[0])


def bytes_sent(sock: socket.socket) -> int:
    """Bytes that were ever written to the socket: acknowledged by the peer, or in the send queue (SIOCOUTQ).

    Of a socket that was accepted and whose sending side is open; a FIN would count.
    """
    while True:
        before = _bytes_acked(sock)
        unsent = int(struct.unpack("<i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"))[0])
        if _bytes_acked(sock) == before:
            return before + unsent


def _bytes_acked(sock: socket.socket) -> int:
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    return int(struct.unpack_from("<Q", info, _BYTES_ACKED_AT)[0])


def _peek_fin(sock: socket.socket, unread: int) -> tuple[bool, int]:
    """Whether a FIN lies behind ``unread`` bytes, and the errno that the question used up."""
    try:
        _, ancillary, _, _ = sock.recvmsg(1, socket.CMSG_SPACE(4), socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False, 0
    except OSError as error:
        return False, error.errno or 0
    for level, kind, content in ancillary:
        if level == socket.IPPROTO_TCP and kind == TCP_INQ:
            return struct.unpack("<i", content[:4])[0] > unread, 0
    return False, 0


def consumed(sock: socket.socket) -> Consumed:
    """Bytes of the peer that have left the socket: ``bytes_received - FIONREAD - FIN``, exact at every instant.

    The parts are read again until they agree, since the peer goes on sending meanwhile.
    """
    sock.setsockopt(socket.IPPROTO_TCP, TCP_INQ, 1)
    error = 0
    for _ in range(_READS_MAX):
        before = bytes_received(sock)
        unread = unread_bytes(sock)
        fin, peek_error = _peek_fin(sock, unread)
        error = error or peek_error
        if bytes_received(sock) == before and unread_bytes(sock) == unread:
            return Consumed(before - unread - (1 if fin else 0), unread, fin, error)
    raise RuntimeError(f"the byte count of a socket did not hold still in {_READS_MAX} readings")
