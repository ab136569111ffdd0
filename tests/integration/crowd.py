"""Many clients in one thread, raw and mps, written from the protocol's lines alone: nothing here imports the project.

``Crowd.run`` moves bytes until a condition is true. What each client shall send is known beforehand, so what is stored
can be compared with it. An mps client keeps everything, goes on where it is told to, and checks what it is told: an
acknowledgement never goes back, never promises what was not sent, and after a reconnect the server knows at least what
it had acknowledged.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence

from tests.integration import senders
from tests.integration.driver import DEADLINE_S, SLOWNESS

TURN_S = 0.02
RETRY_S = 0.05
_WRITE_BYTES = 65_536
_BROKEN = (ConnectionError, TimeoutError)


class Client:
    """A connection that sends ``content``. ``address`` is (host, port) of the server, ``source`` this end's host."""

    def __init__(self, name: str, address: tuple[str, int], content: bytes = b"", *, source: str = "") -> None:
        self.name = name
        self.address = address
        self.source = source
        self.content = content
        self.sent = 0
        """Bytes of ``content`` that were given to the kernel, on this connection."""
        self.socket: socket.socket | None = None
        self.retry_at_s = 0.0
        self.connects = 0

    def connect(self) -> None:
        client = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        client.setblocking(False)
        if self.source:
            client.bind((self.source, 0))
        code = client.connect_ex(self.address)
        assert code in (0, errno.EINPROGRESS, errno.ECONNREFUSED), errno.errorcode[code]
        self.socket = client
        self.connects += 1

    def wants_to_write(self) -> bool:
        return self.sent < len(self.content)

    def write(self) -> None:
        assert self.socket is not None
        with contextlib.suppress(BlockingIOError):
            self.sent += self.socket.send(self.content[self.sent : self.sent + _WRITE_BYTES])

    def read(self) -> None:
        """A raw server says nothing; its end is an error here."""
        assert self.socket is not None
        assert self.socket.recv(4096), f"{self.name}: the server closed the connection"
        raise AssertionError(f"{self.name}: the server said something")

    def lost(self, error: OSError | None) -> None:
        raise AssertionError(f"{self.name}: connection lost: {error}")

    def close(self) -> None:
        if self.socket is not None:
            self.socket.close()
            self.socket = None

    def abort(self) -> None:
        """Close with a reset."""
        if self.socket is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    @property
    def is_done(self) -> bool:
        return self.sent == len(self.content)


