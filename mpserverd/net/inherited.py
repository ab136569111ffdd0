"""Listening sockets that the service manager opened and passed in (socket activation), found by their name.

A socket unit's FileDescriptorName is the name of a [[listener]]; the daemon then needs no right to open that port, nor
a network. Descriptors under other names are left alone. See sd_listen_fds(3) for LISTEN_PID, LISTEN_FDS and
LISTEN_FDNAMES.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import stat
from collections.abc import Mapping

from mpserverd.config.schema import ListenerConfig
from mpserverd.errors import StartError

FIRST_FD = 3


def passed_fds(environ: Mapping[str, str] = os.environ, pid: int | None = None) -> dict[str, int]:
    """Descriptor by name, if they were passed to this very process; a child of it has none.

    Those without a name were the daemon's own, from systemd's store (supervisor/fd_store.py).
    """
    if environ.get("LISTEN_PID") != str(os.getpid() if pid is None else pid):
        return {}
    count = environ.get("LISTEN_FDS", "")
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    if not count.isdecimal() or len(names) != int(count):
        return {}
    return {name: FIRST_FD + index for index, name in enumerate(names) if name}


def try_claim(config: ListenerConfig, environ: Mapping[str, str] = os.environ) -> socket.socket | None:
    """The passed socket of this listener, or None. Its descriptor is a copy: it can be closed like any other.

    Raises StartError when what was passed under the name is no socket that listens on the listener's address.
    """
    fd = passed_fds(environ).get(config.name)
    if fd is None:
        return None
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        raise StartError(f"listener {config.name}: descriptor {fd} of that name is no socket; see the socket unit")
    sock = socket.socket(fileno=os.dup(fd))
    fault = _fault(sock, config)
    if fault:
        sock.close()
        raise StartError(f"listener {config.name}: {fault}; make [[listener]] and the socket unit say the same")
    return sock


def is_passed(sock: socket.socket) -> bool:
    """Whether it is the same socket as one that was passed, which the service manager holds too."""
    return any(os.path.sameopenfile(fd, sock.fileno()) for fd in passed_fds().values())


def _fault(sock: socket.socket, config: ListenerConfig) -> str:
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
        return "the socket that was passed is not a TCP one"
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return "the socket that was passed does not listen"
    host, port = sock.getsockname()[:2]
    if ipaddress.ip_address(host) != ipaddress.ip_address(config.host) or config.port not in (0, port):
        return f"the socket that was passed listens on {host} port {port}, not on {config.address}"
    return ""
