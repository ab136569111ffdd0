"""A small MPS/1 server for tests of clients, written from docs/protocol.md and not from the project's protocol module.

It keeps streams in memory and can misbehave on purpose, seeded: cut connections at any byte, forget what it has not
acknowledged (as after a power cut), tear and delay its lines, refuse, say BYE. ``content`` is what would be on disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import re
import select
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from typing import Self

_HELLO = re.compile(
    rb"MPS/1 ([A-Za-z0-9][A-Za-z0-9._-]{0,63}) ([1-9][0-9]{0,4})"
    rb"((?: (?:token=[!-~]+|epoch=[0-9a-f]{16}|first=[0-9]+|new=1))*)\r?\n"
)


@dataclasses.dataclass
class Kept:
    """One epoch of one client. ``holes`` are (first, end) in packets; their bytes are zeros in ``content``."""

    epoch: str
    packet_size: int
    content: bytearray = dataclasses.field(default_factory=bytearray)
    acked: int = 0
    holes: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    @property
    def next(self) -> int:
        return len(self.content) // self.packet_size

    def without_holes(self) -> bytes:
        result, at = b"", 0
        for first, end in self.holes:
            result += bytes(self.content[at * self.packet_size : first * self.packet_size])
            at = end
        return result + bytes(self.content[at * self.packet_size :])


@dataclasses.dataclass
class Faults:
    """Probabilities for each connection, and bounds. All zero: a server that behaves."""

    refuse: float = 0.0
    cut_before_ok: float = 0.0
    cut: float = 0.0
    cut_after_bytes_max: int = 100_000
    forget: float = 0.0
    bye: float = 0.0
    tear: float = 0.0
    ack_every_bytes: int = 1
    passing_codes: tuple[str, ...] = ("busy", "unavailable", "timeout", "in-use", "quarantined")


class MpsServer:
    """``with MpsServer() as server``: listens on ``server.port`` until the block ends. What ``on_hello`` returns, if it
    is not None, is sent instead of an answer, and then the connection is closed."""

    def __init__(
        self, seed: int = 0, faults: Faults | None = None, tls: ssl.SSLContext | None = None, port: int = 0
    ) -> None:
        self.random = random.Random(seed)
        self.faults = faults or Faults()
        self.streams: dict[str, list[Kept]] = {}
        self.hellos: list[str] = []
        self.on_hello: Callable[[str], bytes | None] = lambda hello: None
        self.holds_acks = threading.Event()
        self.stops_reading = threading.Event()
        self._tls = tls
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._connections: dict[str, tuple[socket.socket, threading.Thread]] = {}
        self._threads: list[threading.Thread] = []
        self._sockets: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = int(self._listener.getsockname()[1])
        self.connections = 0

    def __enter__(self) -> Self:
        self._acceptor = threading.Thread(target=self._accept)
        self._acceptor.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
        self.cut_all()
        for thread in self._threads:
            thread.join()

    def cut_all(self) -> None:
        """End every connection now."""
        with self._lock:
            for connection in list(self._sockets):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def stream(self, client_id: str) -> Kept:
        return self.streams[client_id][-1]

    # -- serving

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            thread = threading.Thread(target=self._serve_safely, args=(connection,))
            with self._lock:
                self._sockets.add(connection)
                self._threads.append(thread)
            thread.start()

    def _serve_safely(self, plain: socket.socket) -> None:
        connection = plain
        try:
            connection.settimeout(20)
            if self._tls is not None:
                connection = self._tls.wrap_socket(plain, server_side=True)
                with self._lock:
                    self._sockets.add(connection)
            self._serve(connection)
        except (OSError, ValueError):
            pass
        finally:
            with self._lock:
                self._sockets -= {plain, connection}
            connection.close()

    def _serve(self, connection: socket.socket) -> None:
        line = bytearray()
        while not line.endswith(b"\n"):
            byte = connection.recv(1)
            if not byte:
                return
            line += byte
        with self._lock:
            self.hellos.append(line.decode().strip())
            answer = self.on_hello(self.hellos[-1])
            roll = self.random.random()
            code = self.random.choice(self.faults.passing_codes)
        if answer is not None:
            connection.sendall(answer)
            return
        if roll < self.faults.refuse:
            connection.sendall(f"ERR {code} not now\n".encode())
            return
        if roll < self.faults.refuse + self.faults.cut_before_ok:
            return
        hello = _HELLO.fullmatch(bytes(line))
        if hello is None:
            connection.sendall(b"ERR syntax not a hello\n")
            return
        client_id, packet_size = hello[1].decode(), int(hello[2])
        options = dict(word.split("=", 1) for word in hello[3].decode().split())
        self._supersede(client_id, connection)
        with self._lock:
            kept = self._open(client_id, packet_size, options)
            if isinstance(kept, str):
                connection.sendall(f"ERR {kept} refused\n".encode())
                return
            kept.acked = max(kept.acked, kept.next)
            self._say(connection, f"OK {kept.next} durable {kept.epoch}\n".encode(), whole=True)
        self._take_packets(connection, kept)

    def _supersede(self, client_id: str, connection: socket.socket) -> None:
        with self._lock:
            old = self._connections.pop(client_id, None)
        if old is not None:
            with contextlib.suppress(OSError):
                old[0].shutdown(socket.SHUT_RDWR)
            old[1].join()
        with self._lock:
            self._connections[client_id] = connection, threading.current_thread()

    def _open(self, client_id: str, packet_size: int, options: dict[str, str]) -> Kept | str:
        """The stream to go on with, or the code of a refusal."""
        known = self.streams.get(client_id, [])
        first = int(options.get("first", "0"))
        epoch = options.get("epoch")
        if not known or ("new" in options and epoch != known[-1].epoch):
            if epoch is not None and "new" not in options and first > 0:
                return "epoch"
            fresh = epoch if epoch is not None and "new" not in options else f"{self.random.getrandbits(64):016x}"
            self.streams.setdefault(client_id, []).append(Kept(fresh, packet_size))
            return self.streams[client_id][-1]
        kept = known[-1]
        if epoch is not None and epoch != kept.epoch:
            return "epoch"
        if packet_size != kept.packet_size:
            return "packet-size"
        if first > kept.next:
            kept.holes.append((kept.next, first))
            kept.content.extend(bytes((first - kept.next) * packet_size))
        return kept

    def _take_packets(self, connection: socket.socket, kept: Kept) -> None:
        with self._lock:
            is_cut = self.random.random() < self.faults.cut
            cut_at = self.random.randrange(1, self.faults.cut_after_bytes_max) if is_cut else None
        torn, received = b"", 0
        while True:
            if self.stops_reading.is_set() and not self._stop.wait(0.01):
                continue
            self._acknowledge_if_idle(connection, kept)
            want = 65536 if cut_at is None else max(1, min(65536, cut_at - received))
            packets = connection.recv(want)
            received += len(packets)
            torn += packets
            whole = len(torn) - len(torn) % kept.packet_size
            with self._lock:
                kept.content += torn[:whole]
                torn = torn[whole:]
                if not packets:
                    self._acknowledge(connection, kept)
                    return
                if received % self.faults.ack_every_bytes < len(packets):
                    self._acknowledge(connection, kept)
                if cut_at is not None and received >= cut_at:
                    self._end_badly(connection, kept)
                    return

    def _acknowledge_if_idle(self, connection: socket.socket, kept: Kept) -> None:
        """What ``ack_every_bytes`` held back, when nothing more comes."""
        if self.faults.ack_every_bytes > 1 and not select.select([connection], [], [], 0.01)[0]:
            with self._lock:
                self._acknowledge(connection, kept)

    def _acknowledge(self, connection: socket.socket, kept: Kept) -> None:
        if not self.holds_acks.is_set() and kept.next > kept.acked:
            kept.acked = kept.next
            self._say(connection, f"ACK {kept.next}\n".encode())

    def _end_badly(self, connection: socket.socket, kept: Kept) -> None:
        if self.random.random() < self.faults.forget:
            keep = self.random.randint(kept.acked, kept.next)
            del kept.content[keep * kept.packet_size :]
        elif self.random.random() < self.faults.bye:
            self._acknowledge(connection, kept)
            self._say(connection, b"BYE stopping retry=0\n")
            return
        if self.random.random() < 0.5:  # a reset instead of an end
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _say(self, connection: socket.socket, line: bytes, whole: bool = False) -> None:
        """A line, sometimes in two pieces, or torn after a piece and said again behind a LF as after an adoption."""
        if self.random.random() < self.faults.tear:
            at = self.random.randrange(1, len(line))
            connection.sendall(line[:at])
            if not whole and line.startswith(b"ACK"):
                connection.sendall(b"\n" + line)
                return
            line = line[at:]
        connection.sendall(line)
