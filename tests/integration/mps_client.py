"""A client of MPS/1, written from the grammar and with no code of the project: an oracle for tests.

It numbers its packets, keeps none of them (each can be made again from its index), goes on where OK says, and
insists on what the protocol promises: OK and ACK never go back within an epoch, and never beyond what was sent.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
import threading
import time

OK = re.compile(rb"OK (\d+) (durable|stored) ([0-9a-f]{16})")
ACK = re.compile(rb"ACK (\d+)")
TORN = (b"", b"A", b"AC", b"ACK", b"ACK ")


def packets(client_id: str, first: int, count: int, size: int) -> bytes:
    """Packets [first, first + count): 8 bytes of index, the rest from a hash of the id."""
    filler = (hashlib.sha256(client_id.encode()).digest() * (size // 32 + 1))[: size - 8]
    return b"".join(index.to_bytes(8, "little") + filler for index in range(first, first + count))


class MpsClient:
    """Sends packets from ``start`` until ``finish``, over as many connections as it takes."""

    def __init__(self, client_id: str, port: int, *, size: int = 16, batch: int = 100, pause_s: float = 0.005) -> None:
        self.client_id, self.port, self.size, self.batch, self.pause_s = client_id, port, size, batch, pause_s
        self.sent = 0
        """Index after the highest packet that was ever sent."""
        self.acked = 0
        self.epoch = ""
        self.reconnects = -1
        self.refusals: list[str] = []
        self.fault = ""
        self.longest_silence_s = 0.0
        self._until: int | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=client_id)

    def start(self) -> MpsClient:
        self._thread.start()
        return self

    def finish(self, deadline_s: float = 30.0) -> int:
        """Send no new packets; wait until everything is acknowledged. Returns how many packets there are."""
        self._until = self.sent
        self._thread.join(deadline_s)
        alive = self._thread.is_alive()
        self._stopped.set()
        self._thread.join(5)
        assert not self.fault, f"{self.client_id}: {self.fault}"
        assert not alive, f"{self.client_id}: {self.acked} of {self.sent} acknowledged; refused: {self.refusals[-3:]}"
        return self.sent

    def abort(self) -> None:
        """Whatever is under way."""
        self._stopped.set()
        self._thread.join(10)

    def content(self) -> bytes:
        """Everything that was sent."""
        return packets(self.client_id, 0, self.sent, self.size)

    # -- the thread

    def _run(self) -> None:
        try:
            while not self._stopped.is_set() and not self._is_done():
                with contextlib.suppress(OSError):
                    self._one_connection()
                self._stopped.wait(0.05)
        except AssertionError as error:
            self.fault = str(error) or "assertion"

    def _is_done(self) -> bool:
        return self._until is not None and self.acked >= self._until

    def _one_connection(self) -> None:
        with socket.create_connection(("127.0.0.1", self.port), timeout=2.0) as sock:
            self.reconnects += 1
            state = f" epoch={self.epoch} first={self.acked}" if self.epoch else ""
            sock.sendall(f"MPS/1 {self.client_id} {self.size}{state}\n".encode())
            rest = self._greeted(sock)
            if rest is not None:
                self._stream(sock, rest)

    def _greeted(self, sock: socket.socket) -> bytes | None:
        """Wait for OK; what came behind it, or None when this connection is nothing."""
        sock.settimeout(15.0)
        received = b""
        while b"\n" not in received.lstrip(b"\n"):
            more = sock.recv(4096)
            if not more:
                return None
            received += more
        line, _, rest = received.lstrip(b"\n").partition(b"\n")
        found = OK.fullmatch(line)
        if found is None:
            self.refusals.append(line.decode(errors="replace"))
            assert line.startswith((b"ERR in-use", b"ERR busy", b"ERR unavailable", b"ERR timeout", b"BYE ")), line
            return None
        index, epoch = int(found[1]), found[3].decode()
        assert not self.epoch or epoch == self.epoch, f"epoch {epoch} after {self.epoch}"
        assert self.acked <= index <= self.sent, f"OK {index}, acknowledged {self.acked}, sent {self.sent}"
        self.epoch, self.acked, self._next = epoch, index, index
        return rest

    def _stream(self, sock: socket.socket, rest: bytes) -> None:
        sock.settimeout(0.001)
        unsent = b""
        heard_s = time.monotonic()
        while not self._stopped.is_set() and not self._is_done():
            if not unsent:
                until = self._until if self._until is not None else self._next + self.batch
                count = min(self.batch, until - self._next)
                unsent = packets(self.client_id, self._next, count, self.size)
                self._next += count
                self.sent = max(self.sent, self._next)
            if unsent:
                with contextlib.suppress(TimeoutError):
                    unsent = unsent[sock.send(unsent) :]
            with contextlib.suppress(TimeoutError):
                more = sock.recv(4096)
                if not more:
                    return
                rest = self._take_lines(rest + more)
                self.longest_silence_s = max(self.longest_silence_s, time.monotonic() - heard_s)
                heard_s = time.monotonic()
            self._stopped.wait(self.pause_s)

    def _take_lines(self, received: bytes) -> bytes:
        *lines, rest = received.split(b"\n")
        for line in lines:
            if line in TORN:
                continue
            if line.startswith(b"BYE "):
                raise OSError(line.decode())
            found = ACK.fullmatch(line)
            assert found is not None, f"not a line of the protocol: {line!r}"
            assert int(found[1]) <= self.sent, f"ACK {int(found[1])} of {self.sent}"
            self.acked = max(self.acked, int(found[1]))
        return rest
