"""Messages between the supervisor and one child over an AF_UNIX SEQPACKET pair.

Every message is a hint: the truth is in the shared tables, and each side can rebuild what a lost message said.
Only the descriptor that ATTACH carries is more than a hint, and the supervisor keeps its own dup of that.

``send`` does not block: it answers False when the peer's queue is full, and the caller keeps the message.
"""

from __future__ import annotations

import array
import dataclasses
import enum
import json
import select
import socket
import struct
from typing import Any

from mpserverd.errors import ProtocolError

_FIXED = struct.Struct("<HHIQ")
MESSAGE_BYTES_MAX = 8192


class Kind(enum.IntEnum):
    # supervisor to worker
    ATTACH = 1  # row, value = cookie, with the connection's descriptor
    DETACH = 2  # row: stop reading, publish, let go, answer RELEASED
    KICK = 3  # row, reason, value = retry seconds for the BYE, 0 for none: finalise and close, answer ENDED
    PAUSE = 4  # row: stop reading for now
    RESUME = 5  # row
    DRAIN = 6  # worker: read what the kernel holds, finalise everything; storer: make all durable. Answer DRAINED
    DETACH_ALL = 7  # worker: DETACH for every connection, then DRAINED
    LOG_LEVEL = 8  # payload {"level": ...}
    REOPEN_LOG = 9
    GREET = 10  # row, value = cookie, with the descriptor: look at the hello, answer GREETED
    REFUSE = 11  # row, value = cookie, reason, payload {"line": ...}, with the descriptor: say it and end, answer ENDED
    # child to supervisor
    READY = 32
    NEED = 33  # worker: value = chunks wanted
    RELEASED = 34  # row
    ENDED = 35  # row
    DRAINED = 36
    EVENT = 37  # payload: for `mpserverctl events`
    OPENED = 38  # storer: row is OPEN now
    FREED = 39  # storer: row is FREE now
    GREETED = 40  # row, payload {"line": hello} or {"code": ..., "text": ...}: what the peer said, or did wrong


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """``fd`` is owned by whoever received the message."""

    kind: Kind
    row: int = 0
    value: int = 0
    reason: int = 0
    payload: dict[str, Any] | None = None
    fd: int = -1


def _packed(payload: dict[str, Any]) -> bytes:
    """JSON that fits into a message: long texts are cut, in the text and not in its JSON."""
    for characters_max in (MESSAGE_BYTES_MAX, 600, 60):
        cut = {key: value[:characters_max] if isinstance(value, str) else value for key, value in payload.items()}
        packed = json.dumps(cut, separators=(",", ":")).encode()
        if len(packed) <= MESSAGE_BYTES_MAX - _FIXED.size:
            return packed
    raise ValueError(f"a message of {len(packed)} bytes cannot be cut to {MESSAGE_BYTES_MAX}")


class Channel:
    """One end of the pair. The socket object is the channel's own; ``fileno()`` is for epoll."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._socket = end

    @staticmethod
    def pair() -> tuple[socket.socket, socket.socket]:
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def send(self, message: Message) -> bool:
        """True when queued, False when the peer's queue is full now. Raises OSError when the peer is gone."""
        body = _FIXED.pack(message.kind, message.reason, message.row, message.value)
        if message.payload is not None:
            body += _packed(message.payload)
        rights = []
        if message.fd >= 0:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [message.fd]))]
        try:
            self._socket.sendmsg([body], rights, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        return True

    def await_room(self, timeout_s: float) -> None:
        """Block until the peer's queue has room, the peer is gone or the time is over.

        Not by select(): with 1,000 clients a child's channel has a number past its 1,023.
        """
        poll = select.poll()
        poll.register(self._socket, select.POLLOUT)
        poll.poll(timeout_s * 1000)

    def receive(self) -> Message | None:
        """The next message, or None when there is none now. Raises EOFError when the peer is gone."""
        try:
            body, rights, _, _ = self._socket.recvmsg(MESSAGE_BYTES_MAX, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return None
        except ConnectionResetError as error:
            raise EOFError from error
        fds = array.array("i")
        for level, kind, content in rights:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        if not body:
            raise EOFError
        if len(body) < _FIXED.size:
            raise ProtocolError(f"message of {len(body)} bytes on a child's channel, at least {_FIXED.size}")
        number, reason, row, value = _FIXED.unpack_from(body)
        payload = json.loads(body[_FIXED.size :]) if len(body) > _FIXED.size else None
        return Message(Kind(number), row, value, reason, payload, fds[0] if fds else -1)
