"""The one thread of a blocking client: connects, receives, resends, keeps deadlines, and calls the callbacks.

Rules
* One lock, the client's, guards session, buffer and socket calls; all of those return at once. Callbacks, name look-ups
  and waiting happen without it.
* The thread that calls ``send`` sends by itself what is worth a packet on the wire (``SEND_NOW_BYTES``), so that large
  batches cost no switch between threads. Less than that waits ``linger_s`` for company and is sent from here.
* Only this thread makes and closes connections; others say what they saw and wake it.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable

from mpserverd.client.connection import Connection, addresses_of
from mpserverd.client.session import CONNECTED_STATES, Acknowledged, Loss, Notice, Session, State

SEND_NOW_BYTES = 4_096
SEND_BYTES_MAX = 262_144
"""One call of send: the lock is held for its copy, about 50 us."""
RECEIVES_A_TURN = 16

_log = logging.getLogger(__name__)


class IoLoop(threading.Thread):
    """Runs until the session is CLOSED. ``condition`` is notified after every change that somebody may wait for."""

    def __init__(
        self,
        session: Session,
        condition: threading.Condition,
        tell: Callable[[Notice], None],
        linger_s: float,
        tls: ssl.SSLContext | None,
    ) -> None:
        super().__init__(name=f"stream-client-{session.terms.client_id}", daemon=True)
        self._session, self._condition, self._tell = session, condition, tell
        self._linger_s, self._tls = linger_s, tls
        self._connection: Connection | None = None
        self._head = b""
        self._dialing: tuple[str, int] | None = None
        self._send_at: float | None = None
        self._send_error: OSError | None = None
        self._is_blocked = self._is_woken = self._has_more = False
        self._selector = selectors.DefaultSelector()
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_out.setblocking(False)
        self._wake_in.setblocking(False)
        self._selector.register(self._wake_out, selectors.EVENT_READ)
        self._watched: socket.socket | None = None
        self._watched_for = 0
        self.fault: BaseException | None = None

    @property
    def is_caller(self) -> bool:
        """Whether this is called from one of the callbacks."""
        return threading.current_thread() is self

    # -- for any thread, with the lock held

    def kick(self, now: float, hurry: bool = False) -> None:
        """Packets were appended: send them, or have them sent in a moment. ``hurry``: nothing more will come soon."""
        if self._session.state is not State.STREAMING or self._connection is None:
            return self.wake() if self._session.state is State.WAITING else None
        if self._is_blocked or self._send_error is not None:
            return None
        if hurry or self._session.outgoing_bytes >= SEND_NOW_BYTES:
            self._pump(now)
            if self._is_blocked or self._send_error is not None:
                self.wake()
        elif self._send_at is None:
            self._send_at = now + self._linger_s
            self.wake()
        return None

    def wake(self) -> None:
        if not self._is_woken:
            self._is_woken = True
            with contextlib.suppress(OSError):
                self._wake_in.send(b"\0")

    def _pump(self, now: float) -> None:
        """Send until there is no room or nothing left."""
        connection, session = self._connection, self._session
        assert connection is not None
        self._send_at = None
        try:
            while self._head:
                count = connection.send(self._head)
                if count is None:
                    self._is_blocked = True
                    return
                self._head = self._head[count:]
            while session.outgoing_bytes:
                count = connection.send(session.outgoing(SEND_BYTES_MAX))
                if count is None:
                    self._is_blocked = True
                    return
                session.sent(count, now)
        except OSError as error:
            self._send_error = error  # what the server said before it closed is read first

    # -- the thread

    def run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:
            self.fault = error
            _log.exception("client stopped by a fault of its own")
        finally:
            self.discard()

    def discard(self) -> None:
        """Let go of everything that is open; for a loop that never ran, too."""
        self._drop_connection()
        self._selector.close()
        self._wake_out.close()
        with self._condition:
            self._is_woken = True  # nobody writes to a closed socket
            self._wake_in.close()
            self._condition.notify_all()

    def _turn(self) -> bool:
        """Everything that is due now, then wait for what comes next. False at the end."""
        with self._condition:
            self._is_woken = False
            now = time.monotonic()
            self._session.expire(now)
            if self._session.state in CONNECTED_STATES and self._connection is not None:
                self._advance(self._connection, now)
            if self._session.state not in CONNECTED_STATES:
                self._drop_connection()
                self._dial_if_due(now)
            is_closed = self._session.state is State.CLOSED
            notices = self._session.take_notices()
            if notices:
                self._condition.notify_all()
            timeout_s = self._timeout_s(now)
        for notice in notices:
            self._tell(notice)
        if is_closed:
            return False
        if self._dialing is not None:
            self._look_up(*self._dialing)
        else:
            self._wait(timeout_s)
        return True

    def _dial_if_due(self, now: float) -> None:
        at = self._session.dial_at
        if at is not None and at <= now:
            self._dialing = self._session.dial(now)

    def _look_up(self, host: str, port: int) -> None:
        self._dialing = None
        share_s = self._session.terms.connect_timeout_s / 4
        try:
            self._connection = Connection(addresses_of(host, port), share_s, self._tls, host)
        except (OSError, UnicodeError) as error:
            with self._condition:
                if self._session.state in CONNECTED_STATES:
                    self._session.lost(Loss.UNREACHABLE, f"{host}: {error}", time.monotonic())

    def _advance(self, connection: Connection, now: float) -> None:
        session = self._session
        if session.state is State.CONNECTING:
            try:
                if not connection.step(now):
                    return
            except OSError as error:
                session.lost(Loss.UNREACHABLE, str(error), now)
                return
            self._head = session.connected(now)
        self._receive(connection, now)
        if session.state not in CONNECTED_STATES:
            return
        session.buffer.settle()
        self._is_blocked = False
        if self._send_error is None and (self._head or session.outgoing_bytes) and not self._is_lingering(now):
            self._pump(now)
        if self._send_error is not None:
            self._receive(connection, now)
            if session.state in CONNECTED_STATES:
                session.lost(Loss.BROKEN, str(self._send_error), now)

    def _is_lingering(self, now: float) -> bool:
        return (
            self._send_at is not None and now < self._send_at and self._session.outgoing_bytes < SEND_NOW_BYTES
        ) and not self._head

    def _receive(self, connection: Connection, now: float) -> None:
        self._has_more = False
        for _ in range(RECEIVES_A_TURN):
            try:
                received = connection.receive()
            except OSError as error:
                self._session.lost(Loss.BROKEN, str(error), now)
                return
            if received is None:
                return
            self._session.receive(received, now)
            if self._session.state not in (State.GREETING, State.STREAMING):
                return
        self._has_more = True  # TLS may hold bytes that the selector does not know of

    def _timeout_s(self, now: float) -> float | None:
        if self._has_more or self._dialing is not None:
            return 0.0
        connection_at = self._connection.step_at if self._connection is not None else None
        times = (self._session.deadline, self._session.dial_at, self._send_at, connection_at)
        due = [at for at in times if at is not None]
        return max(0.0, min(due) - now) if due else None

    def _wait(self, timeout_s: float | None) -> None:
        wants_write = self._connection is not None and (self._connection.wants_write or self._is_blocked)
        mask = selectors.EVENT_READ | (selectors.EVENT_WRITE if wants_write else 0)
        self._watch(self._connection.socket if self._connection is not None else None, mask)
        self._selector.select(timeout_s)
        with contextlib.suppress(BlockingIOError):
            while self._wake_out.recv(256):
                pass

    def _watch(self, target: socket.socket | None, mask: int) -> None:
        if target is self._watched and mask == self._watched_for:
            return
        if self._watched is not None:
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(self._watched)
        if target is not None:
            self._selector.register(target, mask)
        self._watched, self._watched_for = target, mask

    def _drop_connection(self) -> None:
        if self._connection is not None:
            self._watch(None, 0)
            self._connection.close()
        self._connection, self._head = None, b""
        self._send_at = self._send_error = None
        self._is_blocked = self._has_more = False


def call(on_ack: Callable[[int], None] | None, on_state: Callable[..., None] | None, notice: Notice) -> None:
    """Hand one notice to the program's callbacks. What they raise is logged: it must not stop the stream."""
    try:
        if isinstance(notice, Acknowledged):
            if on_ack is not None:
                on_ack(notice.next_packet)
        elif on_state is not None:
            on_state(str(notice.state), notice.why, notice.detail)
    except Exception:
        _log.exception("a callback failed")
