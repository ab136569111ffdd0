"""A plain MPS/1 server in threads that keeps what each client id sent, and that misbehaves as it is told. It shares
nothing with the daemon, not even the code that reads lines."""

from __future__ import annotations

import contextlib
import re
import secrets
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

DEADLINE_S, QUIET_S = 20, 0.02
HELLO = re.compile(rb"MPS/1 ([\w.-]+) (\d+)((?: [a-z]+=\S+)*)\n")


@dataclass(frozen=True)
class Fault:
    """What happens to one connection. ``kind``: ``reset``, ``bye`` or ``say`` (``text`` is sent) after so many bytes of
    packets; ``err`` (``text`` is code and words), ``silent`` or ``close`` instead of an answer."""

    kind: str
    after_bytes: int = 0
    text: str = ""
    forget: bool = False
    """The next connection finds only what was acknowledged."""


@dataclass
class Stream:
    """What one client has sent in the present epoch; ``acked`` counts packets."""

    packet_size: int
    epoch: int
    content: bytearray = field(default_factory=bytearray)
    acked: int = 0


class MpsSink:
    """``faults`` befall the first connections, one each. ``ack_bytes``: acknowledge when at least so many came, or when
    nothing has come for a while; None: never. Use as a context manager."""

    def __init__(self, faults: Iterable[Fault] = (), *, ack_bytes: int | None = 1, level: str = "durable") -> None:
        self._server = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port: int = self._server.getsockname()[1]
        self.streams: dict[str, Stream] = {}
        self.epochs: list[tuple[str, int]] = []
        self.hellos: list[str] = []
        self.acks = 0
        self._faults, self._ack_bytes, self._level = deque(faults), ack_bytes, level
        self._lock = threading.Condition()
        self._socks: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def __enter__(self) -> MpsSink:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._accepting.join(DEADLINE_S)
        self._server.close()
        with self._lock:
            for sock in self._socks:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(DEADLINE_S)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        with self._lock:
            assert self._lock.wait_for(condition, DEADLINE_S), f"never; hellos {self.hellos}"

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._server.accept()
            except OSError:
                return
            with self._lock:
                self._socks.add(sock)
                fault = self._faults.popleft() if self._faults else None
            thread = threading.Thread(target=self._serve, args=(sock, fault))
            thread.start()
            self._threads.append(thread)

    def _serve(self, sock: socket.socket, fault: Fault | None) -> None:
        try:
            with contextlib.suppress(OSError):
                self._talk(sock, fault)
        finally:
            with self._lock:
                self._socks.discard(sock)
                self._lock.notify_all()
            sock.close()

    def _talk(self, sock: socket.socket, fault: Fault | None) -> None:
        line = b""
        while not line.endswith(b"\n"):
            piece = sock.recv(1)
            if not piece:
                return
            line += piece
        found = HELLO.fullmatch(line)
        assert found is not None, line
        options = dict(word.split("=") for word in found[3].decode().split())
        with self._lock:
            self.hellos.append(line.decode().strip())
            self._lock.notify_all()
        if fault is not None and fault.kind in ("err", "silent", "close"):
            if fault.kind == "err":
                sock.sendall(f"ERR {fault.text}\n".encode())
            if fault.kind == "silent":
                sock.recv(1)
            return
        stream = self._stream(found[1].decode(), int(found[2]), options)
        if stream is None:
            sock.sendall(b"ERR epoch another one\n")
            return
        next_packet = len(stream.content) // stream.packet_size
        stream.acked = next_packet
        sock.sendall(f"OK {next_packet} {self._level} {stream.epoch:016x}\n".encode())
        self._receive(sock, stream, fault)

    def _stream(self, client_id: str, packet_size: int, options: dict[str, str]) -> Stream | None:
        with self._lock:
            stream = self.streams.get(client_id)
            asked = options.get("epoch")
            if stream is None or (asked != f"{stream.epoch:016x}" and "new" in options):
                stream = self.streams[client_id] = Stream(packet_size, secrets.randbits(64))
                self.epochs.append((client_id, stream.epoch))
            elif asked is not None and asked != f"{stream.epoch:016x}":
                return None
            del stream.content[len(stream.content) // packet_size * packet_size :]
            return stream

    def _receive(self, sock: socket.socket, stream: Stream, fault: Fault | None) -> None:
        taken = unacked = 0
        while True:
            try:
                sock.settimeout(QUIET_S if unacked and self._ack_bytes is not None else DEADLINE_S)
                piece = sock.recv(1 << 20)
            except TimeoutError:
                unacked = 0
                self._acknowledge(sock, stream)
                continue
            if not piece:
                break
            with self._lock:
                stream.content += piece
                self._lock.notify_all()
            taken, unacked = taken + len(piece), unacked + len(piece)
            if fault is not None and taken >= fault.after_bytes:
                self._strike(sock, stream, fault)
                if fault.kind != "say":
                    return
                fault = None
            if self._ack_bytes is not None and unacked >= self._ack_bytes:
                unacked = 0
                self._acknowledge(sock, stream)
        if self._ack_bytes is not None:
            self._acknowledge(sock, stream)

    def _acknowledge(self, sock: socket.socket, stream: Stream) -> None:
        stream.acked = len(stream.content) // stream.packet_size
        self.acks += 1
        sock.sendall(b"ACK %d\n" % stream.acked)

    def _strike(self, sock: socket.socket, stream: Stream, fault: Fault) -> None:
        with self._lock:
            if fault.forget:
                del stream.content[stream.acked * stream.packet_size :]
        if fault.kind == "say":
            sock.sendall(fault.text.encode())
        elif fault.kind == "bye":
            sock.sendall(f"BYE {fault.text}\n".encode())
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1 << 16):
                pass
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
