"""Every connection from its accept to the last close: row, stream, worker, adoption, end.

Rules: row first, then worker, so that a successor knows of every connection (the carrier comes before both: see
accepting.py). The supervisor keeps a dup as a plain int and makes no call on it while a worker owns it. A connection
whose stream is not open yet waits unread; TCP holds its bytes. A connection of a dead worker is given away only from
``orphan``, which is called after the pidfd fired.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import select
import socket
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from mpserverd import log
from mpserverd.arena.state import (
    Check,
    CloseReason,
    Con,
    ConnectionFlag,
    ConnectionState,
    Head,
    Slot,
    Str,
    StreamFlag,
    StreamState,
)
from mpserverd.config.schema import ListenerConfig, OnFull
from mpserverd.limits import STREAM_NAME_BYTES_MAX
from mpserverd.net.allowlist import Address, AddressTable
from mpserverd.net.channel import Kind, Message
from mpserverd.supervisor.children import Child, Children
from mpserverd.supervisor.core import Core
from mpserverd.supervisor.lost import finish_without_socket
from mpserverd.supervisor.naming import join_address, peer_stream_name, peer_text, split_address
from mpserverd.supervisor.placement import Load, choose
from mpserverd.supervisor.quarantine import DEATHS_MAX, QUARANTINE_S, Quarantine
from mpserverd.supervisor.states import ChildState
from mpserverd.supervisor.stream_rows import StreamRows

logger = logging.getLogger(__name__)

BUSY_WAIT_S = 2.0
"""A client that comes back waits so long for its stream to be drained; then it gets one of its own."""
STANDING_NS = 2_000_000_000
"""A storer that has not begun a turn for so long stands still, or has very much to do."""
OPENING_WAIT_S = 30.0
"""So long a connection waits for a storer that does not open its stream; then it gets one of its own."""


@dataclasses.dataclass(eq=False, slots=True)
class Connection:
    """``fd`` is the supervisor's dup. ``worker`` is None while it waits for its stream or for a worker."""

    row: int
    fd: int
    cookie: int
    address: Address
    port: int
    listener: int
    accepted_unix_ns: int
    accepted_ns: int
    client: str | None = None
    """Id of the configured client that its address belongs to."""
    client_index: int = 0
    stream: int | None = None
    worker: Child | None = None
    bound_for: Child | None = None
    """Who gets it when its worker lets go of it."""
    moved_s: float = -math.inf
    deadline_s: float = 0.0

    @property
    def peer(self) -> str:
        return peer_text(self.address, self.port)


@dataclasses.dataclass(frozen=True, slots=True)
class TakenUp:
    """How many connections go on, and how many had a row and no descriptor."""

    count: int
    lost_count: int


