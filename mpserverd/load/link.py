"""One load client: its connection, what it still has to send, and what it did. One thread, non-blocking sockets.

    WAITING -> CONNECTING -> (GREETING ->) OPEN -> CLOSING -> DONE
       ^___________|_____________|__________|            a failed attempt or a broken connection: wait, try again

Rules: a connection begins at a packet boundary; what was left of a packet when its connection broke is dropped,
because on a raw listener a new connection is a new stream. While a link cannot send, its schedule goes on. Bytes are
counted and hashed as the kernel takes them. GREETING is for servers that answer a hello (``mps_link.py``).

When to call what is the sender's business (``sender.py``); the link says what it waits for in ``wants``, ``wake_ns``.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import ipaddress
import selectors
import socket
import sys
import time
from enum import Enum
from typing import Any

from mpserverd.client.pacing import NS_PER_S, Backoff, Schedule
from mpserverd.client.packets import PacketBlock
from mpserverd.load.expected import schedule_of
from mpserverd.load.histogram import Histogram
from mpserverd.load.scenario import Scenario

BACKOFF_FIRST_NS, BACKOFF_MAX_NS = NS_PER_S // 10, 5 * NS_PER_S
STEADY_NS = BACKOFF_MAX_NS
"""A connection that lived this long was a good one: after it the next pause is short again."""
IN_PROGRESS = (errno.EINPROGRESS, errno.EWOULDBLOCK)
IP_BIND_ADDRESS_NO_PORT = 24
"""Linux: choose the local port at connect(), per destination; otherwise some 28,000 clients use up all ports."""
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
RECEIVE_BYTES = 1 << 16
FLAT_OUT_STAMP_NS = 1_000_000


class LinkState(Enum):
    WAITING = "waiting"
    CONNECTING = "connecting"
    GREETING = "greeting"
    OPEN = "open"
    CLOSING = "closing"
    DONE = "done"


MOVES: dict[LinkState, frozenset[LinkState]] = {
    LinkState.WAITING: frozenset({LinkState.CONNECTING, LinkState.DONE}),
    LinkState.CONNECTING: frozenset({LinkState.GREETING, LinkState.OPEN, LinkState.WAITING, LinkState.DONE}),
    LinkState.GREETING: frozenset({LinkState.OPEN, LinkState.WAITING, LinkState.DONE}),
    LinkState.OPEN: frozenset({LinkState.WAITING, LinkState.CLOSING, LinkState.DONE}),
    LinkState.CLOSING: frozenset({LinkState.DONE}),
    LinkState.DONE: frozenset(),
}


@dataclasses.dataclass
class ConnectionRecord:
    """One connection that was established. Times are unix ns; ``sent_bytes`` is what the kernel took of packets;
    ``bye`` is why an mps server ended it in order."""

    local_address: str
    attempt_unix_ns: int
    first_index: int
    sent_bytes: int = 0
    unconfirmed_bytes: int = 0
    broken: str | None = None
    sha256: str | None = None
    bye: str | None = None


@dataclasses.dataclass
class ClientResult:
    """What one client did. ``elapsed_s`` is at least the time that its packets stand for at the target rate.

    The last ones are of mps clients: ``packets`` counts a packet once there however often it was sent, ``acked_s`` is
    the time until the last acknowledgement, ``packets_withdrawn`` were acknowledged and asked for again.
    """

    client: int
    packets: int
    bytes: int
    packets_unsent: int
    elapsed_s: float
    errors: int
    errors_by_reason: dict[str, int]
    reconnects: int
    connections: list[ConnectionRecord]
    client_id: str | None = None
    epoch: str | None = None
    level: str | None = None
    packets_acked: int | None = None
    acked_s: float | None = None
    packets_resent: int = 0
    packets_withdrawn: int = 0


class Link:
    """The client ``client`` of a scenario. ``block`` may be shared with other links (``shared_block``)."""

    def __init__(self, scenario: Scenario, client: int, block: PacketBlock, *, shared_block: bool) -> None:
        self.scenario, self.client = scenario, client
        self.state = LinkState.WAITING
        self.sock: socket.socket | None = None
        self.wants = 0
        self.wake_ns: int | None = None
        self.queued_ns: int | None = None
        self.index, self.index_end = 0, 0
        self.schedule: Schedule | None = None
        self.unix_offset_ns = 0
        self.begin_ns, self.finished_ns = 0, 0
        self.attempts, self.reconnects, self.errors = 0, 0, 0
        self.errors_by_reason: dict[str, int] = {}
        self.last_error: str | None = None
        self.records: list[ConnectionRecord] = []
        self.connect, self.lateness, self.acknowledging = Histogram(), Histogram(), Histogram()
        self.sent_bytes, self.packets, self.acked = 0, 0, 0
        self._block, self._shared_block = block, shared_block
        self._pending: memoryview | None = None
        self._pending_due_ns: int | None = None
        self._hasher: Any = None
        self._local_address = ""
        self._attempt_ns, self._attempt_unix_ns, self._stopped_ns, self._stamp_ns = 0, 0, 0, 0
        self._backoff = Backoff(BACKOFF_FIRST_NS, BACKOFF_MAX_NS, scenario.seed * 1_000_003 + client)

    # --- life of the connection

    def begin_connect(self, now_ns: int) -> None:
        """Start an attempt; the next target address each time. Its outcome comes with a WRITE event, or at once."""
        self._move(LinkState.CONNECTING)
        family, address = self.scenario.targets[self.attempts % len(self.scenario.targets)]
        self.attempts += 1
        self._attempt_ns = now_ns
        self._attempt_unix_ns = time.time_ns()  # before anybody can have accepted it: verify.py goes by that
        try:
            self.sock = self._new_socket(family)
            result = self.sock.connect_ex(address)
        except OSError as error:
            self._fail_attempt(now_ns, error_name(error))
            return
        if result not in (0, *IN_PROGRESS):
            self._fail_attempt(now_ns, errno.errorcode.get(result, str(result)))
            return
        self.wants = WRITE
        self.wake_ns = now_ns + int(self.scenario.connect_timeout_s * NS_PER_S)

    def _new_socket(self, family: int) -> socket.socket:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.scenario.send_buffer_bytes:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.scenario.send_buffer_bytes)
            source = self.scenario.source_address(self.client)
            if source is not None:
                if sys.platform == "linux":
                    sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
                sock.bind((source, 0))
        except OSError:
            sock.close()
            raise
        return sock

    def end_connect(self, now_ns: int) -> None:
        """The socket became writable: the attempt succeeded or failed."""
        assert self.sock is not None
        result = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if result:
            self._fail_attempt(now_ns, errno.errorcode.get(result, str(result)))
            return
        try:
            local, peer = self.sock.getsockname(), self.sock.getpeername()
        except OSError as error:
            self._fail_attempt(now_ns, error_name(error))
            return
        if local == peer:
            # nobody listens, and the kernel chose the very port as ours: TCP connects a socket to itself then
            self._fail_attempt(now_ns, "ECONNREFUSED")
            return
        self._local_address = address_text(local)
        self._on_connected(now_ns)

    def _on_connected(self, now_ns: int) -> None:
        self._open(now_ns, self._first_unsent())

    def _open(self, now_ns: int, first_index: int) -> None:
        """Packets may flow, from ``first_index`` on."""
        self._move(LinkState.OPEN)
        self.wants, self.wake_ns = READ, None
        self.connect.add(now_ns - self._attempt_ns)
        self.reconnects += bool(self.records)
        self.records.append(ConnectionRecord(self._local_address, self._attempt_unix_ns, first_index))
        self._hasher = hashlib.sha256() if self.scenario.hashing else None

    def on_timeout(self, now_ns: int) -> None:
        """``wake_ns`` has come and nothing else did."""
        if self.state is LinkState.WAITING:
            self.begin_connect(now_ns)
        elif self.state is LinkState.CONNECTING:
            self._fail_attempt(now_ns, "ETIMEDOUT")
        elif self.state is LinkState.CLOSING:
            self._break(now_ns, "close_timeout")

    def on_readable(self, now_ns: int) -> None:
        """The end of the connection, or something that the server says."""
        assert self.sock is not None
        try:
            received = self.sock.recv(RECEIVE_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._break(now_ns, error_name(error))
            return
        if received:
            self._on_received(received, now_ns)
        elif self.state is LinkState.CLOSING:
            self._end(LinkState.DONE)
        else:
            self._break(now_ns, "closed_by_peer")

    def _on_received(self, received: bytes, now_ns: int) -> None:
        """A raw server says nothing; should it talk, that is thrown away."""

    def begin_close(self, now_ns: int) -> None:
        """Everything that will be sent was sent: say so, then wait until the peer has read it and closes."""
        if self.state is not LinkState.OPEN:
            self._end(LinkState.DONE)
            return
        if self._pending is not None:
            self._break(now_ns, "stalled", LinkState.DONE)
            return
        assert self.sock is not None
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._break(now_ns, error_name(error), LinkState.DONE)
            return
        self._move(LinkState.CLOSING)
        self.wants = READ
        self.wake_ns = now_ns + int(self.scenario.close_timeout_s * NS_PER_S)

    def _fail_attempt(self, now_ns: int, reason: str) -> None:
        self._count_error(f"connect_{reason}")
        self._end(LinkState.WAITING)
        self.wake_ns = now_ns + self._backoff.next_ns()

    def _break(self, now_ns: int, reason: str, then: LinkState = LinkState.WAITING) -> None:
        """The connection is lost. The rest of a torn packet is dropped."""
        record = self.records[-1]
        record.broken = reason
        record.unconfirmed_bytes = min(self._unacknowledged_bytes(), record.sent_bytes)
        self._count_error(reason)
        self._drop_torn(record)
        if now_ns - self._attempt_ns > STEADY_NS:
            self._backoff.reset()
        self._end(LinkState.DONE if self.state is LinkState.CLOSING else then)
        if self.state is LinkState.WAITING:
            self.wake_ns = now_ns + self._backoff.next_ns()

    def _drop_torn(self, record: ConnectionRecord) -> None:
        torn_bytes = record.sent_bytes % self.scenario.packet_size
        if self._pending is not None and torn_bytes:
            self._pending = self._pending[self.scenario.packet_size - torn_bytes :] or None

    def _unacknowledged_bytes(self) -> int:
        """What the peer's kernel has not acknowledged; elsewhere than on Linux an upper bound."""
        assert self.sock is not None
        if sys.platform != "linux":
            return self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        import fcntl  # noqa: PLC0415 - not there on every OS
        import termios  # noqa: PLC0415

        waiting = int.from_bytes(fcntl.ioctl(self.sock.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        return max(0, waiting - 1) if self.state is LinkState.CLOSING else waiting  # our FIN counts as one

    def _end(self, state: LinkState) -> None:
        if self.sock is not None:
            if self._hasher is not None and self.records:
                self.records[-1].sha256 = self._hasher.hexdigest()
                self._hasher = None
            self.sock.close()
            self.sock = None
        self.wants, self.wake_ns = 0, None
        if self.state is not state:
            self._move(state)

    def _move(self, state: LinkState) -> None:
        if state not in MOVES[self.state]:
            raise RuntimeError(f"client {self.client}: from {self.state.value} to {state.value}")
        self.state = state

    def _count_error(self, reason: str) -> None:
        self.errors += 1
        self.last_error = reason
        self.errors_by_reason[reason] = self.errors_by_reason.get(reason, 0) + 1

    def result(self) -> ClientResult:
        """Call it when the link is done."""
        wanted = self.scenario.packets_per_client
        return ClientResult(
            client=self.client,
            packets=self.packets,
            bytes=self.sent_bytes,
            packets_unsent=0 if wanted is None else max(0, wanted - self.packets),
            elapsed_s=(max(self.finished_ns, self._nominal_end_ns()) - self.begin_ns) / NS_PER_S,
            errors=self.errors,
            errors_by_reason=self.errors_by_reason,
            reconnects=self.reconnects,
            connections=self.records,
        )

    def _nominal_end_ns(self) -> int:
        """A batch stands for the time up to the next one, so the last one ends that much after it was due."""
        schedule = self.schedule
        if schedule is None:
            return max(self.begin_ns, self._stopped_ns)
        if self.index >= schedule.packets:
            return schedule.end_ns
        stood_for_ns = schedule.due_ns(self.index - 1 + schedule.batch) if self.index else self.begin_ns
        return min(schedule.end_ns, max(self._stopped_ns, stood_for_ns))

    # --- sending

    def start(self, start_ns: int, unix_offset_ns: int) -> None:
        """From now on packets are due. ``unix_offset_ns`` makes unix time of the monotonic clock, for the whole run."""
        scenario = self.scenario
        self.unix_offset_ns = unix_offset_ns
        total = scenario.packets_per_client
        self.index_end = sys.maxsize if total is None else total
        self.begin_ns = start_ns if scenario.flat_out else schedule_of(scenario, self.client, start_ns).start_ns
        self.finished_ns = self.begin_ns
        if not scenario.flat_out:
            self.schedule = schedule_of(scenario, self.client, start_ns)

    @property
    def all_sent(self) -> bool:
        """The kernel has taken everything once."""
        return self._pending is None and self.index >= self.index_end

    @property
    def finished(self) -> bool:
        return self.all_sent

    def stop(self, now_ns: int) -> None:
        """Send no more than what completes the packet in progress."""
        self._stopped_ns = now_ns
        if self._pending is not None:
            torn_bytes = self.records[-1].sent_bytes % self.scenario.packet_size if self.state is LinkState.OPEN else 0
            keep_bytes = self.scenario.packet_size - torn_bytes if torn_bytes else 0
            self.index -= (len(self._pending) - keep_bytes) // self.scenario.packet_size
            self._pending = self._pending[:keep_bytes] if keep_bytes else None
        self.index_end = min(self.index, self.index_end)

    def send_due(self, now_ns: int, blocks_max: int) -> None:
        """Hand the kernel what is due, at most ``blocks_max`` blocks."""
        schedule, size, packets_max = self.schedule, self.scenario.packet_size, self._block.count_max
        if self._pending is not None and not self._send(self._pending):
            return
        due = self.index_end if schedule is None else schedule.due_packets(now_ns)
        due = min(due, self.index_end)
        while self.index < due and blocks_max:
            first = self.index
            if schedule is None:
                end, due_ns, stamp_ns = min(first + packets_max, due), None, self._flat_out_stamp_ns()
            else:
                end, stamp_ns = min(schedule.batch_end(first), first + packets_max, due), schedule.due_ns(first)
                due_ns = stamp_ns if end == schedule.batch_end(first) else None
            block = self._block.fill(self.client, first, end - first, stamp_ns + self.unix_offset_ns)
            assert len(block) == (end - first) * size
            self.index, self._pending_due_ns = end, due_ns
            self._note_block(end, stamp_ns)
            if not self._send(block):
                return
            blocks_max -= 1
        self._after_sending(now_ns, due)

    def _note_block(self, end: int, stamp_ns: int) -> None:
        """A block that ends before packet ``end`` goes to the kernel next."""

    def _flat_out_stamp_ns(self) -> int:
        """Now, to FLAT_OUT_STAMP_NS: a new time in every block would be a third of the work."""
        now_ns = time.monotonic_ns()
        if now_ns - self._stamp_ns >= FLAT_OUT_STAMP_NS:
            self._stamp_ns = now_ns
        return self._stamp_ns

    def _after_sending(self, now_ns: int, due: int) -> None:
        if self.index >= self.index_end:
            self.wants, self.wake_ns = READ, None
        elif self.schedule is None:
            self.wants = READ | WRITE
        else:
            self.wants = READ
            self.wake_ns = now_ns if self.index < due else self.schedule.due_ns(self.index)

    def _send(self, block: memoryview) -> bool:
        """True when the kernel took all of it; else the rest is pending, or the connection is lost."""
        assert self.sock is not None
        try:
            sent = self.sock.send(block)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            self._pending = self._kept(block)
            self._break(time.monotonic_ns(), error_name(error))
            return False
        if sent:
            self._count_sent(block[:sent])
        if sent < len(block):
            self._pending = self._kept(block[sent:])
            self.wants, self.wake_ns = READ | WRITE, None
            return False
        self._pending = None
        self.finished_ns = time.monotonic_ns()
        if self._pending_due_ns is not None:
            self.lateness.add(self.finished_ns - self._pending_due_ns)
        return True

    def _count_sent(self, sent: memoryview) -> None:
        record = self.records[-1]
        before = record.sent_bytes // self.scenario.packet_size
        record.sent_bytes += len(sent)
        self.sent_bytes += len(sent)
        self.packets += record.sent_bytes // self.scenario.packet_size - before
        if self._hasher is not None:
            self._hasher.update(sent)

    def _kept(self, rest: memoryview) -> memoryview:
        """A shared block is filled for somebody else next, so what waits needs a place of its own."""
        return memoryview(bytes(rest)) if self._shared_block and rest is not self._pending else rest

    def _first_unsent(self) -> int:
        """Index of the packet that a new connection begins with."""
        return self.index - (0 if self._pending is None else len(self._pending) // self.scenario.packet_size)


def address_text(address: Any) -> str:
    """``127.0.0.1:4711`` or ``[::1]:4711``, as the daemon names us: without scope, ``::ffff:`` left out."""
    host = ipaddress.ip_address(address[0].partition("%")[0])
    host = getattr(host, "ipv4_mapped", None) or host
    return f"{host}:{address[1]}" if host.version == 4 else f"[{host}]:{address[1]}"


def error_name(error: OSError) -> str:
    """``ECONNRESET``, or the name of the exception."""
    return errno.errorcode.get(error.errno or 0, type(error).__name__)
