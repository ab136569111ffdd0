"""Peers that store packets and acknowledge them: Redis Streams and NATS JetStream, real servers from Debian's packages.

A client keeps many entries in flight and counts the answers, so the rate is of what the server said it has, not of what
was sent. Redis syncs its file before each answer (``appendfsync always``). JetStream of Debian 12 (2.9) cannot: what it
acknowledges lies in the page cache for up to two minutes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

from tests.bench.baselines import free_port, wait_until_listening

PACKET_BYTES = 16
STREAM_BYTES_MAX = 1 << 30
BLOCK_BYTES = 256 << 10
"""About so much is written to the socket at a time."""
IN_FLIGHT_BYTES_MAX = 16 << 20
END_S = 30.0


@dataclasses.dataclass(frozen=True)
class Peer:
    """``start`` gives a connection that is ready for entries; each is answered with ``answer`` once."""

    name: str
    program: str
    start: Callable[[pathlib.Path], contextlib.AbstractContextManager[socket.socket]]
    entry: Callable[[bytes], bytes]
    answer: bytes


def acked_packets_per_s(peer: Peer, directory: pathlib.Path, duration_s: float, packets_per_entry: int) -> float:
    """From the first entry to the last answer."""
    home = pathlib.Path(tempfile.mkdtemp(prefix="peer-", dir=directory))
    entry = peer.entry(os.urandom(packets_per_entry * PACKET_BYTES // 2).hex().encode())
    count = max(1, BLOCK_BYTES // len(entry))
    try:
        with peer.start(home) as sock:
            return _push(sock, entry * count, count, peer.answer, duration_s) * packets_per_entry
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _push(sock: socket.socket, block: bytes, count: int, answer: bytes, duration_s: float) -> float:
    """Entries/s."""
    sock.settimeout(END_S)
    flight = _Flight(sock, answer)
    flight.start()
    in_flight_max = max(2 * count, IN_FLIGHT_BYTES_MAX // len(block) * count)
    started_s = time.monotonic()
    while time.monotonic() < started_s + duration_s and flight.take_off(count, in_flight_max):
        sock.sendall(block)
    flight.is_last = True
    flight.join()
    if flight.answered != flight.sent:
        raise RuntimeError(f"{flight.answered} of {flight.sent} entries were answered within {END_S:g} s")
    return flight.answered / (flight.last_s - started_s)


class _Flight(threading.Thread):
    """Reads answers and counts them until the last entry is answered."""

    def __init__(self, sock: socket.socket, answer: bytes) -> None:
        super().__init__()
        self.sent = self.answered = 0
        self.last_s = 0.0
        self.is_last = False
        self._sock = sock
        self._answer = answer
        self._changed = threading.Condition()

    def take_off(self, count: int, in_flight_max: int) -> bool:
        """Wait until fewer than ``in_flight_max`` are in flight, then count ``count`` more."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.sent - self.answered < in_flight_max, END_S):
                return False
            self.sent += count
        return True

    def run(self) -> None:
        rest = b""
        while not self.is_last or self.answered < self.sent:
            try:
                received = rest + self._sock.recv(1 << 20)
            except TimeoutError:
                return
            if len(received) == len(rest):
                return
            rest = received[len(received) - len(self._answer) + 1 :]
            with self._changed:
                self.answered += received.count(self._answer)
                self.last_s = time.monotonic()
                self._changed.notify()


@contextlib.contextmanager
def _server(command: list[str], port: int) -> Iterator[socket.socket]:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until_listening(port)
        with socket.create_connection(("127.0.0.1", port), END_S) as sock:
            yield sock
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _redis(home: pathlib.Path) -> Iterator[socket.socket]:
    port = free_port()
    command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--dir", str(home), "--save", ""]
    command += ["--appendonly", "yes", "--appendfsync", "always", "--auto-aof-rewrite-percentage", "0"]
    with _server(command, port) as sock:
        yield sock


def _xadd(content: bytes) -> bytes:
    kept = max(1, STREAM_BYTES_MAX // 64 // len(content))
    words = [b"XADD", b"s", b"MAXLEN", b"~", b"%d" % kept, b"*", b"p", content]
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


@contextlib.contextmanager
def _jetstream(home: pathlib.Path) -> Iterator[socket.socket]:
    port = free_port()
    settings = b'{"name":"S","subjects":["s"],"storage":"file","retention":"limits","max_bytes":%d,"discard":"old"}'
    settings %= STREAM_BYTES_MAX
    with _server(["nats-server", "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", str(home)], port) as sock:
        sock.sendall(
            b'CONNECT {"verbose":false}\r\nSUB made 1\r\nPUB $JS.API.STREAM.CREATE.S made %d\r\n' % len(settings)
        )
        sock.sendall(settings + b"\r\n")
        received = b""
        while b'"created"' not in received:
            received += sock.recv(1 << 16)
        sock.sendall(b"SUB inbox 2\r\n")
        yield sock


def _publish(content: bytes) -> bytes:
    return b"PUB s inbox %d\r\n%s\r\n" % (len(content), content)


PEERS = [
    Peer("Redis, appendfsync always", "redis-server", _redis, _xadd, b"$"),
    Peer("NATS JetStream, not synced", "nats-server", _jetstream, _publish, b"MSG inbox"),
]
