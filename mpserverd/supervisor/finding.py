"""Which stream a connection feeds: found by its address, its hello or its peer; opened, waited for, or one of its own.

Rules: a raw client never waits longer than its deadline, since some cut packets in half when they stall: it then gets a
stream beside. An mps client waits for its own stream and no other, and is told when that cannot be had. A stream that
another connection has is taken over only in mps, by ending that connection first: what it sent is durable before the
new one is answered, because a stream is opened from the catalog.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from mpserverd import log
from mpserverd.arena.state import Check, CloseReason, Con, HoleKind, Str, StreamFlag, StreamState
from mpserverd.config.schema import ListenerConfig, OnFull, Protocol
from mpserverd.limits import STREAM_NAME_BYTES_MAX
from mpserverd.protocol.mps import Bye, ByeReason, ErrorCode, Hello, HelloError, Refusal
from mpserverd.supervisor.connection import Connection, Farewell, is_ending
from mpserverd.supervisor.core import Core
from mpserverd.supervisor.hello import GOES_ON, Asked, Found, Rivals, asked, judge
from mpserverd.supervisor.naming import peer_stream_name
from mpserverd.supervisor.stream_rows import StreamRows

logger = logging.getLogger(__name__)

BUSY_WAIT_S = 2.0
"""A client that comes back waits so long for its stream to be drained; then it gets one of its own."""
OPENING_WAIT_S = 30.0
"""So long a connection waits for a storer that does not open its stream; then it gets one of its own."""
HELLO_WAIT_S = 10.0
"""So long an mps client waits for its stream; then it is told to come back."""
LINES_INTERVAL_S, LINES_BURST = 5.0, 5


class Finding:
    """``connections`` are all by row. ``assign`` gives one to a worker, ``drop`` closes one, ``take_away(connection,
    retry_s)`` has a worker end one that is superseded, ``storer_stands`` says whether waiting is idle."""

    def __init__(
        self,
        core: Core,
        streams: StreamRows,
        connections: Mapping[int, Connection],
        *,
        assign: Callable[[Connection], None],
        drop: Callable[[Connection, str], None],
        take_away: Callable[[Connection, int], None],
        storer_stands: Callable[[], bool],
    ) -> None:
        self._core = core
        self._streams = streams
        self._connections = connections
        self._assign = assign
        self._drop = drop
        self._take_away = take_away
        self._storer_stands = storer_stands
        self._rivals = Rivals()
        self._limiters: dict[str, log.RateLimiter] = {}
        self.waiting: dict[int, Connection] = {}

    def _listener_of(self, connection: Connection) -> ListenerConfig:
        return self._core.listeners[connection.listener]

    def find(self, connection: Connection) -> None:
        """Now, or later by ``recheck``."""
        if connection.greets:
            self._find_for_hello(connection)
        elif connection.client is None:
            self._own_stream(connection, self._peer_name(connection))
        else:
            self._find_named(connection, connection.client)

    # -- raw

    def _find_named(self, connection: Connection, name: str) -> None:
        row = self._streams.named(name)
        if row is None:
            self._open(connection, name, GOES_ON, self._listener_of(connection).packet_size, StreamFlag(0))
        elif self._streams.user(row) is not None:
            self._find_place_beside(connection, row)
        elif self._streams.state_of(row) is StreamState.OPEN:
            self.settle(connection, row)
        elif self._streams.state_of(row) is StreamState.OPENING and not self._was_asked_for_by_hello(row):
            self._streams.use(row, connection.row)  # somebody left it behind while it was being opened
            connection.stream = row
            self._wait(connection, OPENING_WAIT_S)
        elif connection.row not in self.waiting:
            self._wait(connection, BUSY_WAIT_S)

    def _was_asked_for_by_hello(self, row: int) -> bool:
        return bool(int(self._core.state.streams[row, Str.FLAGS]) & StreamFlag.MPS)

    def _find_place_beside(self, connection: Connection, stream: int) -> None:
        """Another connection has the client's stream. If that one is at its end this is the same client, back again."""
        user = self._connections[self._streams.user(stream) or 0]
        if not is_ending(user.fd):
            self._own_stream(connection, self._name_beside(connection, connection.client or ""))
        elif connection.row not in self.waiting:
            self._wait(connection, BUSY_WAIT_S)

    def _own_stream(self, connection: Connection, name: str) -> None:
        listener = self._listener_of(connection)
        row = self._streams.open_fresh(name, connection.listener, listener.packet_size, _flags(listener))
        if row is None:
            self._drop(connection, "no row for its stream is free")
        else:
            self.settle(connection, row)

    def _peer_name(self, connection: Connection) -> str:
        return peer_stream_name(connection.address, connection.port, connection.accepted_unix_ns)

    def _name_beside(self, connection: Connection, name: str) -> str:
        """For a second connection of a client whose stream is taken."""
        peer = self._peer_name(connection)
        return f"{name[: STREAM_NAME_BYTES_MAX - len(peer) - 1]}.{peer}"

    def _go_beside(self, connection: Connection) -> None:
        """It has waited long enough for its client's stream."""
        name = connection.client or ""
        self._abandon(connection)
        log.event(logger, logging.WARNING, "stream not available in time", client=name, peer=connection.peer)
        self._own_stream(connection, self._name_beside(connection, name))

    # -- mps

    def greeted(self, connection: Connection, hello: Hello, length: int) -> None:
        """A worker has seen its hello, of ``length`` bytes; nothing was taken yet."""
        listener = self._listener_of(connection)
        if listener.packet_size and hello.packet_size != listener.packet_size:
            text = f"packets of {listener.packet_size} bytes are taken here, not {hello.packet_size}"
            self.refuse(connection, HelloError(ErrorCode.PACKET_SIZE, text))
            return
        try:
            asked(hello)
        except HelloError as error:
            self.refuse(connection, error)
            return
        connection.hello, connection.hello_bytes, connection.client = hello, length, hello.client_id
        connection.client_index = next(
            (index for index, client in enumerate(self._core.config.clients) if client.id == hello.client_id), -1
        )
        self.find(connection)

    def _find_for_hello(self, connection: Connection) -> None:
        hello = connection.hello
        if hello is None or connection.farewell is not None:
            self._assign(connection)
            return
        row = self._streams.named(hello.client_id)
        if row is None:
            self._open(connection, hello.client_id, asked(hello), hello.packet_size, StreamFlag.MPS)
            return
        user = self._streams.user(row)
        if user is None and self._streams.state_of(row) is StreamState.OPEN:
            self._drain(row)
        elif user is not None and self._connections[user] is not connection:
            self._try_supersede(connection, hello, row, self._connections[user])
        if connection.row not in self.waiting and connection.farewell is None:
            self._wait(connection, HELLO_WAIT_S)

    def _try_supersede(self, connection: Connection, hello: Hello, row: int, rival: Connection) -> None:
        """The same client is there already: that connection has to go, if it may be superseded, and by this hello."""
        if connection.rival is rival:
            return
        try:
            if not rival.greets or rival.address != connection.address:
                text = "another connection has this id now; it may be superseded from its own address only"
                raise HelloError(ErrorCode.IN_USE, text)
            found = self._found(row)
            if self._streams.state_of(row) is StreamState.OPEN and found.position:  # else it is begun anew
                judge(hello, found)
        except HelloError as error:
            self.refuse(connection, error)
        else:
            self._supersede(connection, rival)

    def _supersede(self, connection: Connection, rival: Connection) -> None:
        connection.rival = rival
        retry_s = 0
        if not is_ending(rival.fd):
            retry_s = self._rivals.superseded(connection.client or "", time.monotonic())
            self._core.count("superseded")
            self._say(
                "connection superseded",
                log.MessageId.CLIENT_SUPERSEDED,
                client=connection.client,
                peer=rival.peer,
                by=connection.peer,
            )
        if rival.worker is None and rival.row in self.waiting:
            self._send_away(rival, Bye(ByeReason.SUPERSEDED, retry_s or None).to_line(), CloseReason.SUPERSEDED)
        else:
            self._take_away(rival, retry_s)

    def refuse(self, connection: Connection, error: HelloError) -> None:
        """Say ERR, and end it."""
        self._core.count(f"hello_{error.code.replace('-', '_')}")
        self._say(
            "hello refused",
            log.MessageId.HELLO_REFUSED,
            code=error.code,
            why=str(error),
            client=connection.client,
            peer=connection.peer,
        )
        self._send_away(connection, Refusal(error.code, str(error)).to_line(), CloseReason.REFUSED)

    def _send_away(self, connection: Connection, line: bytes, reason: CloseReason) -> None:
        self._abandon(connection)
        self.waiting.pop(connection.row, None)
        connection.farewell = Farewell(line, reason)
        self._assign(connection)

    def _say(self, text: str, message_id: log.MessageId, **fields: Any) -> None:
        """At most a few lines of a kind in a while: clients can bring them about."""
        limiter = self._limiters.setdefault(text, log.RateLimiter(LINES_INTERVAL_S, burst=LINES_BURST))
        suppressed = limiter.admit(time.monotonic())
        if suppressed is not None:
            log.event(logger, logging.WARNING, text, message_id=message_id, suppressed=suppressed, **fields)

    def _answer(self, connection: Connection, hello: Hello, row: int) -> None:
        """The storer has opened its stream: go on there, or say why not."""
        found = self._found(row)
        try:
            offset = judge(hello, found)
        except HelloError as error:
            connection.stream = None
            self._drain(row)
            self.refuse(connection, error)
            return
        if offset > found.position:
            self._leave_hole(row, found.position, offset)
        self.settle(connection, row)

    def _found(self, row: int) -> Found:
        words = self._core.state.streams[row]
        return Found(int(words[Str.EPOCH]), int(words[Str.PACKET_SIZE]), int(words[Str.POSITION]))

    def _leave_hole(self, row: int, first: int, end: int) -> None:
        """The client does not hold these packets any more. No worker has the row yet, so its words are ours."""
        words = self._core.state.streams[row]
        words[Str.HOLE0_FIRST], words[Str.HOLE0_KIND], words[Str.HOLE0_END] = first, HoleKind.LOST, end
        words[Str.CHECK0 + Check.CHECKED] = end
        words[Str.POSITION] = end
        name = self._core.state.stream_name(row)
        self._say("client lost packets", log.MessageId.PACKETS_LOST, client=name, bytes=end - first, offset=first)

    # -- both

    def _open(self, connection: Connection, name: str, wish: Asked, packet_size: int, flags: StreamFlag) -> None:
        listener = self._listener_of(connection)
        row = self._streams.begin_opening(
            name, connection.listener, packet_size, _flags(listener) | flags, connection.client_index, wish
        )
        if row is None:
            if connection.greets:
                self.refuse(connection, HelloError(ErrorCode.BUSY, "no row for its stream is free"))
            else:
                self._drop(connection, "no row for its stream is free")
            return
        self._streams.use(row, connection.row)
        connection.stream = row
        self._wait(connection, HELLO_WAIT_S if connection.greets else OPENING_WAIT_S)
        self._core.ring_storer()

    def _wait(self, connection: Connection, wait_s: float) -> None:
        if connection.row not in self.waiting or not connection.greets:
            connection.deadline_s = time.monotonic() + wait_s
        self.waiting[connection.row] = connection

    def _abandon(self, connection: Connection) -> None:
        if connection.stream is not None:
            self._streams.abandon(connection.stream)
            connection.stream = None

    def _drain(self, row: int) -> None:
        self._streams.drain(row)
        self._core.ring_storer()

    def settle(self, connection: Connection, stream: int) -> None:
        """Its stream is OPEN: fill in where it stands, and find a worker."""
        self.waiting.pop(connection.row, None)
        connection.stream, connection.rival = stream, None
        self._streams.use(stream, connection.row)
        self._streams.settled(stream)
        source = self._core.state.streams[stream]
        words = self._core.state.connections[connection.row]
        words[Con.STREAM] = stream
        words[Con.STREAM_NUMBER] = source[Str.NUMBER]
        words[Con.OFFSET_AT_ATTACH] = source[Str.RATE_POSITION] = source[Str.POSITION]
        words[Con.TRUNCATED_AT_ATTACH] = source[Str.TRUNCATED]
        words[Con.SOCKET_AT_ATTACH] = source[Str.SOCKET]
        words[Con.HANDSHAKE_AT_ATTACH] = source[Str.HANDSHAKE]
        words[Con.HANDSHAKE_BYTES] = connection.hello_bytes
        words[Con.REASON] = 0  # a worker that died at its hello may have left one
        source[Str.RATE_MILLI] = 0
        self._assign(connection)

    def recheck(self, now_s: float) -> None:
        """The storer opened or freed rows, or a second went by: look after everybody who waits."""
        for row in self._streams.opened():
            user = self._streams.user(row)
            if user is None:  # its connection went another way while it was being opened
                self._drain(row)
                continue
            connection = self._connections[user]
            if connection.hello is not None:
                self._answer(connection, connection.hello, row)
            else:
                self.settle(connection, row)
        self._streams.sweep()
        for connection in list(self.waiting.values()):
            if connection.row in self.waiting and connection.stream is None:
                self.find(connection)
            if connection.row in self.waiting and now_s >= self._deadline_s(connection):
                self._give_up(connection)

    def _deadline_s(self, connection: Connection) -> float:
        """A storer that stands still must not keep a raw client waiting: its bytes go to a stream of their own then."""
        if connection.greets or not self._storer_stands():
            return connection.deadline_s
        return min(connection.deadline_s, connection.accepted_ns / 1e9 + BUSY_WAIT_S)

    def _give_up(self, connection: Connection) -> None:
        if not connection.greets:
            self._go_beside(connection)
            return
        text = "the stream cannot be opened now; come back later"
        self.refuse(connection, HelloError(ErrorCode.UNAVAILABLE, text))

    def settle_now(self) -> None:
        """The daemon stops: a raw client that still waits gets a stream of its own, others are told."""
        for connection in list(self.waiting.values()):
            if connection.greets:
                self._send_away(connection, Bye(ByeReason.STOPPING).to_line(), CloseReason.STOPPING)
            else:
                self._go_beside(connection)


def speaks_mps(listener: ListenerConfig) -> bool:
    return listener.protocol is Protocol.MPS


def _flags(listener: ListenerConfig) -> StreamFlag:
    flags = StreamFlag(0)
    if listener.store:
        flags |= StreamFlag.STORE
    if listener.on_full is OnFull.DROP_OLDEST:
        flags |= StreamFlag.DROP_OLDEST
    return flags
