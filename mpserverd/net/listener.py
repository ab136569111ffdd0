"""Listening sockets: opened with errors that name the holder of a taken port, and accepted connections made ready.

Nothing here decides who may stay (net/admission.py) or what becomes of a connection.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import re
import socket

from mpserverd import limits
from mpserverd.arena.state import RefuseReason
from mpserverd.config.schema import ListenerConfig
from mpserverd.errors import StartError
from mpserverd.net import inherited

ACCEPT_BATCH_MAX = 64
PAUSE_S = 0.1
"""For so long a listener rests when descriptors or memory are short; the kernel queues meanwhile."""

_SHORTAGE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_TCP_LISTEN = "0A"
_SO_BUF_LOCK = 72
"""asm-generic/socket.h; the bits are SOCK_SNDBUF_LOCK and SOCK_RCVBUF_LOCK of linux/socket.h."""
_SEND_LOCK, _RECEIVE_LOCK = 1, 2


class ShortageError(Exception):
    """The kernel has no descriptor or no memory for another connection now."""

    reason = RefuseReason.NO_DESCRIPTORS


def open_listener(config: ListenerConfig, backlog: int, *, only_v6: bool = False) -> socket.socket:
    """Bind and listen, non-blocking. Raises StartError that says who has the port.

    An IPv6 listener takes IPv4 clients too, whatever net.ipv6.bindv6only says, unless ``only_v6``: when another
    listener has the same port for IPv4. A socket that the service manager opened for it is taken as it is.
    """
    passed = inherited.try_claim(config)
    if passed is not None:
        set_receive_buffer(passed, config)
        passed.listen(backlog)
        passed.setblocking(False)
        return passed
    host, port = config.host, config.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:  # no descriptor is free, or there is no IPv6 here
        raise StartError(_why_not(config, error)) from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(only_v6))
        set_receive_buffer(sock, config)
        sock.bind((host, port))
        sock.listen(backlog)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise StartError(_why_not(config, error)) from error
    return sock


def set_receive_buffer(sock: socket.socket, config: ListenerConfig) -> None:
    """Before listen: the window scale is fixed in the handshake, so connections must inherit the size."""
    _set_buffer(sock, socket.SO_RCVBUF, _RECEIVE_LOCK, config.receive_buffer_bytes)


def _set_buffer(sock: socket.socket, option: int, lock: int, size_bytes: int) -> None:
    """0 leaves it to the kernel, also when it had a size: that of a locked buffer is not tuned any more (Linux 5.14
    and later can take the lock away)."""
    if size_bytes:
        sock.setsockopt(socket.SOL_SOCKET, option, size_bytes)
        return
    with contextlib.suppress(OSError):
        locks = sock.getsockopt(socket.SOL_SOCKET, _SO_BUF_LOCK)
        if locks & lock:
            sock.setsockopt(socket.SOL_SOCKET, _SO_BUF_LOCK, locks & ~lock)


def _why_not(config: ListenerConfig, error: OSError) -> str:
    text = f"listener {config.name}: cannot listen on {config.address}: {error.strerror}"
    if error.errno == errno.EADDRINUSE:
        holders = holders_of_port(config.port)
        by = f" by {', '.join(holders)}" if holders else ""
        return f"{text}{by}; stop it, or choose another address"
    if error.errno == errno.EACCES:
        return f"{text}; ports below net.ipv4.ip_unprivileged_port_start need CAP_NET_BIND_SERVICE"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{text}; no interface of this machine has that address"
    return text


def holders_of_port(port: int) -> list[str]:
    """``pid 4711 (nginx)`` of each process that listens on the port, as far as /proc may be read."""
    inodes = _listening_inodes(port)
    if not inodes:
        return []
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if any(_socket_inode(f"/proc/{pid}/fd/{fd}") in inodes for fd in os.listdir(f"/proc/{pid}/fd")):
                with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
                    found.append(f"pid {pid} ({file.read().strip()})")
    return found


def _listening_inodes(port: int) -> set[str]:
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), open(table, encoding="ascii") as file:
            for line in file.readlines()[1:]:
                words = line.split()
                if words[3] == _TCP_LISTEN and int(words[1].rpartition(":")[2], 16) == port:
                    inodes.add(words[9])
    return inodes


def _socket_inode(path: str) -> str | None:
    try:
        match = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(path))
    except OSError:
        return None
    return match[1] if match else None


def bound_address(sock: socket.socket) -> str:
    """What the kernel really bound, with the port that it chose for port 0."""
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ipaddress.ip_address(host).version == 6 else f"{host}:{port}"


def try_accept(sock: socket.socket) -> tuple[socket.socket, str, int] | None:
    """The next connection with its peer's address and port, or None when there is none now. Raises ShortageError.

    A connection that was aborted in the queue is skipped (ECONNABORTED), and so are errors of the network that
    Linux hands over with accept (accept(2), "Error handling").
    """
    while True:
        try:
            connection, peer = sock.accept()
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno in _SHORTAGE:
                raise ShortageError(error.strerror) from error
            if error.errno in (errno.EBADF, errno.EINVAL, errno.ENOTSOCK):
                raise
            continue
        return connection, peer[0], peer[1]


def make_ready(connection: socket.socket, config: ListenerConfig) -> None:
    """Set the options that every connection of this listener has. Raises OSError when the peer is gone already.

    A connection may have had others: a reload changes them. SO_OOBINLINE keeps urgent data in the stream: taken out of
    it, they would spoil the byte count.
    """
    connection.setblocking(False)
    option = connection.setsockopt
    option(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    option(socket.IPPROTO_TCP, socket.TCP_NODELAY, int(config.nodelay))
    _set_buffer(connection, socket.SO_SNDBUF, _SEND_LOCK, config.send_buffer_bytes)
    set_receive_buffer(connection, config)
    option(socket.SOL_SOCKET, socket.SO_KEEPALIVE, int(config.keepalive))
    if config.keepalive:
        option(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, limits.KEEPALIVE_IDLE_S)
        option(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, limits.KEEPALIVE_INTERVAL_S)
        option(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, limits.KEEPALIVE_PROBES)