class Connections:
    """The connection table. The caller has admitted whatever comes in."""

    def __init__(self, core: Core, children: Children) -> None:
        self._core = core
        self._children = children
        self.streams = StreamRows(core.state)
        self._clients: AddressTable[tuple[int, str]] = AddressTable()
        self.use_clients()
        count = core.state.connection_count
        self._free_rows = list(range(count - 1, -1, -1))
        self._by_row: dict[int, Connection] = {}
        self._waiting: dict[int, Connection] = {}
        self._homeless: dict[int, Connection] = {}
        self._newcomers: Counter[int] = Counter()
        self._last_index = -1
        self._lost: dict[int, Connection] = {}
        self.quarantine = Quarantine()
        self.on_quarantine: Callable[[], None] = _nothing
        self.on_gone: Callable[[], None] = _nothing
        self.by_listener: Counter[str] = Counter()
        self.by_address: Counter[tuple[str, Address]] = Counter()

    # -- asking

    def __len__(self) -> int:
        return len(self._by_row)

    def all(self) -> list[Connection]:
        return list(self._by_row.values())

    def dups(self) -> list[tuple[int, int]]:
        """Cookie and descriptor of every connection that lives."""
        return [(connection.cookie, connection.fd) for connection in self._by_row.values() if connection.fd >= 0]

    def get(self, row: int) -> Connection | None:
        return self._by_row.get(row)

    @property
    def free_row_count(self) -> int:
        return len(self._free_rows)

    @property
    def unsettled_count(self) -> int:
        """Connections that no worker has: they wait for a stream or for a worker."""
        return len(self._waiting) + len(self._homeless)

    def stream_name(self, connection: Connection) -> str:
        return "" if connection.stream is None else self._core.state.stream_name(connection.stream)

    def listener_of(self, connection: Connection) -> ListenerConfig:
        return self._core.listeners[connection.listener]

    def use_clients(self) -> None:
        """Name those who come from now on by the configuration in force."""
        clients = self._core.config.clients
        self._clients = AddressTable((client.address, (index, client.id)) for index, client in enumerate(clients))

    # -- arriving

    def take(self, fd: int, cookie: int, address: Address, port: int, listener: int) -> None:
        """A connection that was admitted; ``fd`` is ours from now on. There is a free row, the caller looked."""
        row = self._free_rows.pop()
        connection = Connection(row, fd, cookie, address, port, listener, time.time_ns(), time.monotonic_ns())
        self._enter(connection)
        self._write_row(connection)
        self._core.count("accepted")
        words = self._core.state.words
        words[Head.ACTIVE_CONNECTIONS] = len(self._by_row)
        words[Head.TOTAL_CONNECTIONS] += 1
        self._find_stream(connection)

    def _enter(self, connection: Connection) -> None:
        client = self._clients.find(connection.address)
        if client is not None:
            connection.client_index, connection.client = client
        self._by_row[connection.row] = connection
        name = self.listener_of(connection).name
        self.by_listener[name] += 1
        self.by_address[name, connection.address] += 1

    def _write_row(self, connection: Connection) -> None:
        words = self._core.state.connections[connection.row]
        words[:] = 0
        words[Con.COOKIE] = connection.cookie
        words[Con.LISTENER] = connection.listener
        words[Con.PEER_HIGH], words[Con.PEER_LOW] = split_address(connection.address)
        words[Con.PEER_PORT] = connection.port
        words[Con.ACCEPTED_UNIX_NS] = connection.accepted_unix_ns
        words[Con.ACCEPTED_MONO_NS] = connection.accepted_ns
        self._set_state(connection, ConnectionState.ACCEPTED)

    def _set_state(self, connection: Connection, state: ConnectionState) -> None:
        table = self._core.state
        table.words[table.connection_base(connection.row) + Con.STATE] = state

    # -- after another supervisor

    def take_up(self, fds: dict[int, int]) -> TakenUp:
        """Go on with every row that an earlier supervisor left; no worker lives. ``fds`` are dups by cookie; what is
        left of them belongs to no row.

        A row without a descriptor has lost its client; what came from it is kept, whole packets of it.
        """
        self.streams.take_up()
        table = self._core.state.connections
        taken = np.flatnonzero(table[:, Con.STATE] != ConnectionState.FREE).tolist()
        rows_taken = set(taken)
        self._free_rows = [row for row in self._free_rows if row not in rows_taken]
        found = [self._from_row(row, fds) for row in taken]
        for connection in found:
            self._enter(connection)
        # those who have a stream first: newcomers may then find one that nobody has
        for connection in sorted(found, key=lambda each: self._state_of(each) is ConnectionState.ACCEPTED):
            self._go_on(connection)
        for row in self.streams.unused():
            self.streams.drain(row)
        self._core.ring_storer()
        self._core.set_head(Head.ACTIVE_CONNECTIONS, len(self._by_row))
        lost_count = len(self._lost)
        self.finish_lost()
        return TakenUp(len(self._by_row) - len(self._lost), lost_count)

    def _go_on(self, connection: Connection) -> None:
        state = self._state_of(connection)
        if state is ConnectionState.ACCEPTED:
            if connection.fd < 0:
                self._drop(connection, "its descriptor did not come back")
            else:
                self._find_stream(connection)
        elif not self._has_its_stream(connection):
            self._drop(connection, "its stream is gone")
        elif state is ConnectionState.ENDED:
            self._finish(connection)
        elif connection.fd < 0:
            self._lost[connection.row] = connection
        else:
            if state is ConnectionState.ASSIGNED:
                self._core.state.connections[connection.row, Con.ADOPTIONS] += np.uint64(1)
            self._homeless[connection.row] = connection

    def _from_row(self, row: int, fds: dict[int, int]) -> Connection:
        words = self._core.state.connections[row].tolist()
        listener = words[Con.LISTENER]
        return Connection(
            row,
            fds.pop(words[Con.COOKIE], -1),
            words[Con.COOKIE],
            join_address(words[Con.PEER_HIGH], words[Con.PEER_LOW]),
            words[Con.PEER_PORT],
            listener if listener in self._core.listeners else next(iter(self._core.listeners)),
            words[Con.ACCEPTED_UNIX_NS],
            words[Con.ACCEPTED_MONO_NS],
        )

    def _has_its_stream(self, connection: Connection) -> bool:
        words = self._core.state.connections[connection.row]
        stream = int(words[Con.STREAM])
        source = self._core.state.streams[stream]
        if source[Str.NUMBER] != words[Con.STREAM_NUMBER] or source[Str.STATE] != StreamState.OPEN:
            return False
        connection.stream = stream
        self.streams.use(stream, connection.row)
        return True

    def finish_lost(self) -> None:
        """Once a second too: a hole may have to be committed first."""
        for row, connection in list(self._lost.items()):
            if finish_without_socket(self._core.state, self._core.arena, row):
                del self._lost[row]
                self._finish(connection)

    # -- finding a stream

    def _find_stream(self, connection: Connection) -> None:
        """Now, or later by ``recheck``."""
        if connection.client is None:
            self._own_stream(connection, self._peer_name(connection))
            return
        name = connection.client
        row = self.streams.named(name)
        if row is None:
            self._open_named(connection, name)
        elif self.streams.user(row) is not None:
            self._find_place_beside(connection, row)
        elif self.streams.state_of(row) is StreamState.OPEN:
            self._settle(connection, row)
        elif self.streams.state_of(row) is StreamState.OPENING:
            self.streams.use(row, connection.row)  # somebody left it behind while it was being opened
            connection.stream = row
            self._wait(connection, OPENING_WAIT_S)
        elif connection.row not in self._waiting:
            self._wait(connection, BUSY_WAIT_S)

    def _find_place_beside(self, connection: Connection, stream: int) -> None:
        """Another connection has the client's stream. If that one is at its end this is the same client, back again."""
        user = self._by_row[self.streams.user(stream) or 0]
        if not _is_ending(user.fd):
            self._own_stream(connection, self._name_beside(connection, connection.client or ""))
        elif connection.row not in self._waiting:
            self._wait(connection, BUSY_WAIT_S)

    def _open_named(self, connection: Connection, name: str) -> None:
        listener = self.listener_of(connection)
        row = self.streams.begin_opening(
            name, connection.listener, listener.packet_size, _flags(listener), connection.client_index
        )
        if row is None:
            self._drop(connection, "no row for its stream is free")
            return
        self.streams.use(row, connection.row)
        connection.stream = row
        self._wait(connection, OPENING_WAIT_S)
        self._core.ring_storer()

    def _own_stream(self, connection: Connection, name: str) -> None:
        listener = self.listener_of(connection)
        row = self.streams.open_fresh(name, connection.listener, listener.packet_size, _flags(listener))
        if row is None:
            self._drop(connection, "no row for its stream is free")
        else:
            self._settle(connection, row)

    def _peer_name(self, connection: Connection) -> str:
        return peer_stream_name(connection.address, connection.port, connection.accepted_unix_ns)

    def _name_beside(self, connection: Connection, name: str) -> str:
        """For a second connection of a client whose stream is taken."""
        peer = self._peer_name(connection)
        return f"{name[: STREAM_NAME_BYTES_MAX - len(peer) - 1]}.{peer}"

    def _wait(self, connection: Connection, wait_s: float) -> None:
        connection.deadline_s = time.monotonic() + wait_s
        self._waiting[connection.row] = connection

    def _settle(self, connection: Connection, stream: int) -> None:
        """Its stream is OPEN: fill in where it stands, and find a worker."""
        self._waiting.pop(connection.row, None)
        connection.stream = stream
        self.streams.use(stream, connection.row)
        source = self._core.state.streams[stream]
        words = self._core.state.connections[connection.row]
        words[Con.STREAM] = stream
        words[Con.STREAM_NUMBER] = source[Str.NUMBER]
        words[Con.OFFSET_AT_ATTACH] = source[Str.RATE_POSITION] = source[Str.POSITION]
        words[Con.TRUNCATED_AT_ATTACH] = source[Str.TRUNCATED]
        words[Con.SOCKET_AT_ATTACH] = source[Str.SOCKET]
        source[Str.RATE_MILLI] = 0
        self._assign(connection)

    def recheck(self, now_s: float) -> None:
        """The storer opened or freed rows, or a second went by: look after everybody who waits."""
        for row in self.streams.opened():
            user = self.streams.user(row)
            if user is None:  # its connection went another way while it was being opened
                self.streams.drain(row)
                self._core.ring_storer()
            else:
                self._settle(self._by_row[user], row)
        self.streams.sweep()
        for connection in list(self._waiting.values()):
            if connection.stream is None:
                self._find_stream(connection)
            if connection.row in self._waiting and now_s >= self._deadline_s(connection):
                self._go_beside(connection)

    def _deadline_s(self, connection: Connection) -> float:
        """A storer that stands still must not keep a client waiting: its bytes go to a stream of their own then."""
        waiting_since_s = connection.accepted_ns / 1e9
        return (
            min(connection.deadline_s, waiting_since_s + BUSY_WAIT_S)
            if self._storer_stands()
            else connection.deadline_s
        )

    def _storer_stands(self) -> bool:
        storer = self._children.storer()
        if storer is None or storer.state is not ChildState.RUNNING:
            return True
        progress_ns = int(self._core.state.slots[storer.slot, Slot.PROGRESS_MONO_NS])
        return time.monotonic_ns() - progress_ns > STANDING_NS

    def _go_beside(self, connection: Connection) -> None:
        """It has waited long enough for its client's stream."""
        name = connection.client or ""
        if connection.stream is not None:
            self.streams.abandon(connection.stream)
            connection.stream = None
        log.event(logger, logging.WARNING, "stream not available in time", client=name, peer=connection.peer)
        self._own_stream(connection, self._name_beside(connection, name))

    def settle_now(self) -> None:
        """The daemon stops: whoever still waits for a stream gets one of its own."""
        for connection in list(self._waiting.values()):
            self._go_beside(connection)

    # -- with a worker

    def _assign(self, connection: Connection) -> None:
        """Give it to the least loaded worker, or keep it until there is one."""
        workers = [child for child in self._children.workers() if child.takes_connections]
        if not workers:
            self._homeless[connection.row] = connection
            return
        self._homeless.pop(connection.row, None)
        worker = connection.bound_for if connection.bound_for in workers else None
        worker = worker or self._choose(workers)
        connection.bound_for = None
        connection.worker = worker
        worker.rows.add(connection.row)
        self._newcomers[worker.slot] += 1
        table = self._core.state
        base = table.connection_base(connection.row)
        table.words[base + Con.WORKER] = worker.index
        table.words[base + Con.STATE] = ConnectionState.ASSIGNED
        self._children.send(worker, Message(Kind.ATTACH, connection.row, connection.cookie, fd=connection.fd))
        flags = table.words[base + Con.FLAGS]
        if flags & ConnectionFlag.KICKED:
            self._children.send(worker, Message(Kind.KICK, connection.row, reason=CloseReason.KICKED))

    def _choose(self, workers: list[Child]) -> Child:
        slots = self._core.state.slots
        loads = [
            Load(
                child.index,
                int(slots[child.slot, Slot.RATE_MILLI]) / 1000,
                len(child.rows),
                self._newcomers[child.slot],
            )
            for child in workers
        ]
        self._last_index = choose(loads, self._last_index)
        return next(child for child in workers if child.index == self._last_index)

    def measured(self) -> None:
        """The workers' rates are fresh: nobody is a newcomer any more."""
        self._newcomers.clear()

    def house(self) -> None:
        """A worker is ready: give it who has none."""
        for connection in list(self._homeless.values()):
            self._assign(connection)

    def orphan(self, child: Child) -> None:
        """Its pidfd fired: finish what it finished, give the rest to others. The kernel knows how far it read."""
        self._suspect(child)
        rows, child.rows = sorted(child.rows), set()
        adopted = 0
        for row in rows:
            connection = self._by_row[row]
            connection.worker = None
            if self._state_of(connection) is ConnectionState.ENDED:
                self._finish(connection)
                continue
            if self._state_of(connection) is ConnectionState.ASSIGNED:
                self._core.state.connections[row, Con.ADOPTIONS] += np.uint64(1)
                adopted += 1
            self._assign(connection)
        if adopted:
            self._core.count("adopted", adopted)
            self._core.note(
                logger,
                logging.WARNING,
                "connections adopted",
                message_id=log.MessageId.CONNECTIONS_ADOPTED,
                count=adopted,
                of=child.name,
            )

    def _suspect(self, child: Child) -> None:
        """Note what the dead worker had in hand; put it into quarantine when it is once too often."""
        table = self._core.state
        row = int(table.slots[child.slot, Slot.IN_HAND]) - 1
        connection = self._by_row.get(row)
        if connection is None or connection.stream is None or connection.worker is not child:
            return
        if child.was_killed_by_others or self._state_of(connection) is not ConnectionState.ASSIGNED:
            return
        stream = table.streams[connection.stream]
        record = (Str.CHECK0, Str.CHECK1)[int(stream[Str.CHECK_SELECT]) & 1]
        if self.quarantine.died(int(stream[Str.NUMBER]), int(stream[record + Check.CHECKED]), time.monotonic()):
            self._put_into_quarantine(connection)

    def _put_into_quarantine(self, connection: Connection) -> None:
        self._flag(connection, ConnectionFlag.QUARANTINED, on=True)
        name = connection.client if connection.client is not None else str(connection.address)
        stream = self.stream_name(connection)
        entry = self.quarantine.add(name, stream, time.time(), named=connection.client is not None)
        self.on_quarantine()
        self._core.note(
            logger,
            logging.ERROR,
            "stream quarantined",
            message_id=log.MessageId.STREAM_QUARANTINED,
            stream=stream,
            peer=connection.peer,
            client=name,
            why=f"{DEATHS_MAX} workers died on it at the same packet",
            refused="until released" if not entry.until_unix_s else f"for {QUARANTINE_S:.0f} s",
        )

    def is_quarantined(self, address: Address) -> bool:
        """Whether who comes from there is to be refused."""
        client = self._clients.find(address)
        return self.quarantine.refuses(client[1] if client is not None else str(address), time.time())

    def move(self, row: int, target: Child) -> None:
        """Hand it over to another worker that runs."""
        connection = self._by_row[row]
        connection.bound_for, connection.moved_s = target, time.monotonic()
        self._tell(connection, Message(Kind.DETACH, row))

    def released(self, row: int) -> None:
        """A worker let go of it (hand over): on to the next."""
        connection = self._by_row.get(row)
        if connection is None or self._state_of(connection) is not ConnectionState.RELEASED:
            return
        if row in self._homeless:
            return
        self._leave_worker(connection)
        self._core.count("handed_over")
        self._assign(connection)

    def ended(self, row: int) -> None:
        connection = self._by_row.get(row)
        if connection is not None and self._state_of(connection) is ConnectionState.ENDED:
            self._leave_worker(connection)
            self._finish(connection)

    def scan(self) -> None:
        """Once a second: what a lost message would have said."""
        if not self._by_row:
            return
        rows = np.fromiter(self._by_row, np.intp, len(self._by_row))
        states = self._core.state.connections[rows, Con.STATE]
        for row in rows[states == ConnectionState.ENDED].tolist():
            self.ended(row)
        for row in rows[states == ConnectionState.RELEASED].tolist():
            self.released(row)

    def _leave_worker(self, connection: Connection) -> None:
        if connection.worker is not None:
            connection.worker.rows.discard(connection.row)
            connection.worker = None

    def _state_of(self, connection: Connection) -> ConnectionState:
        return ConnectionState(int(self._core.state.connections[connection.row, Con.STATE]))

    # -- on request

    def kick(self, connection: Connection) -> None:
        """Through its worker, who alone may touch the socket; one that no worker ever had is closed here."""
        if connection.row in self._waiting:
            self._drop(connection, "kicked")
            return
        self._flag(connection, ConnectionFlag.KICKED, on=True)
        self._tell(connection, Message(Kind.KICK, connection.row, reason=CloseReason.KICKED))

    def pause(self, connection: Connection) -> None:
        self._flag(connection, ConnectionFlag.PAUSED, on=True)
        self._tell(connection, Message(Kind.PAUSE, connection.row))

    def resume(self, connection: Connection) -> None:
        self._flag(connection, ConnectionFlag.PAUSED, on=False)
        self._tell(connection, Message(Kind.RESUME, connection.row))

    def _flag(self, connection: Connection, flag: ConnectionFlag, *, on: bool) -> None:
        table = self._core.state
        at = table.connection_base(connection.row) + Con.FLAGS
        table.words[at] = table.words[at] | flag if on else table.words[at] & ~flag

    def _tell(self, connection: Connection, message: Message) -> None:
        if connection.worker is not None:
            self._children.send(connection.worker, message)

    # -- leaving

    def _finish(self, connection: Connection) -> None:
        """Its row says ENDED: nobody reads it any more, and all its bytes have been offered to the storer."""
        words = self._core.state.connections[connection.row]
        reason = CloseReason(int(words[Con.REASON]))
        packet_size = max(1, int(self._core.state.streams[connection.stream or 0, Str.PACKET_SIZE]))
        received = int(words[Con.SOCKET_BYTES]) - int(words[Con.HANDSHAKE_BYTES])
        fields: dict[str, Any] = {
            "stream": self.stream_name(connection),
            "peer": connection.peer,
            "listener": self.listener_of(connection).name,
            "worker": int(words[Con.WORKER]),
            "reason": reason,
            "errno": int(words[Con.ERRNO]),
            "bytes": received,
            "packets": received // packet_size,
            "truncated_bytes": received % packet_size,
            "connected_s": round((time.monotonic_ns() - connection.accepted_ns) / 1e9, 3),
            "adoptions": int(words[Con.ADOPTIONS]),
        }
        if fields["truncated_bytes"]:
            self._core.count("truncated_packets")
        log.event(logger, logging.INFO, "connection ended", message_id=log.MessageId.CLIENT_ENDED, **fields)
        stream = connection.stream
        self._forget(connection)
        if stream is not None:
            self.streams.drain(stream)
            self._core.ring_storer()

    def _drop(self, connection: Connection, why: str) -> None:
        """Close one that no worker ever had."""
        log.event(logger, logging.WARNING, "connection dropped", peer=connection.peer, why=why)
        if connection.stream is not None:
            self.streams.abandon(connection.stream)
        if connection.fd >= 0:
            _shut_down(connection.fd)
        self._forget(connection)

    def _forget(self, connection: Connection) -> None:
        """The last close, unless the worker is just before its own. No epoll of ours ever knew the descriptor."""
        self._set_state(connection, ConnectionState.FREE)
        if connection.fd >= 0:
            os.close(connection.fd)
        name = self.listener_of(connection).name
        _decrease(self.by_listener, name)
        _decrease(self.by_address, (name, connection.address))
        self._waiting.pop(connection.row, None)
        self._homeless.pop(connection.row, None)
        del self._by_row[connection.row]
        self._free_rows.append(connection.row)
        self._core.set_head(Head.ACTIVE_CONNECTIONS, len(self._by_row))
        self.on_gone()

    def close_all(self, *, for_good: bool) -> None:
        """At the very end of the process, when all workers are dead. Unless it is ``for_good``, others hold dups."""
        for connection in self.all():
            if connection.fd >= 0:
                if for_good:
                    _shut_down(connection.fd)
                os.close(connection.fd)
        self._by_row.clear()


def _flags(listener: ListenerConfig) -> StreamFlag:
    flags = StreamFlag(0)
    if listener.store:
        flags |= StreamFlag.STORE
    if listener.on_full is OnFull.DROP_OLDEST:
        flags |= StreamFlag.DROP_OLDEST
    return flags


def _is_ending(fd: int) -> bool:
    """Whether the peer has closed or reset it. Poll takes no lock of the socket, so it may be asked at any time."""
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    return bool(poll.poll(0))


def _shut_down(fd: int) -> None:
    """A close says nothing to the peer while a carrier holds a dup."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as sock:
        sock.shutdown(socket.SHUT_RDWR)


def _nothing(*_: object) -> None:
    """Nobody wants to know."""


def _decrease(counter: Counter[Any], key: Any) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
