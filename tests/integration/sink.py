"""A plain TCP server in a thread that keeps what each connection sent. It shares nothing with the daemon."""

from __future__ import annotations

import selectors
import socket
import struct
import threading
import time
from dataclasses import dataclass, field

DEADLINE_S = 20


@dataclass
class Received:
    """One connection: its bytes, when each piece came (monotonic s, bytes so far), and how it ended."""

    peer: str
    content: bytearray = field(default_factory=bytearray)
    times: list[tuple[float, int]] = field(default_factory=list)
    ended: str | None = None


class Sink:
    """``reset_after_bytes``: each of the first ``resets`` connections is reset once it has sent that much."""

    def __init__(self, address: str = "127.0.0.1", *, reset_after_bytes: int = 0, resets: int = 0) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._server = socket.create_server((address, 0), family=family, backlog=1024)
        self._server.setblocking(False)
        self.port: int = self._server.getsockname()[1]
        self.connections: list[Received] = []
        self._reset_after_bytes, self._resets = reset_after_bytes, resets
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._ours, self._theirs = socket.socketpair()
        self._selector.register(self._theirs, selectors.EVENT_READ)
        self._unread: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def pause(self) -> None:
        """Read nothing more from who is connected."""
        self._ours.send(b"p")

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._ours.close()
        self._thread.join(DEADLINE_S)
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        for sock in self._unread:
            sock.close()
        self._selector.close()

    def wait_for_bytes(self, size_bytes: int) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while sum(len(received.content) for received in self.connections) < size_bytes:
            assert time.monotonic() < deadline, f"{size_bytes} bytes did not come"
            threading.Event().wait(0.005)

    def by_peer(self) -> dict[str, bytes]:
        return {received.peer: bytes(received.content) for received in self.connections}

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._theirs:
                    if not self._theirs.recv(16):
                        return
                    self._stop_reading()
                elif key.fileobj is self._server:
                    self._accept()
                else:
                    self._read(key.fileobj, key.data)  # type: ignore[arg-type]

    def _stop_reading(self) -> None:
        for key in list(self._selector.get_map().values()):
            if key.data is not None:
                self._selector.unregister(key.fileobj)
                self._unread.append(key.fileobj)  # type: ignore[arg-type]

    def _accept(self) -> None:
        sock, peer = self._server.accept()
        sock.setblocking(False)
        host = f"[{peer[0]}]" if ":" in peer[0] else peer[0]
        received = Received(f"{host}:{peer[1]}")
        self.connections.append(received)
        self._selector.register(sock, selectors.EVENT_READ, received)

    def _read(self, sock: socket.socket, received: Received) -> None:
        ended = None
        try:
            piece = sock.recv(1 << 20)
        except OSError as error:
            piece, ended = b"", type(error).__name__
        received.content += piece
        received.times.append((time.monotonic(), len(received.content)))
        if self._resets and len(received.content) >= self._reset_after_bytes:
            self._resets -= 1
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            piece, ended = b"", "reset by us"
        if not piece:
            received.ended = ended or "in order"
            self._selector.unregister(sock)
            sock.close()
