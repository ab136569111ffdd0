"""Every connection from its accept to the last close: row, stream, worker, adoption, end.

Rules: row first, then worker, so that a successor knows of every connection (the carrier comes before both: see
accepting.py). The supervisor keeps a dup as a plain int and makes no call on it while a worker owns it. A connection
whose stream is not open yet waits unread; TCP holds its bytes. A connection of a dead worker is given away only from
``orphan``, which is called after the pidfd fired.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from mpserverd import log
from mpserverd.arena.state import (
    CloseReason,
    Con,
    ConnectionFlag,
    ConnectionState,
    Head,
    Slot,
    Str,
    StreamState,
)
from mpserverd.config.schema import ListenerConfig
from mpserverd.net.allowlist import Address, AddressTable
from mpserverd.net.channel import Kind, Message
from mpserverd.protocol.mps import ErrorCode, Hello, HelloError
from mpserverd.supervisor.child import Child
from mpserverd.supervisor.children import Children
from mpserverd.supervisor.connection import Connection, Sentence, shut_down
from mpserverd.supervisor.connection_rows import ConnectionRows
from mpserverd.supervisor.core import Core
from mpserverd.supervisor.finding import Finding, speaks_mps
from mpserverd.supervisor.lost import finish_without_socket
from mpserverd.supervisor.placement import Load, choose
from mpserverd.supervisor.quarantine import Quarantine
from mpserverd.supervisor.states import ChildState
from mpserverd.supervisor.stream_rows import StreamRows
from mpserverd.supervisor.suspecting import Suspecting, hellos_of

logger = logging.getLogger(__name__)

STANDING_NS = 2_000_000_000
"""A storer that has not begun a turn for so long stands still, or has very much to do."""


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
        self._rows = ConnectionRows(core.state)
        self._by_row: dict[int, Connection] = {}
        self._homeless: dict[int, Connection] = {}
        self._newcomers: Counter[int] = Counter()
        self._last_index = -1
        self._lost: dict[int, Connection] = {}
        self.quarantine = Quarantine()
        self.suspecting = Suspecting(core, self.quarantine, self._by_row.get)
        self.on_gone: Callable[[], None] = _nothing
        self._finding = Finding(
            core,
            self.streams,
            self._by_row,
            assign=self._assign,
            drop=self._drop,
            take_away=self._take_away,
            storer_stands=self._storer_stands,
        )
        self._waiting = self._finding.waiting
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
        return self._rows.free_count

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
        row = self._rows.take()
        connection = Connection(row, fd, cookie, address, port, listener, time.time_ns(), time.monotonic_ns())
        self._enter(connection)
        self._rows.fill(connection)
        self._core.count("accepted")
        words = self._core.state.words
        words[Head.ACTIVE_CONNECTIONS] = len(self._by_row)
        words[Head.TOTAL_CONNECTIONS] += 1
        if connection.greets and self.quarantine.refuses(hellos_of(address), time.time()):
            self._finding.refuse(connection, _quarantined())
        else:
            self._finding.find(connection)

    def _enter(self, connection: Connection) -> None:
        connection.greets = speaks_mps(self.listener_of(connection))
        client = None if connection.greets else self._clients.find(connection.address)
        if client is not None:
            connection.client_index, connection.client = client
        self._by_row[connection.row] = connection
        name = self.listener_of(connection).name
        self.by_listener[name] += 1
        self.by_address[name, connection.address] += 1

    # -- after another supervisor

    def take_up(self, fds: dict[int, int]) -> TakenUp:
        """Go on with every row that an earlier supervisor left; no worker lives. ``fds`` are dups by cookie; what is
        left of them belongs to no row.

        A row without a descriptor has lost its client; what came from it is kept, whole packets of it.
        """
        self.streams.take_up()
        found = self._rows.take_up(fds)
        for connection in found:
            if connection.listener not in self._core.listeners:
                connection.listener = next(iter(self._core.listeners))
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
        if state in (ConnectionState.ACCEPTED, ConnectionState.HELLO):
            if connection.fd < 0:
                self._drop(connection, "its descriptor did not come back")
            else:
                self._rows.set_state(connection.row, ConnectionState.ACCEPTED)
                self._finding.find(connection)
        elif not self._has_its_stream(connection) and state is not ConnectionState.ENDED:
            self._drop(connection, "its stream is gone")
        elif state is ConnectionState.ENDED:
            self._finish_for_the_dead(connection)
        elif connection.fd < 0:
            self._lost[connection.row] = connection
        else:
            if state is ConnectionState.ASSIGNED:
                self._rows.count_adoption(connection.row)
            self._homeless[connection.row] = connection

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

    def recheck(self, now_s: float) -> None:
        """The storer opened or freed rows, or a second went by: look after everybody who waits."""
        self._finding.recheck(now_s)

    def settle_now(self) -> None:
        """The daemon stops: nobody waits for a stream any longer."""
        self._finding.settle_now()

    def _storer_stands(self) -> bool:
        storer = self._children.storer()
        if storer is None or storer.state is not ChildState.RUNNING:
            return True
        progress_ns = int(self._core.state.slots[storer.slot, Slot.PROGRESS_MONO_NS])
        return time.monotonic_ns() - progress_ns > STANDING_NS

    def greeted(self, row: int, child: Child, said: dict[str, Any]) -> None:
        """A worker has let go of a connection whose hello it has seen, or that made none possible."""
        connection = self._by_row.get(row)
        if connection is None or connection.worker is not child:
            return
        if self._state_of(connection) is not ConnectionState.ACCEPTED:
            return
        self._leave_worker(connection)
        line = str(said.get("line", "")).encode("latin-1", "replace")
        try:
            if "code" in said:
                raise HelloError(ErrorCode(said["code"]), str(said.get("text", "")))
            hello = Hello.from_line(line)
            if self.quarantine.refuses(hello.client_id, time.time()):
                raise _quarantined()
        except HelloError as error:
            self._finding.refuse(connection, error)
        else:
            self._finding.greeted(connection, hello, len(line))

    def _take_away(self, connection: Connection, retry_s: int) -> None:
        """Superseded by the same client."""
        connection.sentence = Sentence(CloseReason.SUPERSEDED, retry_s)
        self._tell_sentence(connection)

    def _tell_sentence(self, connection: Connection) -> None:
        if connection.sentence is not None:
            reason, retry_s = connection.sentence.reason, connection.sentence.retry_s
            self._tell(connection, Message(Kind.KICK, connection.row, reason=reason, value=retry_s))

    # -- with a worker

    def _assign(self, connection: Connection) -> None:
        """Give it to the least loaded worker that knows its listener, or keep it until there is one."""
        workers = [child for child in self._children.workers() if child.takes(connection.listener)]
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
        self._core.state.connections[connection.row, Con.WORKER] = worker.index
        early = connection.awaits_worker_without_stream
        self._rows.set_state(connection.row, ConnectionState.HELLO if early else ConnectionState.ASSIGNED)
        self._children.send(worker, _first_message(connection))
        if self._rows.flags_of(connection.row) & ConnectionFlag.KICKED:
            self._children.send(worker, Message(Kind.KICK, connection.row, reason=CloseReason.KICKED))
        self._tell_sentence(connection)

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
        convicted = self.suspecting.convict(child)
        rows, child.rows = sorted(child.rows), set()
        adopted = 0
        for row in rows:
            connection = self._by_row[row]
            connection.worker = None
            if self._state_of(connection) is ConnectionState.ENDED:
                self._finish_for_the_dead(connection)
                continue
            if connection is convicted and self._state_of(connection) is ConnectionState.HELLO:
                self._finding.refuse(connection, _quarantined())
                continue
            if connection is convicted:
                self._rows.flag(connection.row, ConnectionFlag.QUARANTINED, on=True)
            if self._state_of(connection) is ConnectionState.ASSIGNED:
                self._rows.count_adoption(row)
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
        if connection is None or not self._is_let_go(connection):
            return
        if row in self._homeless:
            return
        self._leave_worker(connection)
        self._core.count("handed_over")
        self._assign(connection)

    def _is_let_go(self, connection: Connection) -> bool:
        """By its worker, on purpose; a connection whose hello is awaited has no state of its own for that."""
        state = self._state_of(connection)
        early = state is ConnectionState.ACCEPTED and connection.worker is not None
        return early or state is ConnectionState.RELEASED

    def ended(self, row: int) -> None:
        connection = self._by_row.get(row)
        if connection is not None and self._state_of(connection) is ConnectionState.ENDED:
            self._leave_worker(connection)
            self._finish(connection)

    def scan(self) -> None:
        """Once a second: what a lost message would have said."""
        for row in self._rows.in_state(list(self._by_row), ConnectionState.ENDED):
            self.ended(row)
        for row in self._rows.in_state(list(self._by_row), ConnectionState.RELEASED):
            self.released(row)

    def _leave_worker(self, connection: Connection) -> None:
        if connection.worker is not None:
            connection.worker.rows.discard(connection.row)
            connection.worker = None

    def _state_of(self, connection: Connection) -> ConnectionState:
        return self._rows.state_of(connection.row)

    # -- on request

    def kick(self, connection: Connection) -> None:
        """Through its worker, who alone may touch the socket; one that no worker ever had is closed here."""
        if connection.row in self._waiting and not connection.greets:
            self._drop(connection, "kicked")
            return
        self._rows.flag(connection.row, ConnectionFlag.KICKED, on=True)
        self._tell(connection, Message(Kind.KICK, connection.row, reason=CloseReason.KICKED))

    def pause(self, connection: Connection) -> None:
        self._rows.flag(connection.row, ConnectionFlag.PAUSED, on=True)
        self._tell(connection, Message(Kind.PAUSE, connection.row))

    def resume(self, connection: Connection) -> None:
        self._rows.flag(connection.row, ConnectionFlag.PAUSED, on=False)
        self._tell(connection, Message(Kind.RESUME, connection.row))

    def _tell(self, connection: Connection, message: Message) -> None:
        if connection.worker is not None:
            self._children.send(connection.worker, message)

    # -- leaving

    def _finish(self, connection: Connection) -> None:
        """Its row says ENDED: nobody reads it any more, and all its bytes have been offered to the storer."""
        words = self._core.state.connections[connection.row]
        reason = CloseReason(int(words[Con.REASON]))
        stream = connection.stream
        packet_size = 1 if stream is None else max(1, int(self._core.state.streams[stream, Str.PACKET_SIZE]))
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
        self._forget(connection)
        if stream is not None and self.streams.user(stream) == connection.row:
            self.streams.drain(stream)
            self._core.ring_storer()

    def _finish_for_the_dead(self, connection: Connection) -> None:
        """Its worker may have died before it told the client; the carrier holds a dup for up to a minute more."""
        if connection.fd >= 0:
            shut_down(connection.fd)
        self._finish(connection)

    def _drop(self, connection: Connection, why: str) -> None:
        """Close one that no worker ever had."""
        log.event(logger, logging.WARNING, "connection dropped", peer=connection.peer, why=why)
        if connection.stream is not None:
            self.streams.abandon(connection.stream)
        if connection.fd >= 0:
            shut_down(connection.fd)
        self._forget(connection)

    def _forget(self, connection: Connection) -> None:
        """The last close, unless the worker is just before its own. No epoll of ours ever knew the descriptor."""
        self._rows.give_back(connection.row)
        if connection.fd >= 0:
            os.close(connection.fd)
        name = self.listener_of(connection).name
        _decrease(self.by_listener, name)
        _decrease(self.by_address, (name, connection.address))
        self._waiting.pop(connection.row, None)
        self._homeless.pop(connection.row, None)
        del self._by_row[connection.row]
        self._core.set_head(Head.ACTIVE_CONNECTIONS, len(self._by_row))
        self.on_gone()

    def close_all(self, *, for_good: bool) -> None:
        """At the very end of the process, when all workers are dead. Unless it is ``for_good``, others hold dups."""
        for connection in self.all():
            if connection.fd >= 0:
                if for_good:
                    shut_down(connection.fd)
                os.close(connection.fd)
        self._by_row.clear()


def _quarantined() -> HelloError:
    return HelloError(ErrorCode.QUARANTINED, "workers died on this stream; an operator can release it")


def _first_message(connection: Connection) -> Message:
    """What a worker is to do with it."""
    row, cookie, fd = connection.row, connection.cookie, connection.fd
    if connection.farewell is not None:
        line = connection.farewell.line.decode("ascii")
        return Message(Kind.REFUSE, row, cookie, connection.farewell.reason, {"line": line}, fd)
    return Message(Kind.GREET if connection.awaits_worker_without_stream else Kind.ATTACH, row, cookie, fd=fd)


def _nothing(*_: object) -> None:
    """Nobody wants to know."""


def _decrease(counter: Counter[Any], key: Any) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
