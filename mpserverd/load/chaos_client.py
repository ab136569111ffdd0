"""One client of ``mpload chaos``: a plain TCP socket that sends bytes nobody else would send. One thread, non-blocking.

    WAITING -> CONNECTING -> OPEN -> FLUSHING -> WAITING      ends with a reset when the peer's kernel has everything
       ^                      |----> ENDING ---> WAITING      ends with a FIN, and waits for the peer's
       |______________________|                               the peer ended it: a disconnect

Rules: pieces are cut anywhere, packets are whole only as a sum of them. Bytes are counted and hashed as the kernel
takes them. A pause is the time from the first byte that the kernel would not take to the next one that it took. What
the peer sends is thrown away. It knows nothing of the daemon but an address.
"""

from __future__ import annotations

import dataclasses
import enum
import errno
import fcntl
import random
import select
import socket
import struct
import termios

from mpserverd.load.chaos_content import Content
from mpserverd.load.chaos_plan import ClientPlan, Habit
from mpserverd.load.chaos_sent import ENDED, RESET, SentConnection, SentStream, StreamHash

NS_PER_S = 1_000_000_000
FIN = "FIN"
READ, WRITE = select.EPOLLIN, select.EPOLLOUT
AHEAD_BYTES = 1 << 16
"""So much content is made at a time."""
SEND_BUFFER_BYTES = 16_384
"""Small, so that a daemon that stands still is noticed soon."""
LATE_NS_MAX = NS_PER_S // 5
"""A paced client that could not send catches up this much, and forgets the rest."""
PIECE_S_MAX = 0.04
FLAT_OUT_PIECES = 8
FLUSH_POLL_NS = NS_PER_S // 1000
CONNECT_AGAIN_NS = NS_PER_S // 10
PORT_TRIES = 100
LIFE_S = (0.3, 5.0)
STALL_EVERY_S, STALL_S = (0.5, 3.0), (0.05, 1.0)
AWAY_S = (0.0, 1.0)


class ClientState(enum.Enum):
    WAITING = "waiting"
    CONNECTING = "connecting"
    OPEN = "open"
    FLUSHING = "flushing"
    ENDING = "ending"
    DONE = "done"


@dataclasses.dataclass
class ClientTotals:
    sent_bytes: int = 0
    truncated_bytes: int = 0
    connections: int = 0
    disconnects: int = 0
    refusals: int = 0
    longest_pause_ns: int = 0


