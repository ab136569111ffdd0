"""Between ``mpload`` and its sender processes: one JSON object a line, over a socket pair.

    to a sender     start {start_ns, unix_offset_ns}    stop    close
    from a sender   ready {…}   progress {…}   sent {…}   result {…}      a result is the last one

Rules: a side that finds the other one gone ends its work.
"""

from __future__ import annotations

import json
import select
import socket
from typing import Any

LINE_BYTES_MAX = 256 << 20
"""A result holds some 500 bytes a client and connection; this is a bound against nonsense only."""
RECEIVE_BYTES = 1 << 16

Message = dict[str, Any]


class MessageStream:
    """One end. ``fileno`` makes it fit for a selector."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()

    def send(self, kind: str, **fields: Any) -> None:
        """Raises OSError when the other side is gone."""
        self._sock.setblocking(True)
        self._sock.sendall(json.dumps({"kind": kind, **fields}, separators=(",", ":")).encode() + b"\n")

    def try_send(self, kind: str, **fields: Any) -> bool:
        """For what may be left out: False when the other side is so far behind that this would have to wait."""
        if not select.select([], [self._sock], [], 0)[1]:
            return False
        self.send(kind, **fields)
        return True

    def receive(self) -> list[Message] | None:
        """What has come, without waiting; None when the other side is gone and everything it said was returned."""
        self._sock.setblocking(False)
        ended = False
        while not ended:
            try:
                received = self._sock.recv(RECEIVE_BYTES)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                received = b""
            ended = not received
            self._buffer += received
        if len(self._buffer) > LINE_BYTES_MAX:
            raise RuntimeError(f"a message of more than {LINE_BYTES_MAX} bytes")
        *lines, rest = bytes(self._buffer).split(b"\n")
        self._buffer[:] = rest
        return None if ended and not lines else [json.loads(line) for line in lines]
