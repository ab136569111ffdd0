"""Clients that must lose nothing, and remember when they were promised what. Written from docs/protocol.md alone.

A client's packets are a formula of its number and their place, so nothing of what was sent has to be kept. It notes
each acknowledgement with the time at which it had it, and what it gave away with the time before that. So ``at`` can
say for any instant what a server must have then, and what it can have at most. Nothing here blocks: ``Crowd.turn``
serves all of them in one thread.

A ``raw`` client has no acknowledgements: what it is promised is what the daemon says is durable (``promise``), and it
goes on from there.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import random
import selectors
import socket
import struct
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

HOST = "127.0.0.1"
PORT_MPS, PORT_RAW = 8889, 8888
RETRY_S = 0.02
_LINE_BYTES_MAX = 512
_EPOCH_DIGITS = 16
_PIECE_BYTES_MAX = 48 << 10
_PASSING = {"timeout", "in-use", "busy", "unavailable", "quarantined"}
_KEPT_BYTES = 1 << 16


class WrongPromiseError(AssertionError):
    """The server said something that cannot be true."""


class Source:
    """The bytes of one client: ``content(first, end)``. Every place has its own value, mixed from the seed."""

    def __init__(self, name: str, packet_size: int, seed: int) -> None:
        self.name = name
        self.packet_size = packet_size
        self._seed = seed
        self._made = bytearray()

    def content(self, first: int, end: int) -> memoryview:
        if end > len(self._made):
            start = len(self._made)
            place = np.arange(start + 1, max(end, start + _KEPT_BYTES) + 1, dtype=np.uint64)
            place += np.uint64((self._seed & 0xFFFFFFFF) << 32)
            y = place * np.uint64(0x9E3779B97F4A7C15)
            x = (y ^ (y >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            self._made = self._made + (x >> np.uint64(56)).astype(np.uint8).tobytes()
        return memoryview(self._made)[first:end]


class Mark(NamedTuple):
    """Where a client stood, in bytes: everything below ``acked`` was promised, nothing from ``sent`` on was given."""

    acked: int = 0
    sent: int = 0
    epoch: str = ""


class Client:
    """Sends up to ``target``; ``habit`` makes it end and come back now and then."""

    def __init__(
        self, source: Source, mark: Mark, habit: random.Random | None, *, is_raw: bool = False, number: int = 0
    ):
        self.source = source
        self.is_raw = is_raw
        self.mark = mark
        self.target = mark.sent
        self.resumes = 0
        self._address = f"127.0.1.{number + 1}"
        self._habit = habit
        self._history: list[tuple[int, Mark]] = [(0, mark)]
        self._socket: socket.socket | None = None
        self._rest = b""
        self._at = -1
        self._next_s = 0.0
        self._leave_s = 0.0
        self._leaving = False
        self._is_over = False

    # -- what it knows

    def at(self, instant_ns: int) -> Mark:
        """Where it stood then."""
        return [mark for noted_ns, mark in self._history if noted_ns < instant_ns][-1]

    @property
    def is_done(self) -> bool:
        return self.mark.acked >= self.target

    @property
    def is_connected(self) -> bool:
        return self._socket is not None

    @property
    def is_served(self) -> bool:
        """The server has answered it; for a raw one, taken it."""
        return self.is_connected if self.is_raw else self.resumes > 0

    def set_habit(self, habit: random.Random | None) -> None:
        habit = self._habit = None if self.is_raw else habit  # a raw one would not know where to go on
        self._leave_s = time.monotonic() + (habit.uniform(0.1, 1.5) if habit is not None else 0.0)

    def go_on_from(self, durable: int) -> None:
        """A raw client's ``OK``: what the daemon says while nobody is connected."""
        if not self.mark.acked <= durable <= self.mark.sent:
            raise WrongPromiseError(f"{self.source.name}: {durable} bytes durable; {self.mark}")
        self._note(acked=durable)

    def _note(self, **changes: object) -> None:
        self.mark = self.mark._replace(**changes)  # type: ignore[arg-type]
        self._history.append((time.monotonic_ns(), self.mark))

    def promise(self, durable: int) -> None:
        """An acknowledgement by other means."""
        if durable > self.mark.acked:
            if durable > self.mark.sent:
                raise WrongPromiseError(f"{self.source.name}: {durable} bytes durable, {self.mark.sent} were sent")
            self._note(acked=durable)

    # -- its connection

    def turn(self, selector: selectors.BaseSelector, now_s: float) -> None:
        """Connect, send or leave, if it is time."""
        if now_s < self._next_s:
            return
        if self._socket is None:
            if not self._is_over:
                self._connect(selector, now_s)
        elif self._at >= 0 and not self._leaving:
            if self._habit is not None and now_s >= self._leave_s:
                self._leave(selector, now_s)
            else:
                self._send(selector, now_s)

    def _connect(self, selector: selectors.BaseSelector, now_s: float) -> None:
        self._next_s = now_s + RETRY_S
        source = (self._address if self.is_raw else HOST, 0)
        try:
            self._socket = socket.create_connection((HOST, PORT_RAW if self.is_raw else PORT_MPS), 5, source)
        except OSError:
            return
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        selector.register(self._socket, selectors.EVENT_READ, self)
        self._rest, self._leaving = b"", False
        self._leave_s = now_s + (self._habit.uniform(0.1, 1.5) if self._habit is not None else 0.0)
        if self.is_raw:
            self._at = self.mark.acked
        else:
            self._hello()

    def _hello(self) -> None:
        assert self._socket is not None
        size = self.source.packet_size
        more = f" epoch={self.mark.epoch} first={self.mark.acked // size}" if self.mark.epoch else ""
        self._at = -1
        self._socket.send(f"MPS/1 {self.source.name} {size}{more}\n".encode())

    def _send(self, selector: selectors.BaseSelector, now_s: float) -> None:
        assert self._socket is not None
        habit = self._habit or random.Random(self._at)
        self._next_s = now_s + habit.uniform(0.0, 0.02)
        end = min(self.target, self._at + habit.randrange(1, _PIECE_BYTES_MAX))
        if end <= self._at:
            return
        if end > self.mark.sent:
            self._note(sent=end)
        try:
            self._at += self._socket.send(self.source.content(self._at, end))
        except BlockingIOError:
            return
        except OSError:
            self.close(selector)

    def _leave(self, selector: selectors.BaseSelector, now_s: float) -> None:
        """In one of three ways: politely, at once, or by a reset."""
        assert self._socket is not None and self._habit is not None
        match self._habit.randrange(3):
            case 0:
                self._leaving = True
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_WR)
            case 1:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close(selector)
            case _:
                self.close(selector)
        self._next_s = now_s + self._habit.uniform(0.0, 0.3)

    def hang_up(self) -> None:
        """Say that nothing more comes, now or ever; the server acknowledges the rest and closes."""
        self._is_over = True
        if self._socket is not None and not self._leaving:
            self._leaving = True
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)

    def close(self, selector: selectors.BaseSelector) -> None:
        if self._socket is not None:
            selector.unregister(self._socket)
            self._socket.close()
        self._socket, self._at = None, -1

    # -- what the server says

    def receive(self, selector: selectors.BaseSelector) -> None:
        assert self._socket is not None
        try:
            received = self._socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno not in (errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT):
                raise
            received = b""
        if not received:
            self.close(selector)
            return
        *lines, self._rest = (self._rest + received).split(b"\n")
        for line in lines:
            self._obey(line.decode().split(" "), line)
        if len(self._rest) >= _LINE_BYTES_MAX:
            raise WrongPromiseError(f"{self.source.name}: a line without end")

    def _obey(self, words: Sequence[str], line: bytes) -> None:
        match words:
            case ["OK", index, "durable", epoch] if len(epoch) == _EPOCH_DIGITS:
                self._accepted(int(index) * self.source.packet_size, epoch)
            case ["ACK", index]:
                acked = int(index) * self.source.packet_size
                if acked > self._at:
                    raise WrongPromiseError(f"{self.source.name}: {acked} bytes acknowledged, {self._at} were sent")
                if acked > self.mark.acked:
                    self._note(acked=acked)
            case ["ERR", code, *_] if code in _PASSING:
                pass
            case ["BYE", *_] | [""] | ["A" | "AC" | "ACK" | "O" | "OK"] | ["ACK", ""] | ["OK", *_]:
                pass  # torn ones: the worker died in the middle of the line, and its successor begins with a line feed
            case _:
                raise WrongPromiseError(f"{self.source.name}: {line!r}")

    def _accepted(self, following: int, epoch: str) -> None:
        mark = self.mark
        if not mark.acked <= following <= mark.sent:
            raise WrongPromiseError(
                f"{self.source.name}: OK at {following}; acknowledged {mark.acked}, sent {mark.sent}"
            )
        if mark.epoch and epoch != mark.epoch:
            raise WrongPromiseError(f"{self.source.name}: epoch {epoch}; it was {mark.epoch}")
        self._at = following
        self.resumes += 1
        self._note(acked=following, epoch=epoch)


class Crowd:
    """Several clients, served by one thread."""

    def __init__(self, clients: Sequence[Client]) -> None:
        self.clients = clients
        self._selector = selectors.DefaultSelector()

    def turn(self, patience_s: float = 0.002) -> None:
        """Let everybody do what is due; wait at most ``patience_s`` for the server."""
        now_s = time.monotonic()
        for client in self.clients:
            client.turn(self._selector, now_s)
        if not self._selector.get_map():
            time.sleep(patience_s)
            return
        for key, _ in self._selector.select(patience_s):
            client = key.data
            if client.is_connected:
                client.receive(self._selector)

    def close(self) -> None:
        for client in self.clients:
            client.close(self._selector)
        self._selector.close()


def names(count: int) -> list[str]:
    return [f"press-{number}" for number in itertools.islice(itertools.count(1), count)]
