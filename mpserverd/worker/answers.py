"""What is said to the client of one mps connection: OK once, ACK when something became durable, BYE at the end.

Rules: at most one line is in progress; a newer ACK replaces one that waits. Nothing here blocks or raises: a client
that does not read its answers gets fewer of them, and one that is gone none. Whether OK went out is asked of the
kernel, so that a successor neither repeats nor forgets it; it begins with a LF instead, since a line may be torn.
"""

from __future__ import annotations

import socket

from mpserverd.arena.state import CloseReason
from mpserverd.net import tcp_info
from mpserverd.protocol.mps import Ack, Bye, ByeReason, Ok

_SEND_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL

BYE_REASONS = {
    CloseReason.STOPPING: ByeReason.STOPPING,
    CloseReason.SUPERSEDED: ByeReason.SUPERSEDED,
    CloseReason.KICKED: ByeReason.KICKED,
    CloseReason.IDLE: ByeReason.IDLE,
    CloseReason.QUARANTINED: ByeReason.QUARANTINED,
}
"""Ends that the client is told of. The others it brought about itself, or cannot hear of."""


class Answers:
    """The sending side of one connection. ``acknowledged`` is the packet index that OK or an ACK has named last."""

    __slots__ = ("_rest", "_sock", "_waiting", "acknowledged")

    def __init__(self, sock: socket.socket, ok: Ok) -> None:
        self._sock = sock
        self.acknowledged = ok.next_packet
        self._waiting = b""
        self._rest = b"\n" if tcp_info.bytes_sent(sock) else ok.to_line()
        if self._rest != b"\n":
            self._push()

    def acknowledge(self, next_packet: int) -> bool:
        """Say that all packets before ``next_packet`` are kept. True when that is on its way, or was before."""
        if next_packet > self.acknowledged:
            self.acknowledged = next_packet
            self._waiting = Ack(next_packet).to_line()
        elif not self._waiting:
            return not self._rest or self._rest == b"\n"
        return self._push()

    def bye(self, reason: CloseReason, retry_s: int) -> bool:
        """Say good-bye, if there is a word for it. True when the client may be reading it now."""
        word = BYE_REASONS.get(reason)
        if word is None:
            return False
        self._waiting += Bye(word, retry_s or None).to_line()
        return self._push()

    def _push(self) -> bool:
        while True:
            if not self._rest or self._rest == b"\n":
                self._rest += self._waiting
                self._waiting = b""
            if not self._rest:
                return True
            try:
                sent = self._sock.send(self._rest, _SEND_FLAGS)
            except BlockingIOError:
                return False
            except OSError:  # the client is gone; reading says so too
                self._rest = self._waiting = b""
                return True
            self._rest = self._rest[sent:]
