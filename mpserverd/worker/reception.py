"""mps connections that are not read yet, or not any more: hellos that are looked at, and goodbyes that are heard out.

A hello is peeked, never taken: whoever dies here takes nothing along, and the next worker sees the same line. What it
says is the supervisor's business; this only waits for a whole line, or for what makes one impossible.

A connection that was told ERR or BYE is heard out for a moment, its bytes thrown away: a close with unread bytes is a
reset, which can overtake the line at the client. Its row is somebody else's by then; only the socket is left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import select
import socket
import time
from collections.abc import Callable

from mpserverd.arena.state import CloseReason, Con, ConnectionState, Slot, StateTable
from mpserverd.net import tcp_info
from mpserverd.net.channel import Kind, Message
from mpserverd.protocol.mps import LINE_BYTES_MAX, Bye, ErrorCode, HelloError, hello_length
from mpserverd.worker.answers import BYE_REASONS

LINGER_S = 2.0
LINGERING_MAX = 1000
"""More are closed at once; their peers may then miss the last line."""
DISCARD_BYTES = 65_536
_PEEK_FLAGS = socket.MSG_PEEK | socket.MSG_DONTWAIT
_SEND_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_HUNG_UP = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR


@dataclasses.dataclass(eq=False, slots=True)
class Greeting:
    """A connection whose hello is awaited; ``deadline_ns`` is monotonic, 0 for none."""

    row: int
    sock: socket.socket
    deadline_ns: int


class Reception:
    """``send`` passes a message to the supervisor; ``slot`` is the worker's, whose IN_HAND says what is looked at."""

    def __init__(
        self, state: StateTable, index: int, epoll: select.epoll, send: Callable[[Message], None], slot: int
    ) -> None:
        self._state = state
        self._index = index
        self._epoll = epoll
        self._send = send
        self._in_hand = state.slot_base(slot) + Slot.IN_HAND
        self._reasons_at = state.slot_base(slot) + Slot.REASONS
        self._greetings: dict[int, Greeting] = {}
        self._lingering: dict[int, tuple[socket.socket, float]] = {}

    # -- hellos

    def greet(self, message: Message, timeout_s: float) -> None:
        """Wait for the hello of the row that the message names; 0: as long as it takes."""
        sock = self._take(message)
        if sock is None:
            return
        base = self._state.connection_base(message.row)
        accepted_ns = self._state.words[base + Con.ACCEPTED_MONO_NS]
        greeting = Greeting(message.row, sock, accepted_ns + int(timeout_s * 1e9) if timeout_s else 0)
        self._greetings[sock.fileno()] = greeting
        # edge-triggered: a part of a line stays readable, since it is only peeked
        self._epoll.register(sock.fileno(), select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)

    def refuse(self, message: Message) -> None:
        """Say the line that the message brings, and end the connection."""
        sock = self._take(message)
        if sock is not None:
            line = (message.payload or {}).get("line", "")
            self.end_socket(message.row, sock, CloseReason(message.reason), line.encode("ascii", "replace"))

    def _take(self, message: Message) -> socket.socket | None:
        """The message's socket, when its row still says that it is ours to look at."""
        sock = socket.socket(fileno=message.fd)
        words, base = self._state.words, self._state.connection_base(message.row)
        mine = words[base + Con.WORKER] == self._index and words[base + Con.STATE] == ConnectionState.HELLO
        if not mine or words[base + Con.COOKIE] != tcp_info.cookie(sock):
            sock.close()
            return None
        sock.setblocking(False)
        return sock

    def handle(self, fd: int, events: int) -> bool:
        """An event of epoll. False when the descriptor is not ours."""
        greeting = self._greetings.get(fd)
        if greeting is not None:
            self._look(greeting, hung_up=bool(events & _HUNG_UP))
            return True
        if fd in self._lingering:
            self._hear_out(fd)
            return True
        return False

    def _look(self, greeting: Greeting, *, hung_up: bool) -> None:
        self._state.words[self._in_hand] = greeting.row + 1
        try:
            peeked = greeting.sock.recv(LINE_BYTES_MAX, _PEEK_FLAGS)
        except BlockingIOError:
            return
        except OSError:
            self._leave(greeting)
            self.end_socket(greeting.row, greeting.sock, CloseReason.RESET)
            return
        try:
            length = hello_length(peeked)
        except HelloError as error:
            self._let_go(greeting, {"code": error.code, "text": str(error)})
            return
        if length is not None:
            self._let_go(greeting, {"line": peeked[:length].decode("latin-1")})
        elif hung_up or not peeked:
            self._leave(greeting)
            self.end_socket(greeting.row, greeting.sock, CloseReason.ENDED)

    def _let_go(self, greeting: Greeting, said: dict[str, str] | None) -> None:
        """The row is the supervisor's again; with ``said`` it hears why, without it asks another worker."""
        self._leave(greeting)
        greeting.sock.close()
        base = self._state.connection_base(greeting.row)
        self._state.words[base + Con.STATE] = ConnectionState.ACCEPTED
        kind = Kind.RELEASED if said is None else Kind.GREETED
        self._send(Message(kind, greeting.row, payload=said))

    def _leave(self, greeting: Greeting) -> None:
        fd = greeting.sock.fileno()
        self._epoll.unregister(fd)
        del self._greetings[fd]

    def end_socket(self, row: int, sock: socket.socket, reason: CloseReason, line: bytes = b"") -> None:
        """End a connection that was not read, with a line or without. Owns the socket."""
        words, base = self._state.words, self._state.connection_base(row)
        if line:
            with contextlib.suppress(OSError):  # gone, or its window is closed: then it does not hear it
                sock.send(line, _SEND_FLAGS)
        words[base + Con.REASON] = reason
        words[self._reasons_at + reason] += 1
        words[base + Con.STATE] = ConnectionState.ENDED
        if line:
            self.linger(sock)
        else:
            _shut_down(sock)
        self._send(Message(Kind.ENDED, row=row, reason=reason))

    def end(self, row: int, reason: CloseReason) -> bool:
        """End the one of that row, if it is here, with the word that there is for it."""
        greeting = next((each for each in self._greetings.values() if each.row == row), None)
        if greeting is None:
            return False
        self._leave(greeting)
        word = BYE_REASONS.get(reason)
        self.end_socket(row, greeting.sock, reason, Bye(word).to_line() if word else b"")
        return True

    def end_all(self, reason: CloseReason) -> None:
        for greeting in list(self._greetings.values()):
            self.end(greeting.row, reason)

    def release_all(self) -> None:
        """This worker leaves, the connections do not."""
        for greeting in list(self._greetings.values()):
            self._let_go(greeting, None)

    def tick(self, now_ns: int) -> None:
        """Once a second: deadlines."""
        for greeting in list(self._greetings.values()):
            if greeting.deadline_ns and now_ns >= greeting.deadline_ns:
                text = "no whole hello came in time"
                self._let_go(greeting, {"code": ErrorCode.TIMEOUT, "text": text})
        for fd, (_, deadline_s) in list(self._lingering.items()):
            if now_ns >= deadline_s * 1e9:
                self._close(fd)

    # -- goodbyes

    def linger(self, sock: socket.socket) -> None:
        """Its last line was sent: nothing more will be said, and what still comes is thrown away. Owns the socket."""
        if len(self._lingering) >= LINGERING_MAX:
            _shut_down(sock)
            return
        try:
            sock.shutdown(socket.SHUT_WR)
            self._epoll.register(sock.fileno(), select.EPOLLIN)
        except OSError:
            _shut_down(sock)
            return
        self._lingering[sock.fileno()] = (sock, time.monotonic() + LINGER_S)

    def _hear_out(self, fd: int) -> None:
        sock = self._lingering[fd][0]
        try:
            more = sock.recv(DISCARD_BYTES)
        except BlockingIOError:
            return
        except OSError:
            more = b""
        if not more:
            self._close(fd)

    def _close(self, fd: int) -> None:
        sock, _ = self._lingering.pop(fd)
        self._epoll.unregister(fd)
        _shut_down(sock)


def _shut_down(sock: socket.socket) -> None:
    """A close says nothing to the peer while others hold dups."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
