"""Listeners and what comes in through them: accept, admit or refuse, and pass on to the connection table.

A listener's id stands in rows and outlives a reload as long as what it says about streams stays the same; otherwise the
listener gets a new id, and live connections go on under the old one. Processes know the ids that there were at their
fork: newcomers under a new one wait in the kernel's queue until ``release``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
import time
from collections.abc import Callable

from mpserverd import log
from mpserverd.arena.state import RefuseReason
from mpserverd.config.schema import Config, ListenerConfig
from mpserverd.errors import StartError
from mpserverd.net import tcp_info
from mpserverd.net.admission import Limits, Standing, refuse_reason
from mpserverd.net.allowlist import AddressFilter
from mpserverd.net.listener import (
    ACCEPT_BATCH_MAX,
    PAUSE_S,
    ShortageError,
    bound_address,
    make_ready,
    try_accept,
)
from mpserverd.net.rebinding import go_on, kept_sockets, open_beside, stop_listening
from mpserverd.protocol.mps import ErrorCode, Refusal
from mpserverd.supervisor.connections import Connections
from mpserverd.supervisor.core import Core
from mpserverd.supervisor.finding import speaks_mps
from mpserverd.supervisor.loop import READ
from mpserverd.supervisor.naming import normal_address, peer_text
from mpserverd.supervisor.takeover import is_untouched

logger = logging.getLogger(__name__)

STREAM_KEYS = ("protocol", "packet_size", "layout", "store", "on_full")
"""What a listener says about streams."""
REFUSALS_INTERVAL_S = 5.0
"""Refusals at one listener for one reason are logged at most so often; the counters have them all."""


@dataclasses.dataclass(eq=False, slots=True)
class Listener:
    """An open one. ``id`` is what rows carry."""

    id: int
    config: ListenerConfig
    sock: socket.socket
    filter: AddressFilter
    bound: str
    paused: bool = False
    held: bool = False
    """The kernel queues until there are processes that know its id."""


class Accepting:
    """All open listeners."""

    def __init__(self, core: Core, connections: Connections) -> None:
        self._core = core
        self._connections = connections
        self._open: dict[str, Listener] = {}
        self._refusals: dict[tuple[str, RefuseReason], log.RateLimiter] = {}
        self.next_id = 1
        self._serving = False
        self.on_change: Callable[[], None] = _nothing
        """Called when listeners or their settings are others than before."""
        self.carry: Callable[[int, int], None] = _nothing
        """Called with cookie and descriptor of a newcomer, before anything else is done for it."""
        self.has_room: Callable[[], bool] = _always
        """Whether a newcomer can be kept over the supervisor's death."""

    def listeners(self) -> list[Listener]:
        return list(self._open.values())

    # -- opening and closing

    def open_all(self, config: Config, stored: dict[str, socket.socket] | None = None) -> None:
        """At the start. Raises StartError.

        ``stored`` are sockets of an earlier supervisor by name, bound and listening; whichever has the address of a
        listener is used, and taken out.
        """
        stored = stored if stored is not None else {}
        kept = kept_sockets(config, stored)
        missing = [settings for settings in config.listeners if settings.name not in kept]
        others = [sock for name, sock in stored.items() if name not in kept.values()]
        opened = open_beside(missing, config, others, config.server.backlog)
        for settings in config.listeners:
            sock = opened[settings.name] if settings.name in opened else stored.pop(kept[settings.name])
            self._install(settings, sock, self._known(settings), config.server.backlog)
        self.on_change()

    def fds(self) -> dict[str, int]:
        """Descriptors of the open ones, by name."""
        return {name: listener.sock.fileno() for name, listener in self._open.items()}

    def serve(self) -> None:
        """Begin to accept; until now the kernel queued."""
        self._serving = True
        for listener in self._open.values():
            self._watch(listener)

    def change(self, config: Config) -> list[str]:
        """Take over the listeners of a new configuration; the text of each change.

        Raises StartError when a new one cannot be opened, and then nothing has changed.
        """
        old = dict(self._open)
        kept = kept_sockets(config, {name: listener.sock for name, listener in old.items()})
        leaving = [listener for name, listener in old.items() if name not in kept.values()]
        opened = self._open_in_place_of(leaving, [each for each in config.listeners if each.name not in kept], config)
        new = {settings.name for settings in config.listeners}
        changes = [f"listener {name} closed; its connections go on" for name in old if name not in new]
        for listener in leaving:
            stop_listening(listener.sock)
            self._close(listener)
        self._open.clear()
        for settings in config.listeners:
            name, before = settings.name, old.get(settings.name)
            if before is not None and kept.get(name) == name:
                self._go_on(before, settings, config.server.backlog)
                if settings != before.config:
                    self._update(before, settings)
                    changes.append(f"listener {name} changed")
                continue
            sock = opened[name] if name in opened else old[kept[name]].sock
            listener = self._install(settings, sock, before.config if before else None, config.server.backlog)
            changes.append(f"listener {name} opened on {listener.bound}")
        self.on_change()
        return changes

    def _open_in_place_of(
        self, leaving: list[Listener], missing: list[ListenerConfig], config: Config
    ) -> dict[str, socket.socket]:
        for listener in leaving:
            self._accept_all(listener)
        try:
            return open_beside(missing, config, [each.sock for each in leaving], self._core.config.server.backlog)
        except StartError:
            self.on_change()  # what listens again has to be in systemd's store again
            raise

    def _go_on(self, listener: Listener, settings: ListenerConfig, backlog: int) -> None:
        go_on(listener.sock, settings, backlog)
        self._open[settings.name] = listener

    def _known(self, settings: ListenerConfig) -> ListenerConfig | None:
        """What an earlier supervisor knew under that name, the latest."""
        same = [known for _, known in sorted(self._core.listeners.items()) if known.name == settings.name]
        return same[-1] if same else None

    def _install(
        self, settings: ListenerConfig, sock: socket.socket, before: ListenerConfig | None, backlog: int
    ) -> Listener:
        same = [number for number, known in self._core.listeners.items() if before is not None and known == before]
        number = same[0] if same and before is not None and _same_streams(before, settings) else self._new_id()
        listener = Listener(number, settings, sock, _filter(settings), bound_address(sock))
        self._go_on(listener, settings, backlog)
        if self._serving and number not in self._core.listeners:
            self._hold(listener)
        self._remember(number, settings)
        if self._serving:
            self._watch(listener)
        return listener

    def _update(self, listener: Listener, settings: ListenerConfig) -> None:
        if not _same_streams(listener.config, settings):
            listener.id = self._new_id()
            self._hold(listener)
        listener.config = settings
        listener.filter = _filter(settings)
        self._remember(listener.id, settings)

    def _remember(self, number: int, settings: ListenerConfig) -> None:
        """Under its id; and under earlier ids of that name whatever is not about streams: it is for their connections
        too."""
        listeners = self._core.listeners
        for earlier, known in listeners.items():
            if known.name == settings.name:
                listeners[earlier] = dataclasses.replace(settings, **{key: getattr(known, key) for key in STREAM_KEYS})
        listeners[number] = settings

    def _hold(self, listener: Listener) -> None:
        listener.held = True
        self._core.loop.unwatch(listener.sock.fileno())

    def release(self) -> None:
        """Every worker that gets newcomers, and the storer, know all listeners now."""
        for listener in self._open.values():
            if listener.held:
                listener.held = False
                self._watch(listener)

    def _new_id(self) -> int:
        self.next_id += 1
        return self.next_id - 1

    def _close(self, listener: Listener) -> None:
        self._core.loop.unwatch(listener.sock.fileno())
        listener.sock.close()

    def stop(self) -> None:
        """Take what the kernel has completed already, then close all."""
        self.has_room = _always  # nobody is to be kept over the end
        for listener in self._open.values():
            self._accept_all(listener)
            self._close(listener)
        self._open.clear()
        self.on_change()

    def close_all(self) -> None:
        """At once, when the start failed."""
        for listener in self._open.values():
            self._close(listener)
        self._open.clear()

    # -- accepting

    def _watch(self, listener: Listener) -> None:
        listener.paused = False
        if not listener.held:
            self._core.loop.watch(listener.sock.fileno(), READ, lambda _: self._accept_some(listener))

    def _accept_some(self, listener: Listener) -> None:
        self._accept_batch(listener)

    def _accept_all(self, listener: Listener) -> None:
        """What the kernel has completed, which would be reset with the last close: its whole queue, and not what comes
        meanwhile, or a flood would keep the supervisor here."""
        batches = self._core.config.server.backlog // ACCEPT_BATCH_MAX + 1 if self._serving else 0
        for _ in range(batches):
            if self._accept_batch(listener, leaving=True) < ACCEPT_BATCH_MAX:
                return

    def _accept_batch(self, listener: Listener, *, leaving: bool = False) -> int:
        """Up to a batch, so that other events get their turn. Returns how many came.

        A listener that is ``leaving`` waits for no room in a carrier: who is not let in now is reset.
        """
        if listener.held:
            return 0
        for count in range(ACCEPT_BATCH_MAX):
            if not self.has_room() and not leaving:
                self._rest(listener)
                return count
            try:
                accepted = try_accept(listener.sock)
            except ShortageError as shortage:
                self._pause(listener, shortage)
                return count
            if accepted is None:
                return count
            self._admit(listener, *accepted)
        return ACCEPT_BATCH_MAX

    def _pause(self, listener: Listener, shortage: ShortageError) -> None:
        self._refused(listener, shortage.reason, "")
        self._rest(listener)

    def _rest(self, listener: Listener) -> None:
        self._core.loop.unwatch(listener.sock.fileno())
        listener.paused = True
        self._core.loop.after(PAUSE_S, lambda: self._resume(listener))

    def _resume(self, listener: Listener) -> None:
        if listener.paused and self._open.get(listener.config.name) is listener:
            self._watch(listener)

    def _admit(self, listener: Listener, sock: socket.socket, host: str, port: int, *, carried: bool = False) -> None:
        address = normal_address(host)
        connections, settings = self._connections, listener.config
        limits = Limits(self._core.max_clients, settings.max_connections, settings.max_connections_per_address)
        standing = Standing(
            permitted=listener.filter.permits(address),
            stopping=False,
            active_count=len(connections),
            listener_count=connections.by_listener[settings.name],
            address_count=connections.by_address[settings.name, address],
            free_row_count=connections.free_row_count,
        )
        reason = refuse_reason(limits, standing)
        if reason is RefuseReason.NONE and self._core.draining:
            reason = RefuseReason.DRAINING
        if reason is RefuseReason.NONE and not speaks_mps(settings) and connections.is_quarantined(address):
            reason = RefuseReason.QUARANTINED
        if reason is not RefuseReason.NONE:
            if speaks_mps(settings) and reason is not RefuseReason.DENIED:
                _say_busy(sock, reason)
            if carried:
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
            self._refused(listener, reason, peer_text(address, port))
            return
        cookie = tcp_info.cookie(sock)
        if not carried:
            # As early as can be: until then only the guard knows of it. One that is carried and has no row is found by
            # the next supervisor: take_stray.
            self.carry(cookie, sock.fileno())
        try:
            make_ready(sock, settings)
        except OSError:  # it was reset while it waited in the queue
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
            return
        connections.take(sock.detach(), cookie, address, port, listener.id)

    def take_stray(self, fd: int) -> bool:
        """A connection that was carried and has no row: it was accepted a moment before the supervisor died, or it is
        over. ``fd`` is ours from now on; True when it goes on."""
        sock = socket.socket(fileno=fd)
        listener = self._listener_of(sock) if is_untouched(sock) else None
        if listener is not None:
            self._admit(listener, sock, *tcp_info.peer(sock), carried=True)
            return True
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        sock.close()
        return False

    def _listener_of(self, sock: socket.socket) -> Listener | None:
        """The one that accepted it: two may share a port, each on an address of its own or one on all."""
        host, port = sock.getsockname()[:2]
        exact, on_all = [], []
        for listener in self._open.values():
            bound_host, bound_port = listener.sock.getsockname()[:2]
            if bound_port != port or listener.sock.family != sock.family:
                continue
            if normal_address(bound_host) == normal_address(host):
                exact.append(listener)
            elif normal_address(bound_host).is_unspecified:
                on_all.append(listener)
        return next(iter(exact + on_all), None)

    def _refused(self, listener: Listener, reason: RefuseReason, peer: str) -> None:
        self._core.count_refusal(reason)
        limiter = self._refusals.setdefault(
            (listener.config.name, reason), log.RateLimiter(REFUSALS_INTERVAL_S, burst=1)
        )
        suppressed = limiter.admit(time.monotonic())
        if suppressed is None:
            return
        log.event(
            logger,
            logging.WARNING,
            "connection refused",
            message_id=log.MessageId.CLIENT_REFUSED,
            listener=listener.config.name,
            reason=reason,
            peer=peer or None,
            suppressed=suppressed,
        )


def _say_busy(sock: socket.socket, reason: RefuseReason) -> None:
    """To a newcomer that nobody else has yet. It may miss it: its unread hello makes the close a reset."""
    line = Refusal(ErrorCode.BUSY, f"nobody is let in now: {reason.word}").to_line()
    with contextlib.suppress(OSError):
        sock.send(line, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        sock.shutdown(socket.SHUT_WR)


def _nothing(*_: object) -> None:
    """Nobody wants to know."""


def _always() -> bool:
    return True


def _filter(settings: ListenerConfig) -> AddressFilter:
    return AddressFilter(settings.allow, settings.deny)


def _same_streams(one: ListenerConfig, other: ListenerConfig) -> bool:
    """Whether streams made under one of them mean the same under the other."""
    return all(getattr(one, key) == getattr(other, key) for key in STREAM_KEYS)
