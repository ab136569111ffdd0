"""Clients in threads that stream at a steady rate until they are told to end, and say what they saw.

Their bytes are hashed as they are sent; a send that fails is kept as the reason why the client was cut.
"""

from __future__ import annotations

import hashlib
import random
import socket
import threading
import time
from typing import Self

PIECE_S = 0.02
DEADLINE_S = 120.0
"""No send takes longer, whatever happens to the daemon."""


class Streamer:
    """``sent_bytes`` grows while it runs; ``longest_send_s`` is how long the kernel took no more at most."""

    def __init__(self, port: int, bytes_per_s: int, seed: int) -> None:
        self.sent_bytes, self.longest_send_s, self.failure = 0, 0.0, ""
        self._digest = hashlib.sha256()
        self._chance = random.Random(seed)
        self._piece_bytes = max(1, int(bytes_per_s * PIECE_S))
        self._over = threading.Event()
        self._sock = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S)
        self._thread = threading.Thread(target=self._run, name=f"streamer-{seed}")

    def start(self) -> Self:
        self._thread.start()
        return self

    def finish(self) -> str:
        """End in order, after a whole packet of 16 bytes; the sha256 of everything that was sent."""
        self._over.set()
        self._thread.join(2 * DEADLINE_S)
        assert not self._thread.is_alive(), "a send does not return"
        self._sock.close()
        assert not self.failure, f"a client was cut after {self.sent_bytes} bytes: {self.failure}"
        return self._digest.hexdigest()

    def _run(self) -> None:
        try:
            while not self._over.wait(PIECE_S):
                self._send(self._chance.randrange(1, 2 * self._piece_bytes))
            self._send(-self.sent_bytes % 16)
            self._sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.failure = str(error) or type(error).__name__

    def _send(self, size_bytes: int) -> None:
        piece = self._chance.randbytes(size_bytes)
        began_s = time.monotonic()
        self._sock.sendall(piece)
        self.longest_send_s = max(self.longest_send_s, time.monotonic() - began_s)
        self._digest.update(piece)
        self.sent_bytes += size_bytes