class MpsClient(Client):
    """Goes on after every loss. ``acked`` and ``resumed`` count packets."""

    def __init__(
        self, name: str, address: tuple[str, int], content: bytes = b"", *, packet_size: int = 16, source: str = ""
    ) -> None:
        super().__init__(name, address, content, source=source)
        self.packet_size = packet_size
        self.acked = 0
        self.epoch = ""
        self.said: list[str] = []
        """Every BYE and ERR."""
        self._unsent = b""
        self._line = b""
        self._welcome = False
        self._offered = 0
        """Packets that were ever sent, in part or whole."""

    def connect(self) -> None:
        super().connect()
        known = f" epoch={self.epoch} first={self.acked}" if self.epoch else ""
        self._unsent = f"MPS/1 {self.name} {self.packet_size}{known}\n".encode()
        self._line, self._welcome, self.sent = b"", False, 0

    def wants_to_write(self) -> bool:
        return bool(self._unsent) or (self._welcome and super().wants_to_write())

    def write(self) -> None:
        assert self.socket is not None
        if self._unsent:
            with contextlib.suppress(BlockingIOError):
                self._unsent = self._unsent[self.socket.send(self._unsent) :]
            return
        super().write()
        self._offered = max(self._offered, -(-self.sent // self.packet_size))

    def read(self) -> None:
        assert self.socket is not None
        got = self.socket.recv(4096)
        if not got:
            self.lost(None)
            return
        *lines, self._line = (self._line + got).split(b"\n")
        for line in lines:
            self._hear(line.decode("ascii").removesuffix("\r").split(" "))

    def _hear(self, words: Sequence[str]) -> None:
        if words == [""]:
            return
        if not self._welcome:
            self._hear_first(words)
        elif words[0] == "BYE":
            self.said.append(" ".join(words))
        elif words[0] == "ACK" and len(words) == 2 and words[1].isdecimal():
            self._acknowledged(int(words[1]))
        elif words[0] not in ("A", "AC", "ACK"):  # the torn end of a line that another worker did not finish
            raise AssertionError(f"{self.name}: not a line of MPS/1: {words}")

    def _hear_first(self, words: Sequence[str]) -> None:
        if words[0] in ("ERR", "BYE"):
            self.said.append(" ".join(words))
            return
        assert words[0] == "OK" and len(words) == 4 and words[2] == "durable", f"{self.name}: {words}"
        assert words[3] == self.epoch or not self.epoch, f"{self.name}: another epoch: {words}"
        assert int(words[1]) >= self.acked, f"{self.name}: acknowledged {self.acked}, goes on at {words[1]}"
        self._acknowledged(int(words[1]))
        self.epoch, self._welcome, self.sent = words[3], True, int(words[1]) * self.packet_size

    def _acknowledged(self, next_packet: int) -> None:
        assert next_packet <= self._offered, f"{self.name}: {next_packet} acknowledged, {self._offered} sent"
        self.acked = max(self.acked, next_packet)

    def lost(self, error: OSError | None) -> None:
        self.close()
        self.retry_at_s = time.monotonic() + RETRY_S

    @property
    def acked_bytes(self) -> int:
        return self.acked * self.packet_size

    @property
    def is_done(self) -> bool:
        return self.acked_bytes == len(self.content)


class Crowd:
    """Closes its connections at the end of the ``with`` block."""

    def __init__(self, clients: Sequence[Client]) -> None:
        self.clients = list(clients)

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *_: object) -> None:
        for client in self.clients:
            client.close()

    def give(self, size_bytes: int) -> None:
        """Each gets so many more bytes to send, of its own."""
        for client in self.clients:
            client.content += senders.payload(hash_of(client.name) + len(client.content), size_bytes)

    def run(self, condition: Callable[[], object], *, what: str, deadline_s: float = 2 * DEADLINE_S) -> None:
        """Move bytes until ``condition``; it is asked after every turn."""
        deadline = time.monotonic() + deadline_s * SLOWNESS
        while not condition():
            if time.monotonic() > deadline:
                stuck = {c.name: (c.sent, len(c.content)) for c in self.clients if not c.is_done}
                raise AssertionError(f"waited {deadline_s:g} s for {what}; not done (sent, of): {stuck}")
            self.turn()

    def run_until_done(self) -> None:
        """Raw: everything is in the kernel's hands. mps: everything is acknowledged."""
        self.run(lambda: all(client.is_done for client in self.clients), what="everything to be sent")

    def turn(self, timeout_s: float = TURN_S) -> None:
        poll, now_s = select.poll(), time.monotonic()
        by_number = {}
        for client in self.clients:
            if client.socket is None and now_s >= client.retry_at_s:
                client.connect()
            if client.socket is not None:
                by_number[client.socket.fileno()] = client
                poll.register(client.socket, select.POLLIN | (select.POLLOUT if client.wants_to_write() else 0))
        for number, events in poll.poll(timeout_s * 1000):
            self._serve(by_number[number], events)

    def _serve(self, client: Client, events: int) -> None:
        try:
            if events & select.POLLIN:
                client.read()
            if events & (select.POLLERR | select.POLLHUP | select.POLLNVAL) and client.socket is not None:
                code = client.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                client.lost(OSError(code, "")) if code or events & select.POLLHUP else None
            if events & select.POLLOUT and client.socket is not None and client.wants_to_write():
                client.write()
        except _BROKEN as error:
            client.lost(error)


def hash_of(name: str) -> int:
    """The same in every run, as Python's own is not."""
    return int.from_bytes(name.encode(), "big") % (1 << 62)
