"""One connection in a worker: socket, place in the arena, checks, and how it ends.

Rules: only this process makes calls on the socket; bytes are read into the arena and nowhere else; counters are
assigned from offsets, so that a successor that repeats any step arrives at the same numbers; every end has a
CloseReason.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from collections.abc import Callable

from mpserverd.arena.state import CloseReason, Con, ConnectionState, StateTable, Str
from mpserverd.arena.window import LeasePool, StreamWindow
from mpserverd.errors import MpserverdError
from mpserverd.net import tcp_info
from mpserverd.protocol.mps import Level, Ok
from mpserverd.worker.answers import Answers
from mpserverd.worker.checker import Checker

READ_BYTES_MAX = 256 * 1024
"""One ``recv`` at most; about what the second-level cache keeps until the check has read it."""
READ_BYTES_BIG = 64 * 1024
"""A ``recv`` that brought so much is followed by one with room for READ_BYTES_MAX."""
CHECK_BYTES = 128 * 1024
"""With so much unchecked the check does not wait for the next pass: the bytes are still in the cache."""
READS_A_TURN = 4
"""Then it is another connection's turn."""


FAREWELL_NS = 3_600_000_000_000
"""A client that has sent its last byte waits at most so long for its last acknowledgement, when the disk is full."""

_RESETS = frozenset({errno.ECONNRESET, errno.EPIPE, errno.ECONNABORTED})
_TIMEOUTS = frozenset({errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH})

_HEARD_OUT = frozenset({CloseReason.ENDED, CloseReason.STOPPING})
"""Ends at which an mps client waits for its last acknowledgement, and gets it."""

CheckerMaker = Callable[[int], Checker]
"""Makes the checker of a stream row."""


class StaleHintError(MpserverdError):
    """An ATTACH whose stream is gone: there is nowhere to put what would be read."""


