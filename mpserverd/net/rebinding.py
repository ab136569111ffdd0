"""The sockets of a changed list of listeners: what is open goes on where it fits, the rest is opened in its place.

Rules: a socket goes on with whatever listener has its address now, so that a new name or two swapped ports close
nothing. A port that stays in use is taken from the socket that has it by ``shutdown``, not by ``close``: systemd's
descriptor store may hold a copy, and that would go on listening; and a socket that was shut down can listen again when
the others cannot be opened. Sockets of a socket unit are left as they are.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import socket
from collections.abc import Iterable, Mapping

from mpserverd import log
from mpserverd.config.schema import Config, ListenerConfig
from mpserverd.net import inherited
from mpserverd.net.listener import open_listener, set_receive_buffer

logger = logging.getLogger(__name__)


def kept_sockets(config: Config, have: Mapping[str, socket.socket]) -> dict[str, str]:
    """For each listener that goes on with an open socket, the name of that one in ``have``; its own if that fits."""
    free, kept = dict(have), {}
    for own_only in (True, False):
        for settings in config.listeners:
            if settings.name in kept:
                continue
            names = [name for name in free if name == settings.name or not own_only]
            for name in names:
                if _fits(free[name], name, settings, config):
                    kept[settings.name] = name
                    del free[name]
                    break
    return kept


def open_beside(
    missing: Iterable[ListenerConfig], config: Config, leaving: Iterable[socket.socket], backlog: int
) -> dict[str, socket.socket]:
    """Open sockets for ``missing``, by name. Those of ``leaving`` that have one of their ports listen no more after it.

    Raises StartError when one cannot be opened; then those listen again, with ``backlog``.
    """
    missing = list(missing)
    ports = {settings.port for settings in missing}
    in_the_way = [(sock, sock.getsockname()) for sock in leaving if sock.getsockname()[1] in ports]
    opened: dict[str, socket.socket] = {}
    try:
        for sock, _ in in_the_way:
            stop_listening(sock)
        for settings in missing:
            opened[settings.name] = open_listener(
                settings, config.server.backlog, only_v6=_must_be_only_v6(settings, config)
            )
    except BaseException:
        for sock in opened.values():
            sock.close()
        for sock, address in in_the_way:
            _listen_again(sock, address, backlog)
        raise
    return opened


def go_on(sock: socket.socket, settings: ListenerConfig, backlog: int) -> None:
    """Give a socket that listens what can be changed while it does."""
    set_receive_buffer(sock, settings)
    sock.listen(backlog)
    sock.setblocking(False)


def stop_listening(sock: socket.socket) -> None:
    """Also every copy of it; what waits in its queue is reset. It keeps its port, if that was not the kernel's choice,
    and lets others bind it."""
    if not inherited.is_passed(sock):
        with contextlib.suppress(OSError):  # it does not listen any more
            sock.shutdown(socket.SHUT_RD)


def _listen_again(sock: socket.socket, address: tuple[str | int, ...], backlog: int) -> None:
    try:
        try:
            sock.bind(address)
        except OSError as error:
            if error.errno != errno.EINVAL:  # it is bound; only a port that the kernel chose was given back
                raise
        sock.listen(backlog)
    except OSError as error:
        log.event(logger, logging.ERROR, "listener lost", address=address[:2], error=error.strerror)


def _fits(sock: socket.socket, name: str, settings: ListenerConfig, config: Config) -> bool:
    """Whether it is bound to the address of the listener. Port 0 is any port, but no other listener's."""
    host, port = sock.getsockname()[:2]
    address = ipaddress.ip_address(host)
    if address != ipaddress.ip_address(settings.host):
        return False
    if port != settings.port and not (settings.port == 0 and name == settings.name):
        return False
    if address.version == 4 or not address.is_unspecified or inherited.is_passed(sock):
        return True
    only_v6 = bool(sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))
    return only_v6 == _must_be_only_v6(settings, config)


def _must_be_only_v6(settings: ListenerConfig, config: Config) -> bool:
    """[::] leaves IPv4 to another listener on the same port."""
    others = (other for other in config.listeners if other.name != settings.name and other.port == settings.port)
    return settings.port != 0 and any(ipaddress.ip_address(other.host).version == 4 for other in others)
