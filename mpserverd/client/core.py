"""What the blocking and the asyncio client have in common: their arguments, and what they tell about themselves.

It does no input or output and takes no lock: reading one number needs none.
"""

from __future__ import annotations

import os
import random
import ssl
from collections.abc import Callable, Iterator, Sequence
from typing import cast

from mpserverd.client.buffer import BUFFER_BYTES, PacketBuffer
from mpserverd.client.errors import BufferFullError, ClientClosedError, ClientError, NotAcknowledgedError
from mpserverd.client.file_buffer import FileBuffer
from mpserverd.client.servers import Servers, parse_server
from mpserverd.client.session import Session, State, Terms

ON_FULL = ("block", "raise", "drop-oldest")

ServerNames = str | tuple[str, int] | Sequence[str | tuple[str, int]]


class ClientCore:
    """docs/clients.md explains every argument."""

    def __init__(
        self,
        servers: ServerNames,
        client_id: str,
        packet_size: int,
        *,
        token: str | None = None,
        tls: ssl.SSLContext | None = None,
        buffer_bytes: int = BUFFER_BYTES,
        buffer_file: str | os.PathLike[str] | None = None,
        buffer_sync: bool = False,
        on_full: str = "block",
        on_epoch: str = "raise",
        linger_s: float = 0.005,
        send_timeout_s: float = 60.0,
        connect_timeout_s: float = 10.0,
        answer_timeout_s: float = 30.0,
        ack_timeout_s: float = 60.0,
        backoff_s: tuple[float, float] = (0.1, 30.0),
        on_ack: Callable[[int], None] | None = None,
        on_state: Callable[[str, str, str], None] | None = None,
    ) -> None:
        if on_full not in ON_FULL:
            raise ValueError(f"on_full is one of {', '.join(ON_FULL)}, not {on_full!r}")
        if buffer_sync and buffer_file is None:
            raise ValueError("buffer_sync needs a buffer_file")
        if not 0 <= linger_s <= 1:
            raise ValueError(f"linger_s is 0 to 1, not {linger_s!r}")
        terms = Terms(client_id, packet_size, token, on_epoch, connect_timeout_s, answer_timeout_s, ack_timeout_s)
        turn = Servers(_addresses(servers), backoff_s, random.SystemRandom().getrandbits(64))
        self._prepare()
        self._buffer = (
            PacketBuffer(packet_size, buffer_bytes)
            if buffer_file is None
            else FileBuffer(buffer_file, client_id, packet_size, buffer_bytes, buffer_sync)
        )
        self._session = Session(terms, self._buffer, turn)
        self._packet_size, self._on_full, self._send_timeout_s = packet_size, on_full, send_timeout_s
        self._linger_s, self._tls = linger_s, tls
        self._is_kept, self._is_synced = buffer_file is not None, buffer_sync
        self._on_ack, self._on_state = on_ack, on_state
        try:
            self._begin()
        except BaseException:
            self._buffer.close()  # nobody else can, and the file would stay locked
            raise

    def _prepare(self) -> None:
        """The arguments are right: what must be there before a file is opened."""

    def _begin(self) -> None:
        """Everything is there: start."""

    @property
    def acked(self) -> int:
        """Index of the next packet that the server has not acknowledged."""
        return self._buffer.acked

    @property
    def sent(self) -> int:
        """Index after the last packet that went out whole on the present connection."""
        return self._session.sent_index

    @property
    def next_index(self) -> int:
        """The index that the next packet given to ``send`` gets. Counted from 0 until the server has said OK."""
        return self._buffer.end

    @property
    def held(self) -> int:
        """Packets in the buffer, not acknowledged."""
        return self._buffer.held

    @property
    def dropped(self) -> int:
        """Packets that ``on_full="drop-oldest"`` gave up. Those already on their way may still arrive."""
        return self._session.dropped

    @property
    def skipped(self) -> int:
        """Indices that a buffer file had lost in a power cut, and the server had got before."""
        return self._session.skipped

    @property
    def state(self) -> str:
        """waiting, connecting, greeting, streaming, failed or closed."""
        return str(self._session.state)

    @property
    def error(self) -> ClientError | None:
        """Why the state is "failed"."""
        return self._session.error

    @property
    def level(self) -> str | None:
        """What an acknowledgement means there: "durable" or "stored"; None before the first OK."""
        level = self._session.level
        return None if level is None else str(level)

    @property
    def epoch(self) -> str | None:
        """16 hex digits that name the stream's present beginning."""
        return None if self._buffer.epoch is None else f"{self._buffer.epoch:016x}"

    @property
    def losses(self) -> dict[str, int]:
        """How often a connection, or an attempt at one, ended, by reason."""
        return dict(self._session.losses)

    def _check_alive(self) -> None:
        if self._session.state is State.CLOSED:
            raise ClientClosedError("this client is closed")
        if self._session.error is not None:
            raise self._session.error

    def _pieces(self, block: memoryview) -> Iterator[memoryview]:
        """A block of packets in sizes that fit; with "raise" only when all of it fits."""
        count = len(block) // self._packet_size
        if self._on_full == "raise" and count > self._buffer.room:
            raise self._full(count)
        step = self._buffer.piece_max * self._packet_size
        for at in range(0, len(block), step):
            yield block[at : at + step]

    def _place_for(self, count: int, now: float) -> bool:
        """Whether so many packets (at most ``piece_max``) can be appended now; drops for them if that is wanted."""
        if count > self._buffer.room and self._on_full == "drop-oldest":
            self._session.make_room(count, now)
        return count <= self._buffer.room

    def _full(self, count: int) -> BufferFullError:
        buffer = self._buffer
        return BufferFullError(
            f"no room for {count} packets: {buffer.held} of {buffer.capacity} wait for an acknowledgement, "
            f"the client is {self.state}"
        )

    def _unacknowledged(self, timeout_s: float) -> NotAcknowledgedError:
        held, error = self._buffer.held, self._session.error
        why = f"after {timeout_s:g} s, the client is {self.state}" if error is None else f"and will not be: {error}"
        return NotAcknowledgedError(f"{held} packets are not acknowledged {why}", held)


def _addresses(servers: ServerNames) -> list[tuple[str, int]]:
    if isinstance(servers, str):
        return [parse_server(servers)]
    if len(servers) == 2 and isinstance(servers[1], int):
        return [parse_server(cast(tuple[str, int], tuple(servers)))]
    return [parse_server(cast("str | tuple[str, int]", server)) for server in servers]
