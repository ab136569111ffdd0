"""The worker process: one epoll loop that moves bytes from sockets into the arena.

Rules: it opens no file; every wait has a bound; it touches a connection only between ATTACH and the row's ENDED or
RELEASED; EPOLL_CTL_DEL comes before every close and hand-over, because a dup in the supervisor keeps the epoll entry
alive.

What the loop does in a turn: read what is readable, then at most every PASS_INTERVAL_S check and offer what has
gathered, and once a second the housekeeping (deadlines, idle tails, spare chunks, heartbeat).
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import time
from typing import NoReturn

from mpserverd import log
from mpserverd.arena.chunks import Arena
from mpserverd.arena.counters import Role, column
from mpserverd.arena.launch import Launch
from mpserverd.arena.state import (
    STORER_SLOT,
    CloseReason,
    Con,
    ConnectionFlag,
    ConnectionState,
    Slot,
    StateTable,
    Str,
    Wants,
)
from mpserverd.arena.window import KEPT_AHEAD, LeasePool
from mpserverd.config.schema import ListenerConfig, Protocol, Sync
from mpserverd.net import tcp_info
from mpserverd.net.channel import Channel, Kind, Message
from mpserverd.net.listener import make_ready
from mpserverd.protocol.layout import PacketLayout
from mpserverd.protocol.mps import Level
from mpserverd.worker.answers import BYE_REASONS
from mpserverd.worker.checker import Checker, Scratch, scratch_for
from mpserverd.worker.connection import Connection, StaleHintError
from mpserverd.worker.reception import Reception

_log = logging.getLogger(__name__)

PASS_INTERVAL_S = 0.02
"""Bytes wait at most so long for their check. Shorter than the pause between batches of a few clients, so that most
batches are checked in the turn that read them: with 0.05 every second wake-up came from this timer alone."""
HOUSEKEEPING_INTERVAL_S = 1.0
RETRY_INTERVAL_S = 0.05
"""A blocked stream is tried again so often even if no doorbell comes."""
IDLE_TAIL_NS = 2_000_000_000
NEED_CHUNKS_MIN = 16
NEED_AGAIN_S = 0.02


def run(launch: Launch) -> NoReturn:
    """Serve connections until DRAIN or DETACH_ALL is done. Never returns: the caller forked."""
    worker = Worker(launch)
    worker.serve()
    os._exit(0)


class Worker:
    """State of the loop; everything that a successor needs is in the shared tables instead."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._state = StateTable(launch.state_fd)
        self._arena = Arena(launch.table_fd, launch.data_fd)
        self._pool = LeasePool(self._arena, self._state, launch.lease)
        self._words = self._state.words
        self._slot = self._state.slot_base(launch.slot)
        self._in_hand = self._slot + Slot.IN_HAND
        self._storer_slot = self._state.slot_base(STORER_SLOT)
        self._channel = Channel(socket.socket(fileno=launch.channel_fd))
        self._unsent: list[Message] = []
        self._epoll = select.epoll()
        self._epoll.register(self._channel.fileno(), select.EPOLLIN)
        self._epoll.register(launch.doorbell_fd, select.EPOLLIN)
        self._by_fd: dict[int, Connection] = {}
        self._by_row: dict[int, Connection] = {}
        self._dirty: set[Connection] = set()
        self._blocked: set[Connection] = set()
        self._closing: set[Connection] = set()
        self._owing: set[Connection] = set()
        """Connections whose client waits for an acknowledgement."""
        self._level = Level.DURABLE if launch.config.spool.sync is Sync.DURABLE else Level.STORED
        self._reception = Reception(self._state, launch.index, self._epoll, self._send, launch.slot)
        self._layouts = {
            number: PacketLayout.from_config(launch.config.layouts[listener.layout])
            for number, listener in launch.listeners.items()
            if listener.layout is not None
        }
        self._scratches: dict[str, Scratch | None] = {
            layout.name: scratch_for(layout) for layout in self._layouts.values()
        }
        self._leaving = False
        self._rung = False
        self._needed_at_s = 0.0
        self._used_at_need = 0
        self._taken_at_tick = 0
        counter = {
            name: self._slot + column(Role.WORKER, name)
            for name in ("blocked", "dropped_packets", "checks", "chunks_taken", "chunks_leased", "attached")
        }
        self._counter = counter

    # -- the loop

    def serve(self) -> None:
        """Run until told to leave and everything is let go."""
        self._words[self._slot + Slot.HEARTBEAT_MONO_NS] = time.monotonic_ns()
        self._send(Message(Kind.READY))
        self._need_chunks(time.monotonic())
        next_pass_s = next_tick_s = next_retry_s = 0.0
        while not (self._leaving and not self._by_row):
            events = self._epoll.poll(self._patience_s(next_pass_s, next_tick_s))
            now_s = time.monotonic()
            for fd, mask in events:
                self._handle(fd, mask)
            if self._rung and self._owing:
                self._acknowledge()
            if (self._blocked or self._closing) and (self._rung or now_s >= next_retry_s):
                self._retry()
                next_retry_s = now_s + RETRY_INTERVAL_S
            self._rung = False
            if self._dirty and now_s >= next_pass_s:
                self._pass()
                next_pass_s = now_s + PASS_INTERVAL_S
            if now_s >= next_tick_s:
                self._tick()
                next_tick_s = now_s + HOUSEKEEPING_INTERVAL_S
            self._ask_for_chunks(now_s)
            if self._unsent:
                self._flush()
            self._words[self._in_hand] = 0
        self._leave()

    def _handle(self, fd: int, mask: int) -> None:
        """An event. It may be stale: what came before it in the same batch has closed the descriptor, or paused its
        connection, and the number may be another's by now. Such a one is not registered, or has nothing to read."""
        connection = self._by_fd.get(fd)
        if connection is not None:
            if connection.registered:
                self._read(connection)
        elif fd == self._launch.doorbell_fd:
            self._answer_doorbell()
        elif fd == self._channel.fileno():
            self._take_messages()
        else:
            self._reception.handle(fd, mask)

    def _patience_s(self, next_pass_s: float, next_tick_s: float) -> float:
        now_s = time.monotonic()
        until_s = next_tick_s
        if self._dirty:
            until_s = min(until_s, next_pass_s)
        if self._blocked or self._closing or self._unsent:
            until_s = min(until_s, now_s + RETRY_INTERVAL_S)
        return max(0.0, until_s - now_s)

    def _read(self, connection: Connection) -> None:
        self._words[self._in_hand] = connection.row + 1
        reason = connection.read()
        received = connection.received_since
        if received:
            words, slot = self._words, self._slot
            words[slot + Slot.RECEIVED_BYTES] += received
            packets = connection.window.position // connection.window.packet_size
            words[slot + Slot.RECEIVED_PACKETS] += packets - connection.packets_counted
            words[slot + Slot.RECEIVE_CALLS] += 1
            connection.packets_counted = packets
            connection.received_since = 0
            words[self._counter["dropped_packets"]] += connection.dropped_bytes // connection.window.packet_size
            connection.dropped_bytes = 0
            self._dirty.add(connection)
            if connection.answers is not None:
                self._owe(connection)
            if self._pool.presses(len(connection.window.chunks)):
                self._press()
        if reason is not CloseReason.NONE:
            self._finish(connection, reason)
        elif connection.blocked:
            self._block(connection)

    def _pass(self) -> None:
        """Check and offer what has gathered."""
        now_ns = time.monotonic_ns()
        dozing = self._words[self._storer_slot + Slot.DOZING]
        offered = False
        waiting = set()
        for connection in self._dirty:
            self._words[self._in_hand] = connection.row + 1
            offered |= connection.check_and_offer()
            connection.last_received_ns = now_ns
            if connection.window.drops and connection.unoffered_bytes:
                waiting.add(connection)  # the limit holds it back until the storer has moved on
        self._words[self._counter["checks"]] += len(self._dirty)
        self._dirty = waiting
        if offered and dozing:
            os.eventfd_write(self._launch.storer_doorbell_fd, 1)

    def _tick(self) -> None:
        now_ns = time.monotonic_ns()
        words, slot, pool = self._words, self._slot, self._pool
        words[slot + Slot.HEARTBEAT_MONO_NS] = now_ns
        words[slot + Slot.CONNECTIONS] = len(self._by_row)
        for connection in list(self._by_row.values()):
            if connection.closing is not CloseReason.NONE:
                continue
            if connection.paused or connection.blocked:
                connection.last_received_ns = now_ns  # it is us who do not read: the client's clock stands still
                if connection.paused:
                    connection.window.let_go_tail()
                continue
            reason = connection.overdue(now_ns)
            if reason is not CloseReason.NONE:
                self._finish(connection, reason)
            elif now_ns - connection.last_received_ns > IDLE_TAIL_NS and connection not in self._dirty:
                connection.window.let_go_tail()
        if not self._blocked and pool.taken == self._taken_at_tick:
            pool.give_back(KEPT_AHEAD)
        self._taken_at_tick = pool.taken
        if pool.taken:
            pool.count_free()
        if self._owing:
            self._acknowledge()  # those whose buffer was full too
        self._reception.tick(now_ns)
        words[self._counter["chunks_taken"]] = pool.taken
        words[self._counter["chunks_leased"]] = len(pool)

    # -- the storer and the supervisor

    def _want(self, flag: Wants, *, wanted: bool) -> None:
        at = self._slot + Slot.WANTS
        present = self._words[at]
        changed = present | flag if wanted else present & ~flag
        if changed != present:
            self._words[at] = changed

    def _press(self) -> None:
        """Half of what a stream may hold waits: the storer shall not wait for its interval."""
        self._pool.count_free()
        if not self._words[self._slot + Slot.WANTS] & Wants.PRESSURE:
            self._want(Wants.PRESSURE, wanted=True)
            os.eventfd_write(self._launch.storer_doorbell_fd, 1)

    def _ease(self) -> None:
        """Take PRESSURE back when no stream presses any more."""
        if self._words[self._slot + Slot.WANTS] & Wants.PRESSURE:
            self._pool.count_free()
            presses = any(self._pool.presses(c.window.held()) for c in self._by_row.values())
            self._want(Wants.PRESSURE, wanted=presses)

    def _block(self, connection: Connection) -> None:
        """Stop reading until a commit or a lease makes room. Unregistered, because a hang-up would spin."""
        self._unregister(connection)
        self._blocked.add(connection)
        self._words[self._counter["blocked"]] += 1
        if connection.check_and_offer():
            os.eventfd_write(self._launch.storer_doorbell_fd, 1)
        self._press()
        self._want(Wants.DURABLE, wanted=True)

    def _retry(self) -> None:
        """Try blocked streams again, and ends that waited for a commit."""
        self._pool.refresh()
        for connection in list(self._blocked):
            self._words[self._in_hand] = connection.row + 1
            connection.check_and_offer()
            if connection.paused or not (
                connection.window.room(connection.window.chunk_bytes) or connection.window.drops
            ):
                continue
            self._blocked.discard(connection)
            connection.mark_blocked(False)
            self._register(connection)
            self._read(connection)
        for connection in list(self._closing):
            self._finish(connection, connection.closing)
        self._want(Wants.DURABLE, wanted=bool(self._blocked or self._closing or self._owing))

    def _owe(self, connection: Connection) -> None:
        """Its client waits to hear that what it sent is durable."""
        if connection not in self._owing:
            self._owing.add(connection)
            self._want(Wants.DURABLE, wanted=True)

    def _acknowledge(self) -> None:
        """After a commit: tell those who wait for one."""
        self._owing = {connection for connection in self._owing if not connection.acknowledge()}
        self._want(Wants.DURABLE, wanted=bool(self._blocked or self._closing or self._owing))

    def _answer_doorbell(self) -> None:
        os.eventfd_read(self._launch.doorbell_fd)
        self._rung = True
        self._pool.refresh()
        self._ease()

    def _ask_for_chunks(self, now_s: float) -> None:
        """Tell the supervisor in time that leased chunks run out."""
        pool = self._pool
        used = pool.used - self._used_at_need
        low = pool.refused or (used and len(pool) < max(KEPT_AHEAD // 2, used // 2))
        if low and now_s - self._needed_at_s >= NEED_AGAIN_S:
            self._need_chunks(now_s)

    def _need_chunks(self, now_s: float) -> None:
        pool = self._pool
        wanted = max(NEED_CHUNKS_MIN, 2 * (pool.used - self._used_at_need))
        self._needed_at_s, self._used_at_need = now_s, pool.used
        self._send(Message(Kind.NEED, value=wanted))

    def _send(self, message: Message) -> None:
        self._unsent.append(message)
        self._flush()

    def _flush(self) -> None:
        while self._unsent:
            try:
                if not self._channel.send(self._unsent[0]):
                    return
            except OSError:
                os._exit(0)  # the supervisor is gone; its successor adopts everything
            self._unsent.pop(0)

    def _take_messages(self) -> None:
        while True:
            try:
                message = self._channel.receive()
            except EOFError:
                os._exit(0)
            if message is None:
                return
            self._obey(message)

    def _obey(self, message: Message) -> None:
        kind = message.kind
        if kind is Kind.ATTACH:
            self._attach(message)
        elif kind is Kind.GREET:
            self._reception.greet(message, self._listener_of(message.row).handshake_timeout_s)
        elif kind is Kind.REFUSE:
            self._reception.refuse(message)
        elif kind is Kind.DRAIN:
            self._drain()
        elif kind is Kind.DETACH_ALL:
            self._leaving = True
            self._reception.release_all()
            for connection in list(self._by_row.values()):
                self._detach(connection)
        elif kind is Kind.LOG_LEVEL and message.payload:
            log.set_level(message.payload["level"])
        elif kind is Kind.REOPEN_LOG:
            log.reopen()
        elif (named := self._by_row.get(message.row)) is not None:
            self._obey_for(named, message)
        elif kind is Kind.KICK:
            self._reception.end(message.row, CloseReason(message.reason))

    def _obey_for(self, connection: Connection, message: Message) -> None:
        """What concerns one connection."""
        if message.kind is Kind.DETACH:
            self._detach(connection)
        elif message.kind is Kind.KICK:
            connection.retry_s = message.value
            self._finish(connection, CloseReason(message.reason) if message.reason else CloseReason.KICKED)
        elif message.kind is Kind.PAUSE:
            connection.paused = True
            self._unregister(connection)
        elif message.kind is Kind.RESUME:
            connection.paused = False
            self._register(connection)

    # -- a connection's life

    def _attach(self, message: Message) -> None:
        """Take a connection up: fresh, handed over or orphaned, always the same way."""
        row, words = message.row, self._words
        base = self._state.connection_base(row)
        sock = socket.socket(fileno=message.fd)
        mine = words[base + Con.WORKER] == self._launch.index and words[base + Con.STATE] == ConnectionState.ASSIGNED
        if not mine or words[base + Con.COOKIE] != tcp_info.cookie(sock) or row in self._by_row:
            sock.close()
            return
        words[self._in_hand] = row + 1
        listener = self._listener_of(row)
        with contextlib.suppress(OSError):  # what is left of a connection that was reset is read all the same
            make_ready(sock, listener)
        level = self._level if listener.protocol is Protocol.MPS else None
        try:
            connection = Connection(self._state, self._pool, row, sock, self._checker_for, level)
        except StaleHintError as stale:
            log.event(_log, logging.WARNING, "connection not taken up", reason=str(stale), row=row)
            self._reception.end_socket(row, sock, CloseReason.FAILED)
            return
        connection.idle_timeout_ns = int(listener.idle_timeout_s * 1e9)
        connection.silent_timeout_ns = int(listener.handshake_timeout_s * 1e9)
        # before the first read: a PAUSE that follows the ATTACH would come too late
        connection.paused = bool(words[base + Con.FLAGS] & ConnectionFlag.PAUSED)
        self._by_row[row] = self._by_fd[connection.fd] = connection
        self._dirty.add(connection)
        if connection.answers is not None:
            self._owe(connection)
        self._words[self._counter["attached"]] += 1
        self._words[self._slot + Slot.CONNECTIONS] = len(self._by_row)
        if connection.decided is not CloseReason.NONE:
            self._finish(connection, connection.decided)
            return
        if words[base + Con.FLAGS] & ConnectionFlag.QUARANTINED:
            self._finish(connection, CloseReason.QUARANTINED)
            return
        self._register(connection)

    def _listener_of(self, row: int) -> ListenerConfig:
        return self._launch.listeners[int(self._words[self._state.connection_base(row) + Con.LISTENER])]

    def _checker_for(self, stream_row: int) -> Checker:
        listener = int(self._words[self._state.stream_base(stream_row) + Str.LISTENER])
        layout = self._layouts.get(listener)
        return Checker(self._state, stream_row, layout, self._scratches[layout.name] if layout else None)

    def _register(self, connection: Connection) -> None:
        if not connection.registered and not connection.paused and not connection.blocked and not connection.closing:
            self._epoll.register(connection.fd, select.EPOLLIN)
            connection.registered = True

    def _unregister(self, connection: Connection) -> None:
        if connection.registered:
            self._epoll.unregister(connection.fd)
            connection.registered = False

    def _finish(self, connection: Connection, reason: CloseReason) -> None:
        self._words[self._in_hand] = connection.row + 1
        self._unregister(connection)
        if not connection.finish(reason):
            self._closing.add(connection)
            self._want(Wants.DURABLE, wanted=True)
            os.eventfd_write(self._launch.storer_doorbell_fd, 1)
            return
        self._words[self._slot + Slot.REASONS + reason] += 1  # before the end is seen: whoever sees it finds it counted
        connection.publish_end()
        self._forget(connection)
        if connection.answers is not None and reason in BYE_REASONS:
            self._reception.linger(connection.sock)
        else:
            connection.close(shutdown=True)
        self._send(Message(Kind.ENDED, row=connection.row, reason=reason))

    def _detach(self, connection: Connection) -> None:
        """Hand over: stop reading, publish, let go, say so. An end that waits for a commit stays to the end."""
        if connection.closing is not CloseReason.NONE:
            return
        self._unregister(connection)
        connection.release()
        self._forget(connection)
        connection.close(shutdown=False)
        self._send(Message(Kind.RELEASED, row=connection.row))

    def _forget(self, connection: Connection) -> None:
        del self._by_row[connection.row], self._by_fd[connection.fd]
        for members in (self._dirty, self._blocked, self._closing, self._owing):
            members.discard(connection)
        self._words[self._slot + Slot.CONNECTIONS] = len(self._by_row)

    def _drain(self) -> None:
        """The daemon stops: take what the kernel holds now, finalise, leave."""
        self._leaving = True
        self._reception.end_all(CloseReason.STOPPING)
        for connection in list(self._by_row.values()):
            connection.paused = False
            connection.farewell_ns = int(self._launch.config.server.stop_timeout_s * 3e8)
            connection.begin_drain()
            if connection.drain_bytes == 0 and connection.closing is CloseReason.NONE:
                self._finish(connection, CloseReason.STOPPING)
            else:
                self._register(connection)

    def _leave(self) -> None:
        """Everything is let go: give the leases back and say so."""
        self._pool.give_back(0)
        self._words[self._slot + Slot.HEARTBEAT_MONO_NS] = time.monotonic_ns()
        self._send(Message(Kind.DRAINED))
        deadline_s = time.monotonic() + 1.0
        while self._unsent and time.monotonic() < deadline_s:
            self._channel.await_room(0.1)
            self._flush()
