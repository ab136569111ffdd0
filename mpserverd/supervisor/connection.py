"""What the supervisor remembers of one connection, and small calls on sockets that no worker has."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import select
import socket

from mpserverd.arena.state import CloseReason
from mpserverd.net.allowlist import Address
from mpserverd.protocol.mps import Hello
from mpserverd.supervisor.child import Child
from mpserverd.supervisor.naming import peer_text


@dataclasses.dataclass(frozen=True, slots=True)
class Farewell:
    """The line that a worker is to say, and the reason of the end."""

    line: bytes
    reason: CloseReason


@dataclasses.dataclass(frozen=True, slots=True)
class Sentence:
    """``retry_s`` is what an mps client is told, 0 for nothing."""

    reason: CloseReason
    retry_s: int = 0


@dataclasses.dataclass(eq=False, slots=True)
class Connection:
    """``fd`` is the supervisor's dup. ``worker`` is None while it waits for its stream or for a worker."""

    row: int
    fd: int
    cookie: int
    address: Address
    port: int
    listener: int
    accepted_unix_ns: int
    accepted_ns: int
    client: str | None = None
    """Id of the configured client that its address belongs to, or that its hello named."""
    client_index: int = -1
    stream: int | None = None
    worker: Child | None = None
    bound_for: Child | None = None
    """Who gets it when its worker lets go of it."""
    moved_s: float = -math.inf
    deadline_s: float = 0.0
    # mps
    greets: bool = False
    """Its listener speaks mps: a hello comes first."""
    hello: Hello | None = None
    hello_bytes: int = 0
    farewell: Farewell | None = None
    """It is refused, or has to go before it has a stream."""
    sentence: Sentence | None = None
    """How its worker shall end it, also the next one if this one dies before."""
    rival: Connection | None = None
    """The connection that this one has superseded, and whose end it waits for."""

    @property
    def peer(self) -> str:
        return peer_text(self.address, self.port)

    @property
    def awaits_worker_without_stream(self) -> bool:
        """What a worker shall do with it is to listen to its hello, or to say good-bye."""
        return self.greets and (self.stream is None or self.farewell is not None)


def is_ending(fd: int) -> bool:
    """Whether the peer has closed or reset it. Poll takes no lock of the socket, so it may be asked at any time.

    One whose descriptor did not come back from the store (-1) is at its end.
    """
    if fd < 0:
        return True
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    return bool(poll.poll(0))


def shut_down(fd: int) -> None:
    """A close says nothing to the peer while a carrier holds a dup."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as sock:
        sock.shutdown(socket.SHUT_RDWR)
