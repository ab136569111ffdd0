"""``StreamClient``: packets into a stream that survives broken networks, restarted servers, and this program's death.

    with mpserverd.StreamClient("host:8889", "press-7", packet_size=16) as client:
        client.send(b"0123456789abcdef" * 804)
        client.flush()

Rules: ``send`` copies packets into a bounded buffer and returns; a thread sees to the rest. A packet leaves the buffer
when the server has acknowledged it. Every wait has a deadline. Any thread may call any method; one call's packets stay
together. The program's own rules for a full buffer, a server that lost its stream and so on are arguments.

Not for a process that forks afterwards: make the client in the child.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Self

from mpserverd.client import intake
from mpserverd.client.core import ClientCore
from mpserverd.client.errors import (
    BufferFullError,
    ClientClosedError,
    ClientError,
    PacketLengthError,
)
from mpserverd.client.io_loop import IoLoop, call
from mpserverd.client.session import Notice, State

if TYPE_CHECKING:
    from mpserverd.client.intake import Packets

JOIN_S = 5.0
"""The thread ends at once unless the system's resolver holds it; then it ends later, by itself."""


class StreamClient(ClientCore):
    """Connects at once, in the background; the constructor does not wait for it. docs/clients.md has every argument."""

    def _begin(self) -> None:
        self._condition = threading.Condition()
        self._one_call = threading.Lock()
        self._loop = IoLoop(self._session, self._condition, self._tell, self._linger_s, self._tls)
        try:
            self._loop.start()
        except RuntimeError:  # no more threads
            self._loop.discard()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            with contextlib.suppress(ClientError):
                self.close(timeout_s=0.0)

    # -- sending

    def send(self, packets: Packets, timeout_s: float | None = None) -> int:
        """Take packets, and return how many. Waits for room up to ``timeout_s`` if ``on_full`` is "block".

        Raises PacketLengthError, BufferFullError (both say how many were ``taken``), ClientClosedError,
        BufferFileError, and the FinalError that ended the client.
        """
        timeout_s = self._send_timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout_s
        if not self._one_call.acquire(timeout=max(0.0, timeout_s)):
            raise self._full(1)
        taken = 0
        try:
            for block in intake.blocks(packets, self._packet_size):
                for piece in self._pieces(block):
                    taken += self._keep(piece, deadline)
            if self._is_synced and taken:
                self._buffer.sync()
        except (PacketLengthError, BufferFullError) as error:
            error.taken = taken
            raise
        finally:
            self._one_call.release()
        return taken

    def _keep(self, piece: memoryview, deadline: float) -> int:
        count = len(piece) // self._packet_size
        with self._condition:
            self._check_alive()
            while not self._place_for(count, now := time.monotonic()):
                if self._on_full == "raise" or not self._condition.wait(max(0.0, deadline - now)):
                    raise self._full(count)
                self._check_alive()
            self._buffer.append(piece)
            self._loop.kick(time.monotonic())
        return count

    def flush(self, timeout_s: float = 60.0) -> None:
        """Wait until everything sent so far is acknowledged. Raises NotAcknowledgedError, or what ended the client.

        RuntimeError in a callback: it runs in the thread that receives acknowledgements.
        """
        if self._loop.is_caller:
            raise RuntimeError("a callback cannot wait for what its own thread receives")
        deadline = time.monotonic() + timeout_s
        with self._condition:
            self._check_alive()
            end = self._buffer.end_place
            self._loop.kick(time.monotonic(), hurry=True)
            while self._buffer.base_place < end:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise self._unacknowledged(timeout_s)
                self._condition.wait(left_s)
                self._check_alive()

    def close(self, timeout_s: float = 30.0) -> int:
        """Flush, and end. Returns the number of packets that a buffer file keeps for the next start; without a file
        raises NotAcknowledgedError if packets were left. May be called again. In a callback it does not flush."""
        error: ClientError | None = None
        if self._loop.is_caller:
            error = self._unacknowledged(0.0) if self._buffer.held else None
        elif self._session.state is not State.CLOSED:
            try:
                self.flush(timeout_s)
            except ClientError as caught:
                error = caught
        with self._condition:
            is_first = self._session.state is not State.CLOSED
            self._session.close()
            self._loop.wake()
            self._condition.notify_all()
        if not self._loop.is_caller:
            self._loop.join(JOIN_S)
        with self._one_call:  # whoever waits there for room was woken and leaves
            if not self._buffer.is_closed:
                self._buffer.close()
        if error is not None and not self._is_kept and is_first:
            raise self._unacknowledged(timeout_s) from error
        return self._buffer.held

    def _check_alive(self) -> None:
        super()._check_alive()
        if self._loop.fault is not None:
            raise ClientClosedError("the client's thread stopped by a fault of its own") from self._loop.fault

    def _tell(self, notice: Notice) -> None:
        call(self._on_ack, self._on_state, notice)
