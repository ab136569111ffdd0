"""What a client and a server have agreed on, and what the client does next. Sans-IO: bytes and times in, bytes out.

    WAITING --dial()--> CONNECTING --connected()--> GREETING --OK--> STREAMING
       ^                     |                         |                |
       +------- lost() ------+------- ERR, BYE, a deadline, nonsense ---+       FAILED: gave up, see ``error``
                                                                                CLOSED: close() was called

The owner connects when ``dial_at`` is over, sends what ``connected`` and ``outgoing`` give, tells ``sent`` what went
out and ``receive`` what came in, calls the buffer's ``settle`` after that, calls ``expire`` when ``deadline`` is over,
and ends its connection whenever the state is no longer one of ``CONNECTED_STATES``. ``take_notices`` says what
callbacks are to be told.

Rules
* Nothing is sent before a whole OK, and never a packet before its <next-packet>.
* Every hello after the first OK has epoch= and first=, so that a server that knows better says so. First= is where the
  buffer begins: what was dropped before becomes a hole that the server counts.
* A server that has not our epoch and did not give it to us, or acknowledged nothing of it: it is asked to number us.
* The one that gave it contradicts us (another epoch, or less than it had acknowledged): it lost its stream.
  ``on_epoch`` decides: give up, or begin a new epoch with what is held.
* Such another opening is for that server alone, and for one attempt, which follows at once. A server that then says our
  epoch after all is gone on with, never renumbered.
* An epoch that we had before, on a server that we come back to: its OK says what it kept of ours.
* An OK for more than was sent in its epoch: somebody else has our id. An ACK for it is nonsense, and ends the
  connection; a lower one is old, and ignored.

It knows no sockets and no clock. The buffer keeps what must outlive the process.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
from typing import assert_never

from mpserverd.client.buffer import PacketBuffer
from mpserverd.client.errors import (
    ClientError,
    EpochError,
    RefusedError,
    StreamLostError,
    StreamTakenError,
)
from mpserverd.client.servers import Servers
from mpserverd.protocol import mps


class State(enum.StrEnum):
    WAITING = "waiting"
    """Not connected; the next attempt is at ``dial_at``."""
    CONNECTING = "connecting"
    GREETING = "greeting"
    """The hello is out, OK is awaited."""
    STREAMING = "streaming"
    FAILED = "failed"
    CLOSED = "closed"


CONNECTED_STATES = frozenset({State.CONNECTING, State.GREETING, State.STREAMING})


class Event(enum.StrEnum):
    DIAL = "dial"
    CONNECT = "connect"
    OK = "ok"
    LOSE = "lose"
    FAIL = "fail"
    CLOSE = "close"


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.WAITING, Event.DIAL): State.CONNECTING,
    (State.CONNECTING, Event.CONNECT): State.GREETING,
    (State.GREETING, Event.OK): State.STREAMING,
    (State.CONNECTING, Event.LOSE): State.WAITING,
    (State.GREETING, Event.LOSE): State.WAITING,
    (State.STREAMING, Event.LOSE): State.WAITING,
    (State.GREETING, Event.FAIL): State.FAILED,
    (State.STREAMING, Event.FAIL): State.FAILED,
    **{(state, Event.CLOSE): State.CLOSED for state in State if state is not State.CLOSED},
}


class Opening(enum.Enum):
    """What a hello says of the stream: whether it names epoch= and first=, and whether it has new=1."""

    GO_ON = (True, False)
    """As far as an epoch is known."""
    UNNUMBERED = (False, False)
    """Whatever you have: number us."""
    NEW = (True, True)
    """Unless you have our epoch after all, begin another."""
    NEW_ANYHOW = (False, True)
    """You have our epoch and lost packets of it: begin another."""


NUMBERINGS_MAX = 8
"""Epochs that are remembered beside the present one: more servers than anybody moves between."""
SETTLED_S = 5.0
"""A connection that lived so long after its OK was a good one: the next pause is short again."""


class Loss(enum.StrEnum):
    """Why a connection, or an attempt at one, ended."""

    UNREACHABLE = "unreachable"
    CONNECT_TIMEOUT = "connect-timeout"
    ANSWER_TIMEOUT = "answer-timeout"
    ACK_TIMEOUT = "ack-timeout"
    ENDED = "ended"
    """The server closed it without a word."""
    BROKEN = "broken"
    BYE = "bye"
    REFUSED = "refused"
    NONSENSE = "nonsense"
    RENUMBERED = "renumbered"
    """This end closed it, to begin again with another first=, epoch= or new=."""


@dataclasses.dataclass(frozen=True, slots=True)
class Terms:
    """``on_epoch`` is "raise" or "new"."""

    client_id: str
    packet_size: int
    token: str | None = None
    on_epoch: str = "raise"
    connect_timeout_s: float = 10.0
    answer_timeout_s: float = 30.0
    ack_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        hello = mps.Hello(self.client_id, self.packet_size, self.token)
        try:
            mps.Hello.from_line(hello.to_line())
        except (mps.HelloError, UnicodeError) as error:
            raise ValueError(f"no server would take this client: {error}") from None
        if self.on_epoch not in ("raise", "new"):
            raise ValueError(f'on_epoch is "raise" or "new", not {self.on_epoch!r}')
        for name in ("connect_timeout_s", "answer_timeout_s", "ack_timeout_s"):
            if not 0 < getattr(self, name) <= 86_400:
                raise ValueError(f"{name} is more than 0 and at most a day, not {getattr(self, name)!r}")


@dataclasses.dataclass(frozen=True, slots=True)
class Changed:
    """The state is another one; ``why`` is a Loss or empty, ``detail`` says it in words."""

    state: State
    why: str = ""
    detail: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Acknowledged:
    """Everything before this index is kept by the server."""

    next_packet: int


Notice = Changed | Acknowledged


class Session:
    """One client's stream, over any number of connections."""

    def __init__(self, terms: Terms, buffer: PacketBuffer, servers: Servers) -> None:
        self.terms, self.buffer, self.servers = terms, buffer, servers
        self.state = State.WAITING
        self.error: ClientError | None = None
        self.level: mps.Level | None = None
        self.dropped = self.skipped = 0
        """Packets given up before they were acknowledged; indices left out because a file had lost their packets."""
        self.losses: collections.Counter[str] = collections.Counter()
        self._notices: list[Notice] = []
        self._reader = mps.AnswerReader()
        self._out = 0
        self._sent_place = 0
        self._numberings: dict[int, tuple[int, int]] = {}
        """Of earlier epochs: shift, and the index that nothing was sent from on."""
        self._opening = self._next_opening = Opening.GO_ON
        self._said_first = 0
        self._ok_at = 0.0
        self._idle = False
        self._deadline: float | None = None

    # -- connecting

    @property
    def dial_at(self) -> float | None:
        """When to connect next; None while there is a connection, or no need for one (BYE idle and nothing held)."""
        if self.state is not State.WAITING or (self._idle and not self.buffer.held):
            return None
        return self.servers.choose()[1]

    def dial(self, now: float) -> tuple[str, int]:
        """An attempt begins: the address."""
        address, _ = self.servers.choose()
        self.servers.trying()
        self._opening, self._next_opening = self._next_opening, Opening.GO_ON
        self._idle = False
        self._apply(Event.DIAL, detail=f"{address[0]}:{address[1]}")
        self._deadline = now + self.terms.connect_timeout_s
        return address

    def connected(self, now: float) -> bytes:
        """The connection stands (TLS included): the hello to send first."""
        self._apply(Event.CONNECT)
        self._reader = mps.AnswerReader()
        self._deadline = now + self.terms.answer_timeout_s
        return self._hello().to_line()

    def _hello(self) -> mps.Hello:
        terms, buffer = self.terms, self.buffer
        if buffer.base == 0 and self._is_elsewhere and self._opening is Opening.GO_ON:
            self._opening = Opening.UNNUMBERED  # one that knows nothing would begin a second stream with our epoch
        is_named, is_new = self._opening.value
        is_named = is_named and buffer.epoch is not None
        self._said_first = buffer.base if is_named else 0
        epoch, first = (buffer.epoch, self._said_first) if is_named else (None, None)
        return mps.Hello(terms.client_id, terms.packet_size, terms.token, epoch, first, is_new)

    @property
    def _is_elsewhere(self) -> bool:
        """Whether the server is another one than that which we have the epoch from."""
        return self.servers.are_several and self.servers.key != self.buffer.home

    # -- what comes in

    def receive(self, received: bytes, now: float) -> None:
        """Bytes from the server; empty when it has closed the connection."""
        if not received:
            return self.lost(Loss.ENDED, "the server closed the connection", now)
        try:
            answers = self._reader.feed(received)
        except mps.AnswerError as error:
            return self.lost(Loss.NONSENSE, str(error), now)
        for answer in answers:
            if self.state not in (State.GREETING, State.STREAMING):
                return None
            self._take(answer, now)
        return None

    def _take(self, answer: mps.Answer, now: float) -> None:
        match answer:
            case mps.Ok():
                self._take_ok(answer, now)
            case mps.Ack(next_packet):
                self._take_ack(next_packet, now)
            case mps.Bye(reason, retry_s):
                self._idle = reason == mps.ByeReason.IDLE
                superseded = reason == mps.ByeReason.SUPERSEDED  # our id is in use elsewhere: no server is better
                self._lose(Loss.BYE, f"the server said BYE {reason}", now, retry_s, superseded)
            case mps.Refusal():
                self._take_refusal(answer, now)
            case _:
                assert_never(answer)

    def _take_ok(self, ok: mps.Ok, now: float) -> None:
        buffer = self.buffer
        if self.state is not State.GREETING:
            return self.lost(Loss.NONSENSE, "a second OK", now)
        if ok.epoch != buffer.epoch:
            if buffer.epoch is not None and self._opening is Opening.GO_ON:
                text = f"the server goes on with epoch {ok.epoch:016x}, this client with {buffer.epoch:016x}"
                return self._has_other_epoch(EpochError(text), now)
            self._begin_epoch(ok)
        elif not self._goes_on(ok.next_packet, now):
            return None
        if buffer.base > ok.next_packet:  # dropped since the hello, or before the first OK: the next hello tells
            return self.lost(Loss.RENUMBERED, "packets were dropped before the OK", now)
        self._out = (ok.next_packet - buffer.shift) * buffer.packet_size
        self.level, self._deadline, self._ok_at = ok.level, None, now
        self._apply(Event.OK, detail=f"from packet {ok.next_packet} on, {ok.level}")
        return None

    def _begin_epoch(self, ok: mps.Ok) -> None:
        """Number what is held from the server's next packet on; without what it kept of it if we were here before."""
        buffer = self.buffer
        place = before = 0 if buffer.epoch is None else buffer.base_place
        if ok.epoch in self._numberings:
            shift, sent = self._numberings.pop(ok.epoch)
            place = max(place, min(ok.next_packet, sent) - shift)
        if buffer.epoch is not None:
            self._numberings[buffer.epoch] = (buffer.shift, self._sent_max)
            if len(self._numberings) > NUMBERINGS_MAX:
                del self._numberings[next(iter(self._numberings))]
        buffer.home = self.servers.key
        buffer.begin_epoch(ok.epoch, place, ok.next_packet)
        self._sent_place = place
        if place > before:
            self._notices.append(Acknowledged(ok.next_packet))

    def _goes_on(self, next_packet: int, now: float) -> bool:
        """The server has our epoch: whether what it says of it can be true."""
        buffer, acked = self.buffer, self.buffer.acked
        if next_packet < acked:
            text = f"the server goes on at packet {next_packet}; it had acknowledged {acked}"
            self._contradicted(Opening.NEW_ANYHOW, StreamLostError(text), now)
        elif next_packet < self._said_first:
            self.lost(Loss.NONSENSE, f"OK {next_packet} after first={self._said_first}", now)
        elif buffer.restored_place is None and next_packet > self._sent_max:
            text = f"the server is at packet {next_packet}, this client sent up to {self._sent_max}: two with one id?"
            self._fail(StreamTakenError(text))
        else:
            buffer.home = self.servers.key
            self.skipped += buffer.go_on(next_packet)
            if buffer.acked > acked:
                self.servers.worked()
                self._notices.append(Acknowledged(next_packet))
            return True
        return False

    def _take_ack(self, next_packet: int, now: float) -> None:
        if self.state is not State.STREAMING:
            return self.lost(Loss.NONSENSE, "ACK before OK", now)
        if next_packet > self.sent_index:
            return self.lost(Loss.NONSENSE, f"ACK {next_packet}, but only {self.sent_index} were sent", now)
        if next_packet <= self.buffer.acked:
            return None
        self.buffer.acknowledge(next_packet)
        self.servers.worked()
        self._notices.append(Acknowledged(next_packet))
        is_owed = self._out > (next_packet - self.buffer.shift) * self.buffer.packet_size
        self._deadline = now + self.terms.ack_timeout_s if is_owed else None
        return None

    def _take_refusal(self, refusal: mps.Refusal, now: float) -> None:
        if not refusal.is_final:
            return self.lost(Loss.REFUSED, f"ERR {refusal.code} {refusal.text}", now)
        has_named_epoch = self._opening is Opening.GO_ON and self.buffer.epoch is not None
        if refusal.code == mps.ErrorCode.EPOCH and has_named_epoch:
            return self._has_other_epoch(EpochError(f"the server has another stream: {refusal.text}"), now)
        return self._fail(RefusedError(refusal.code, refusal.text))

    def _has_other_epoch(self, error: EpochError, now: float) -> None:
        """The server has not the epoch that we named."""
        if self._is_elsewhere or self.buffer.acked <= self.buffer.origin:  # it never said that it had anything of it
            return self._open_anew(Opening.UNNUMBERED, str(error), now)
        return self._contradicted(Opening.NEW, error, now)

    def _contradicted(self, opening: Opening, error: EpochError, now: float) -> None:
        """The server does not have what it had acknowledged."""
        if self.terms.on_epoch != "new" or self._opening is opening:
            return self._fail(error)
        return self._open_anew(opening, str(error), now)

    def _open_anew(self, opening: Opening, why: str, now: float) -> None:
        self.lost(Loss.RENUMBERED, why, now)
        self._next_opening = opening
        self.servers.at_once(now)

    # -- what goes out

    def outgoing(self, bytes_max: int) -> memoryview:
        """What may be sent next, in a row; empty when there is nothing. Valid until packets are dropped or released."""
        if not self.outgoing_bytes:
            return memoryview(b"")
        return self.buffer.view(self._out, bytes_max)

    @property
    def outgoing_bytes(self) -> int:
        if self.state is not State.STREAMING or not self.buffer.is_settled:
            return 0
        return self.buffer.end_place * self.buffer.packet_size - self._out

    def sent(self, count_bytes: int, now: float) -> None:
        """So many bytes of ``outgoing`` are out of our hands."""
        self._out += count_bytes
        self._sent_place = max(self._sent_place, self._out // self.buffer.packet_size)
        if self._deadline is None and count_bytes:
            self._deadline = now + self.terms.ack_timeout_s

    @property
    def sent_index(self) -> int:
        """Index after the last packet that went out whole on this connection, or that needs not."""
        if self.state is not State.STREAMING:
            return self.buffer.acked
        return self._out // self.buffer.packet_size + self.buffer.shift

    @property
    def _sent_max(self) -> int:
        """Nothing from this index on was sent in this epoch. What comes from a file may have been, all of it."""
        buffer = self.buffer
        return max(self._sent_place, buffer.base_place, buffer.restored_place or 0) + buffer.shift

    def make_room(self, packets: int, now: float) -> None:
        """Drop the oldest until so many packets can be appended."""
        self.dropped += self.buffer.drop_oldest(packets)
        if self.state is State.STREAMING and self._out < self.buffer.base_place * self.buffer.packet_size:
            self.lost(Loss.RENUMBERED, "the oldest packets were dropped before they were sent", now)

    # -- time and the end

    @property
    def deadline(self) -> float | None:
        """When ``expire`` is due."""
        return self._deadline

    def expire(self, now: float) -> None:
        """The deadline is over, if it is."""
        if self._deadline is None or now < self._deadline:
            return
        loss, text = {
            State.CONNECTING: (Loss.CONNECT_TIMEOUT, f"no connection in {self.terms.connect_timeout_s:g} s"),
            State.GREETING: (Loss.ANSWER_TIMEOUT, f"no answer in {self.terms.answer_timeout_s:g} s"),
            State.STREAMING: (Loss.ACK_TIMEOUT, f"nothing acknowledged in {self.terms.ack_timeout_s:g} s"),
        }[self.state]
        self.lost(loss, text, now)

    def lost(self, loss: Loss, detail: str, now: float) -> None:
        """The connection, or the attempt, is over; another one follows."""
        self._lose(loss, detail, now, None, False)

    def _lose(self, loss: Loss, detail: str, now: float, retry_s: int | None, everywhere: bool) -> None:
        self.losses[loss] += 1
        if self.state is State.STREAMING and now - self._ok_at >= SETTLED_S:
            self.servers.worked()
        self.servers.failed(now, retry_s, everywhere)
        if loss is Loss.RENUMBERED:
            self.servers.again()
        self._deadline = None
        self._apply(Event.LOSE, loss, detail)

    def _fail(self, error: ClientError) -> None:
        self.error, self._deadline = error, None
        self._apply(Event.FAIL, detail=str(error))

    def close(self) -> None:
        self._deadline = None
        if self.state is not State.CLOSED:
            self._apply(Event.CLOSE)

    def take_notices(self) -> list[Notice]:
        """What happened since the last call, in order."""
        notices, self._notices = self._notices, []
        return notices

    def _apply(self, event: Event, why: str = "", detail: str = "") -> None:
        self.state = TRANSITIONS[self.state, event]
        self._notices.append(Changed(self.state, why, detail))