class ChaosClient:
    """Call ``wake`` when ``wake_ns`` has come, ``serve`` when its socket is ready for what is in ``wants``.

    ``streams`` gets what was sent, ``pauses`` what was waited for (begin and end, monotonic ns), ``troubles`` lines for
    people; whoever runs it takes them out.
    """

    def __init__(self, plan: ClientPlan, target: tuple[str, int], seed: int) -> None:
        self.plan, self.target, self.seed = plan, target, seed
        self.state, self.totals = ClientState.WAITING, ClientTotals()
        self.sock: socket.socket | None = None
        self.wants = 0
        self.wake_ns: int | None = 0
        self.streams: list[SentStream] = []
        self.pauses: list[tuple[int, int]] = []
        self.troubles: list[str] = []
        self._chance = random.Random(f"client {seed} {plan.client}")
        self._finishing = False
        self._number = 0
        self._content = Content(seed, plan.client, 0, plan.packet_size)
        self._begin_stream()
        self._ahead = memoryview(b"")
        self._piece = memoryview(b"")
        self._connection_bytes = 0
        """Sent on this connection."""
        self._end_bytes: int | None = None
        """Where this connection is to end."""
        self._due_ns = self._end_ns = self._stall_ns = 0
        self._blocked_ns: int | None = None
        self._opened_ns = self._begin_offset = 0
        self._ports: set[int] = set()
        """No port is used twice, so that address and port name one connection."""
        self._port = 0

    # --- what the loop calls

    def wake(self, now_ns: int) -> None:
        self.wake_ns = None
        if self.state is ClientState.WAITING:
            if self._finishing:
                self._leave()
            else:
                self._connect(now_ns)
        elif self.state is ClientState.OPEN:
            self._go_on(now_ns)
        elif self.state is ClientState.FLUSHING:
            self._flush(now_ns)

    def serve(self, events: int, now_ns: int) -> None:
        if self.state is ClientState.CONNECTING:
            self._connected(now_ns)
            return
        if events & ~WRITE and (ended := self._maybe_end()) is not None:
            self._peer_ended(now_ns, ended)
        elif events & WRITE and self.state is ClientState.OPEN:
            self._send(now_ns)

    def finish(self, now_ns: int) -> None:
        """End as it would anyway, but soon, and do not come back."""
        self._finishing = True
        if self.state in (ClientState.WAITING, ClientState.OPEN):
            self._end_ns = now_ns
            self.wake_ns = now_ns

    def longest_pause_ns(self, now_ns: int) -> int:
        """One that is not over counts as far as it has come."""
        present = 0 if self._blocked_ns is None else now_ns - self._blocked_ns
        return max(self.totals.longest_pause_ns, present)

    # --- beginning

    def _begin_stream(self) -> None:
        self._hash, self._sent = StreamHash(self.plan.packet_size), list[SentConnection]()

    def _connect(self, now_ns: int) -> None:
        self.sock = self._fresh_socket()
        self.state, self.wants = ClientState.CONNECTING, WRITE
        result = self.sock.connect_ex(self.target)
        if result not in (0, errno.EINPROGRESS):
            self._refused(result, now_ns)

    def _fresh_socket(self) -> socket.socket:
        for _ in range(PORT_TRIES):
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            sock.bind((self.plan.address, 0))
            self._port = sock.getsockname()[1]
            if self._port not in self._ports:
                self._ports.add(self._port)
                return sock
            sock.close()
        raise OSError(errno.EADDRINUSE, f"{self.plan.address} has hardly a port left that was not used yet")

    def _connected(self, now_ns: int) -> None:
        assert self.sock is not None
        result = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if result:
            self._refused(result, now_ns)
            return
        self.totals.connections += 1
        self.state = ClientState.OPEN
        self._connection_bytes, self._end_bytes, self._blocked_ns = 0, None, None
        if not self.plan.named:
            self._content = Content(self.seed, self.plan.client, self._number, self.plan.packet_size)
            self._begin_stream()
        self._opened_ns, self._begin_offset = now_ns, self._hash.whole_bytes
        self._ahead = self._piece = memoryview(b"")
        steady = self.plan.habit in (Habit.STEADY, Habit.STALLING)
        self._end_ns = 1 << 63 if steady else now_ns + self._random_ns(LIFE_S)
        self._stall_ns = now_ns + self._random_ns(STALL_EVERY_S) if self.plan.habit is Habit.STALLING else 1 << 63
        self._due_ns = now_ns
        self._go_on(now_ns)

    def _refused(self, number: int, now_ns: int) -> None:
        self.totals.refusals += 1
        self._trouble(f"could not connect: {errno.errorcode.get(number, number)}")
        self._close(now_ns, CONNECT_AGAIN_NS)

    # --- sending

    def _go_on(self, now_ns: int) -> None:
        """Nothing is held back by the kernel now, or it was just told that there is room."""
        if self._end_bytes is None and (now_ns >= self._end_ns or self._finishing):
            self._end_bytes = self._choose_end()
        if now_ns >= self._stall_ns and self._end_bytes is None and not self._piece:
            self._stall_ns = now_ns + self._random_ns(STALL_EVERY_S)
            self._due_ns = self.wake_ns = now_ns + self._random_ns(STALL_S)
            self.wants = READ
            return
        self._send(now_ns)

    def _choose_end(self) -> int:
        """After a whole packet, or within the one that follows it; at least one packet is whole."""
        size = self.plan.packet_size
        whole = max(1, -(-(self._connection_bytes + len(self._piece)) // size)) * size
        torn = self.plan.habit is Habit.TORN or (self.plan.habit is Habit.RESETTING and self._chance.random() < 0.5)
        return whole + (self._chance.randrange(1, size) if torn else 0)

    def _send(self, now_ns: int) -> None:
        assert self.sock is not None
        for _ in range(FLAT_OUT_PIECES):
            if not self._piece:
                if self._connection_bytes == self._end_bytes:
                    self._all_sent(now_ns)
                    return
                self._piece = self._next_piece()
            try:
                count = self.sock.send(self._piece)
            except BlockingIOError:
                count = 0
            except OSError as error:
                self._peer_ended(now_ns, _error_name(error))
                return
            self._took(count, now_ns)
            if self._piece:
                self.wants = READ | WRITE
                if self._blocked_ns is None:
                    self._blocked_ns = now_ns
                return
            self.wants = READ
            self._due_ns = max(self._due_ns, now_ns - LATE_NS_MAX) + self._worth_ns(count)
            if self._due_ns > now_ns:
                break
        self.wake_ns = max(self._due_ns, now_ns)

    def _took(self, count: int, now_ns: int) -> None:
        if not count:
            return
        if self._blocked_ns is not None:
            pause_ns = now_ns - self._blocked_ns
            self.totals.longest_pause_ns = max(self.totals.longest_pause_ns, pause_ns)
            self.pauses.append((self._blocked_ns, now_ns))
            self._blocked_ns = None
        self._hash.add(self._piece[:count])
        self._piece = self._piece[count:]
        self._connection_bytes += count
        self.totals.sent_bytes += count

    def _worth_ns(self, count: int) -> int:
        return int(count / self.plan.bytes_per_s * NS_PER_S) if self.plan.bytes_per_s else 0

    def _next_piece(self) -> memoryview:
        """Anything from a byte to some packets; many small ones."""
        longest = self.plan.bytes_per_s * PIECE_S_MAX if self.plan.bytes_per_s else AHEAD_BYTES
        length = int(min(AHEAD_BYTES, max(1.0, longest)) ** self._chance.random())
        if self._end_bytes is not None:
            length = min(length, self._end_bytes - self._connection_bytes)
        if not self._ahead:
            at = self._stream_offset()
            self._ahead = memoryview(self._content.piece(at, at + AHEAD_BYTES).tobytes())
        piece, self._ahead = self._ahead[:length], self._ahead[length:]
        return piece

    def _stream_offset(self) -> int:
        """Of the next byte: what earlier connections left whole, and what this one has sent."""
        return self._begin_offset + self._connection_bytes

    # --- ending

    def _all_sent(self, now_ns: int) -> None:
        assert self.sock is not None
        if self.plan.habit is Habit.RESETTING:
            self.state, self.wants = ClientState.FLUSHING, READ
            self._flush(now_ns)
            return
        self.state, self.wants = ClientState.ENDING, READ
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._peer_ended(now_ns, _error_name(error))

    def _flush(self, now_ns: int) -> None:
        """A reset throws away what the peer's kernel has not acknowledged, so wait for that."""
        assert self.sock is not None
        waiting = int.from_bytes(fcntl.ioctl(self.sock.fileno(), termios.TIOCOUTQ, bytes(4)), "little")
        if waiting:
            self.wake_ns = now_ns + FLUSH_POLL_NS
            return
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._over(now_ns, RESET)

    def _maybe_end(self) -> str | None:
        """How the peer ended the connection; None when it has not."""
        assert self.sock is not None
        try:
            return None if self.sock.recv(4096) else FIN
        except BlockingIOError:
            return None
        except OSError as error:
            return _error_name(error)

    def _peer_ended(self, now_ns: int, how: str) -> None:
        if self.state is ClientState.ENDING and how == FIN:
            self._over(now_ns, ENDED)
            return
        self.totals.disconnects += 1
        self._trouble(f"disconnected ({how}) after {self._connection_bytes} bytes, {self.state.value}")
        self._over(now_ns, how)

    def _over(self, now_ns: int, how: str) -> None:
        torn = self._hash.cut()
        self.totals.truncated_bytes += torn
        self._sent.append(
            SentConnection(
                port=self._port,
                begin=self._begin_offset,
                end=self._hash.whole_bytes,
                torn_bytes=torn,
                opened_ns=self._opened_ns,
                closed_ns=now_ns,
                how=how,
            )
        )
        if not self.plan.named:
            self._record()
        self._close(now_ns, self._random_ns(AWAY_S))

    def _record(self) -> None:
        if not self._sent:
            return
        plan = self.plan
        self.streams.append(
            SentStream(
                client=plan.client,
                number=self._number,
                name=plan.name if plan.named else "",
                address=plan.address,
                packet_size=plan.packet_size,
                whole_bytes=self._hash.whole_bytes,
                sha256=self._hash.hexdigest(),
                connections=tuple(self._sent),
            )
        )
        self._number += 0 if plan.named else 1

    def _close(self, now_ns: int, away_ns: int) -> None:
        assert self.sock is not None
        self.sock.close()
        self.sock, self.wants, self._blocked_ns = None, 0, None
        self.state, self._piece = ClientState.WAITING, memoryview(b"")
        self.wake_ns = now_ns if self._finishing else now_ns + away_ns

    def _leave(self) -> None:
        if self.plan.named:
            self._record()
        self.state = ClientState.DONE

    def _random_ns(self, bounds_s: tuple[float, float]) -> int:
        return int(self._chance.uniform(*bounds_s) * NS_PER_S)

    def _trouble(self, text: str) -> None:
        self.troubles.append(f"client {self.plan.client} ({self.plan.address}:{self._port}): {text}")


def _error_name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, str(error))