class Connection:
    """What a worker knows of one connection. ``row`` is the connection's row, ``stream_row`` its stream's."""

    __slots__ = (
        "_base",
        "_checker",
        "_handshake",
        "_handshake_at_attach",
        "_offset_at_attach",
        "_socket_at_attach",
        "_stream_base",
        "_truncated_at_attach",
        "_wanted",
        "_words",
        "answers",
        "blocked",
        "closing",
        "closing_since_ns",
        "drain_bytes",
        "dropped_bytes",
        "errno",
        "farewell_ns",
        "fd",
        "idle_timeout_ns",
        "last_received_ns",
        "packets_counted",
        "paused",
        "received_since",
        "registered",
        "retry_s",
        "row",
        "silent_timeout_ns",
        "sock",
        "stream_row",
        "window",
    )

    def __init__(
        self,
        state: StateTable,
        pool: LeasePool,
        row: int,
        sock: socket.socket,
        checker_for: CheckerMaker,
        level: Level | None = None,
    ) -> None:
        """``level`` is what an acknowledgement means; None on a raw listener, which gives none."""
        words = state.words
        self._words = words
        self.row = row
        self._base = base = state.connection_base(row)
        self.sock = sock
        self.fd = sock.fileno()
        self.stream_row = int(words[base + Con.STREAM])
        self._stream_base = state.stream_base(self.stream_row)
        if words[self._stream_base + Str.NUMBER] != words[base + Con.STREAM_NUMBER]:
            raise StaleHintError(f"connection row {row} names a stream that is gone")
        self._offset_at_attach = int(words[base + Con.OFFSET_AT_ATTACH])
        self._truncated_at_attach = int(words[base + Con.TRUNCATED_AT_ATTACH])
        self._socket_at_attach = int(words[base + Con.SOCKET_AT_ATTACH])
        self._handshake = int(words[base + Con.HANDSHAKE_BYTES])
        self._handshake_at_attach = int(words[base + Con.HANDSHAKE_AT_ATTACH])
        self._wanted = pool.arena.chunk_bytes
        self.paused = False
        self.blocked = False
        self.registered = False
        self.closing = CloseReason.NONE
        self.closing_since_ns = 0
        self.retry_s = 0
        self.errno = 0
        self.drain_bytes = -1
        self.received_since = 0
        self.dropped_bytes = 0
        self.idle_timeout_ns = self.silent_timeout_ns = 0
        self.farewell_ns = FAREWELL_NS
        self.last_received_ns = time.monotonic_ns()
        self.window = StreamWindow(state, pool, self.stream_row)
        self._checker = checker_for(self.stream_row)
        self._take_up()
        self.answers = None if level is None else Answers(sock, self._ok(level))

    def _take_up(self) -> None:
        """Ask the kernel where the stream stands; the same for a fresh connection and for an orphan."""
        taken = tcp_info.consumed(self.sock)
        self.errno = taken.error or int(self._words[self._base + Con.ERRNO])
        self.mark_blocked(False)
        consumed_bytes = taken.consumed_bytes
        if consumed_bytes < self._handshake:
            consumed_bytes += self._take_hello(self._handshake - consumed_bytes)
        hello_bytes = min(consumed_bytes, self._handshake)
        self._words[self._stream_base + Str.HANDSHAKE] = self._handshake_at_attach + hello_bytes
        self._publish_socket_bytes(consumed_bytes)
        self.window.adopt(self._offset_at_attach + consumed_bytes - hello_bytes)
        self.packets_counted = self.window.position // self.window.packet_size
        if self.window.position == self._offset_at_attach:
            self._checker.forget_sequence()

    def _take_hello(self, length: int) -> int:
        """Exactly the bytes of the hello that were looked at before: they wait in the kernel."""
        taken = 0
        while taken < length:
            try:
                count = len(self.sock.recv(length - taken))
            except OSError as error:  # a reset takes nothing away that had come; then the next read says it again
                self.errno = error.errno or 0
                break
            if not count:
                break
            taken += count
        return taken

    def _ok(self, level: Level) -> Ok:
        """The same in every worker: it follows from the row."""
        epoch = int(self._words[self._stream_base + Str.EPOCH])
        return Ok(self._offset_at_attach // self.window.packet_size, level, epoch)

    # -- acknowledgements (mps)

    def acknowledge(self) -> bool:
        """Tell the client what has become durable. True when it has been told of every whole packet that it sent."""
        if self.answers is None:
            return True
        words, base, packet = self._words, self._stream_base, self.window.packet_size
        durable = words[base + Str.DURABLE]
        holes = words[base + Str.DURABLE_HOLES]  # read after it: they may be too many then, never too few
        told = self.answers.acknowledge(durable // packet)
        acked = durable - min(holes, durable)
        if told and acked > words[base + Str.ACKED]:
            words[base + Str.ACKED] = acked
        return told and durable >= self.window.position - self.window.position % packet

    def mark_blocked(self, blocked: bool) -> None:
        """Whether it waits for a place in the arena; mpserverctl shows it."""
        self.blocked = blocked
        self._words[self._base + Con.BLOCKED] = blocked

    def _publish_socket_bytes(self, consumed_bytes: int) -> None:
        self._words[self._base + Con.SOCKET_BYTES] = consumed_bytes
        self._words[self._stream_base + Str.SOCKET] = self._socket_at_attach + consumed_bytes

    @property
    def consumed_bytes(self) -> int:
        return self.window.position - self._offset_at_attach + self._handshake

    def read(self) -> CloseReason:
        """Take what the socket has, a fair turn of it. NONE while the connection lives.

        Sets ``blocked`` when the arena has no place and nothing may be dropped.
        """
        window, sock = self.window, self.sock
        for _ in range(READS_A_TURN):
            places = window.room(self._wanted)
            if not places and self._make_room():
                places = window.room(self._wanted)
            if not places:  # reading into none would give 0 bytes, which is how a connection's end looks
                self.mark_blocked(True)
                return CloseReason.NONE
            try:
                count = sock.recv_into(places[0]) if len(places) == 1 else sock.recvmsg_into(places)[0]
            except BlockingIOError:
                return CloseReason.NONE
            except OSError as error:
                return self._failed(error.errno or 0)
            if count == 0:
                return self._ended()
            self._took(count)
            if self.drain_bytes >= 0:
                self.drain_bytes -= count
                if self.drain_bytes <= 0:
                    return CloseReason.STOPPING
            if count < READ_BYTES_BIG:
                if self._wanted == READ_BYTES_MAX:
                    self._wanted = window.chunk_bytes
                if count < sum(map(len, places)):
                    return CloseReason.NONE  # the kernel had no more; epoll says when it has
            else:
                self._wanted = READ_BYTES_MAX
        return CloseReason.NONE

    def _took(self, count: int) -> None:
        window, words = self.window, self._words
        window.received(count)
        words[self._stream_base + Str.SOCKET] = self._socket_at_attach + self.consumed_bytes
        self.received_since += count
        if self._checker.wants_marks:
            self._checker.marks.append((window.position, time.time_ns()))
        if window.position - self._checker.checked >= CHECK_BYTES:
            self.check_and_offer()

    def check_and_offer(self) -> bool:
        """Check what has gathered and let the storer have it. True when the storer got something new."""
        self._checker.check(self.window)
        return self.window.offer(self._checker.checked)

    @property
    def unoffered_bytes(self) -> int:
        """Whole packets that the storer may not touch yet."""
        packet = self.window.packet_size
        return self.window.position - self.window.position % packet - self.window.offered

    def _make_room(self) -> bool:
        """Drop the oldest packets if this stream may; the count is in the holes."""
        if not self.window.drops:
            return False
        self.check_and_offer()
        dropped = self.window.drop_oldest()
        self.dropped_bytes += dropped
        return dropped > 0

    def _ended(self) -> CloseReason:
        return CloseReason.RESET if self.errno in _RESETS else CloseReason.ENDED

    def _failed(self, number: int) -> CloseReason:
        self.errno = number
        if number in _RESETS:
            return CloseReason.RESET
        return CloseReason.TIMED_OUT if number in _TIMEOUTS else CloseReason.FAILED

    def begin_drain(self) -> None:
        """The daemon stops: take what the kernel holds now, and no more."""
        self.drain_bytes = tcp_info.unread_bytes(self.sock)

    def finish(self, reason: CloseReason) -> bool:
        """Cut the partial packet, check and offer the rest, let go of the stream. False: call again after a commit.

        It has to wait only when packets were dropped and the hole cannot be passed yet. After True comes
        ``publish_end``. Once REASON is in the row nobody may read on, since the stream's chunks are let go: a
        successor finds it (``decided``) and repeats this, to the same numbers.
        """
        if self.closing is CloseReason.NONE:
            self.closing_since_ns = time.monotonic_ns()
        self.closing = reason
        window, words = self.window, self._words
        end, partial = window.position, window.position % window.packet_size
        if reason is CloseReason.QUARANTINED:  # looking at it is what workers die of
            window.offer(end - partial, closing=True)
        else:
            self._checker.check(window)
            window.offer(self._checker.checked, closing=True)
        if window.offered != end - partial:
            return False
        if self.answers is not None:
            if reason in _HEARD_OUT and self._is_owed(end - partial):
                return False
            self.acknowledge()
            self.answers.bye(reason, self.retry_s)
        words[self._base + Con.SOCKET_BYTES] = self.consumed_bytes
        words[self._stream_base + Str.TRUNCATED] = self._truncated_at_attach + partial
        words[self._base + Con.ERRNO] = self.errno
        words[self._base + Con.REASON] = reason
        window.close(end - partial)
        return True

    @property
    def decided(self) -> CloseReason:
        """How an earlier worker was about to end it, before it died over that; NONE when it had not begun."""
        return CloseReason(self._words[self._base + Con.REASON])

    def publish_end(self) -> None:
        """The row is the supervisor's from now on."""
        self._words[self._base + Con.STATE] = ConnectionState.ENDED

    def _is_owed(self, end: int) -> bool:
        """Whether the client still waits to hear that everything is durable; for its time only."""
        if time.monotonic_ns() - self.closing_since_ns > self.farewell_ns:
            return False
        return self.window.durable() < end

    def release(self) -> None:
        """Hand over: everything is published; the successor asks the kernel again."""
        self.check_and_offer()
        self.acknowledge()
        self._words[self._base + Con.SOCKET_BYTES] = self.consumed_bytes
        self._words[self._base + Con.STATE] = ConnectionState.RELEASED

    def overdue(self, now_ns: int) -> CloseReason:
        """The deadline that this connection has missed, if any. Bytes that wait in the kernel are a sign of life."""
        quiet_ns = now_ns - self.last_received_ns
        timeout_ns = self.idle_timeout_ns if self.consumed_bytes else self.silent_timeout_ns
        if not timeout_ns or quiet_ns <= timeout_ns or tcp_info.unread_bytes(self.sock):
            return CloseReason.NONE
        return CloseReason.IDLE if self.consumed_bytes else CloseReason.SILENT

    def close(self, *, shutdown: bool) -> None:
        """Close this process's descriptor; with ``shutdown`` the peer learns of it although dups live on."""
        if shutdown:
            with contextlib.suppress(OSError):  # the peer may be gone already
                self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()
