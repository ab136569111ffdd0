"""The state table: connections, streams and children, in shared memory, one writer a word.

Everything that outlives a process is here, and it suffices to adopt a connection, to count every byte and to answer
mpserverctl. Rows are arrays of u64; the constants below are column numbers, grouped in cache lines by who writes them.

Stream row, ``STATE`` is written by the owner of the present state:

    FREE     -> OPENING   supervisor: continue the catalog's stream of that name, or make it
    FREE     -> OPEN      supervisor: a fresh stream, its name cannot exist yet
    OPENING  -> OPEN      storer: offsets and totals filled in from the catalog
    OPEN     -> DRAINING  supervisor, after the connection's row said ENDED
    DRAINING -> FREE      storer, when all is durable, committed, its chunks free, and its totals added to GONE

Connection row:

    FREE     -> ACCEPTED  supervisor: accepted, waits for its stream
    ACCEPTED -> HELLO     supervisor: the worker in WORKER may look at its hello (mps), and end it
    HELLO    -> ACCEPTED  worker: has let go of it; not a byte was taken
    HELLO    -> ENDED     worker
    ACCEPTED -> ASSIGNED  supervisor: the worker in WORKER may read it
    ASSIGNED -> RELEASED  worker: let go, another worker may have it (hand over)
    RELEASED -> ASSIGNED  supervisor
    ASSIGNED -> ENDED     worker: finalised; REASON says why, and stands there before the stream's chunks are let go
    *        -> FREE      supervisor, after it has closed its dup
"""

from __future__ import annotations

import enum

import numpy as np
import numpy.typing as npt

from mpserverd.arena.shared import LIVE_WORD, PAGE_BYTES, WORD_BYTES, SharedWords, round_up

STATE_MAGIC = 0x6D70737374617465
STATE_VERSION = 2
"""Another one whenever a column moves, a row grows or a state is new; the old layout stays in arena/layouts.py."""

CONNECTION_WORDS = 24
STREAM_WORDS = 64
SLOT_WORDS = 64
NAME_BYTES = 136
"""Length byte pair and up to 128 bytes of UTF-8, padded to words."""
LATENCY_BUCKETS = 128

SUPERVISOR_SLOT, STORER_SLOT, FIRST_WORKER_SLOT = 0, 1, 2


class ConnectionState(enum.IntEnum):
    FREE = 0
    ACCEPTED = 1
    ASSIGNED = 2
    RELEASED = 3
    ENDED = 4
    HELLO = 5


class StreamState(enum.IntEnum):
    FREE = 0
    OPENING = 1
    OPEN = 2
    DRAINING = 3


class StreamFlag(enum.IntFlag):
    STORE = 1
    DROP_OLDEST = 2
    NAMED = 4
    """A client id from the configuration or a hello; without it the name was made from peer, port and time."""
    MPS = 8
    """Its client is told where it stands: another packet size is an error, not a new epoch."""
    NEW_EPOCH = 16
    """While OPENING: the client wants to begin anew, unless ASKED_EPOCH is the present one."""


class ConnectionFlag(enum.IntFlag):
    PAUSED = 1
    KICKED = 2
    QUARANTINED = 4
    """Its worker ends it without looking at what it sent."""


class CloseReason(enum.IntEnum):
    """Why a connection ended: journal word, metric label and index into the worker's CLOSED words."""

    NONE = 0
    ENDED = 1  # the client closed in the regular way
    RESET = 2  # RST
    TIMED_OUT = 3  # keepalive or retransmission gave up
    IDLE = 4  # idle_timeout_s
    SILENT = 5  # handshake_timeout_s
    KICKED = 6
    STOPPING = 7
    FAILED = 8  # any other errno
    QUARANTINED = 9
    SUPERSEDED = 10  # the same client came again
    REFUSED = 11  # its hello was refused; the counters of ERR say why

    @property
    def word(self) -> str:
        return self.name.lower().replace("_", "-")


class RefuseReason(enum.IntEnum):
    """Why a connection was refused at accept; index into the supervisor's REFUSED words."""

    NONE = 0
    MAX_CLIENTS = 1
    LISTENER_LIMIT = 2
    ADDRESS_LIMIT = 3
    DENIED = 4
    NO_DESCRIPTORS = 5
    STOPPING = 6
    NO_ROWS = 7
    QUARANTINED = 8
    DRAINING = 9

    @property
    def word(self) -> str:
        return self.name.lower().replace("_", "-")


class Con:
    """Columns of a connection row."""

    # supervisor
    STATE, COOKIE, STREAM, STREAM_NUMBER, LISTENER, WORKER, FLAGS, PEER_PORT = range(8)
    (
        PEER_HIGH,
        PEER_LOW,
        ACCEPTED_UNIX_NS,
        ACCEPTED_MONO_NS,
        OFFSET_AT_ATTACH,
        TRUNCATED_AT_ATTACH,
        SOCKET_AT_ATTACH,
        ADOPTIONS,
    ) = range(8, 16)
    # worker
    SOCKET_BYTES, _W1, LAST_RECEIVED_MONO_NS, REASON, ERRNO, BLOCKED = range(16, 22)
    # supervisor: length of the hello, and Str.HANDSHAKE before it; written before ASSIGNED
    HANDSHAKE_BYTES, HANDSHAKE_AT_ATTACH = range(22, 24)


class Str:
    """Columns of a stream row. Offsets are stream offsets in bytes."""

    # supervisor (STATE: see the table above)
    STATE, NUMBER, PACKET_SIZE, LISTENER, CONNECTION, FLAGS, EPOCH, CREATED_UNIX_NS = range(8)
    RATE_MILLI, RATE_POSITION, CLIENT_INDEX, ASKED_EPOCH, _S4, _S5, _S6, _S7 = range(8, 16)
    # worker
    POSITION, OFFERED, LET_GO, TRUNCATED, HANDSHAKE, SOCKET, LAST_RECEIVED_UNIX_NS, BLOCKED_COUNT = range(16, 24)
    HOLE0_FIRST, HOLE0_END, HOLE0_KIND, HOLE1_FIRST, HOLE1_END, HOLE1_KIND, CHECK_SELECT, LATENCY_MAX_NS = range(24, 32)
    CHECK0 = 32  # eight words, see Check
    CHECK1 = 40
    # storer; but ACKED, bytes acknowledged without holes, is the worker's as soon as the row is OPEN
    STORED, DURABLE, FIRST_OFFSET, DROPPED, LOST, CATALOG_ID, ACKED, STORED_HOLES = range(48, 56)
    STARTED_AT, DURABLE_MONO_NS, RETIRED, DURABLE_HOLES, _D4, _D5, _D6, _D7 = range(56, 64)


class Check:
    """Words of a check record; CHECK_SELECT says which of the two is valid, so that a kill never tears one."""

    CHECKED, LAST_SEQUENCE, SEQUENCE_KNOWN, GAPS, MISSING, REPEATS, REORDERED, _C7 = range(8)


class HoleKind(enum.IntEnum):
    DROPPED = 0
    LOST = 1


class Slot:
    """Columns of a child's slot; slot 0 is the supervisor's, 1 the storer's, then one a worker index."""

    # supervisor
    PID, LEASE, STATE, RESTARTS, STARTED_MONO_NS, CPU_MILLI, RSS_BYTES, RATE_MILLI = range(8)
    # the process itself
    HEARTBEAT_MONO_NS, CONNECTIONS, RECEIVED_BYTES, RECEIVED_PACKETS, RECEIVE_CALLS, WANTS, DOZING, PROGRESS_MONO_NS = (
        range(8, 16)
    )
    COUNTER = 16
    """First of the counters that the role names for itself (arena/counters.py)."""
    IN_HAND = 47
    """Worker: 1 + row of the connection that it is reading or checking just now; 0 for none."""
    REASONS = 48
    """First of 16 counters by CloseReason (worker) or RefuseReason (supervisor)."""


class Wants(enum.IntFlag):
    """What a worker wants of the storer, in its slot's WANTS word."""

    DURABLE = 1
    """Some stream is blocked, closing or owes an acknowledgement: ring me after the next commit."""
    PRESSURE = 2
    """Some stream has half of what it may hold waiting: the storer begins its next cycle at once."""


class Head:
    """Live words of the header page."""

    # supervisor
    NEXT_NUMBER = LIVE_WORD + 0
    NEXT_LEASE = LIVE_WORD + 1
    STARTED_UNIX_NS = LIVE_WORD + 2
    STARTED_MONO_NS = LIVE_WORD + 3
    STARVING = LIVE_WORD + 4  # a worker waits for chunks: the storer rings the supervisor when it frees some
    PHASE = LIVE_WORD + 5  # Phase
    ACTIVE_CONNECTIONS = LIVE_WORD + 6
    TOTAL_CONNECTIONS = LIVE_WORD + 7
    LEFT = LIVE_WORD + 8  # 1: the last supervisor left everything on purpose, which is no crash
    CRASH_COUNT = LIVE_WORD + 9
    CRASHES = LIVE_WORD + 10  # monotonic ns of the last CRASHES_KEPT takeovers after a crash, a ring
    # storer: totals of streams that are no longer in the table; odd while they change
    GONE_VERSION = LIVE_WORD + 16
    GONE = LIVE_WORD + 17


CRASHES_KEPT = 5


class Phase(enum.IntEnum):
    STARTING = 0
    SERVING = 1
    STOPPING = 2
    DRAINING = 3
    """No new connections are let in, by an operator's wish; the others go on."""


class Gone:
    """Words of the GONE block, relative to Head.GONE, in the order of ``Ledger`` totals."""

    (
        RECEIVED_BYTES,
        RECEIVED_PACKETS,
        STORED_BYTES,
        DURABLE_BYTES,
        ACKED_BYTES,
        TRUNCATED_BYTES,
        DROPPED_BYTES,
        LOST_BYTES,
        RETIRED_BYTES,
        HANDSHAKE_BYTES,
        UNSTORED_BYTES,
        SOCKET_BYTES,
        GAPS,
        MISSING_PACKETS,
        REPEATS,
        REORDERED,
        STREAMS,
        DROPPED_PACKETS,
        LOST_PACKETS,
    ) = range(19)
    COUNT = 19


class StateTable:
    """All rows. ``connections``, ``streams``, ``slots`` are 2-D u64 arrays; ``words`` a memoryview over everything.

    ``connection_base(i)``, ``stream_base(i)``, ``slot_base(i)`` give the index in ``words`` of a row's first word:
    ``state.words[state.stream_base(i) + Str.POSITION] = offset`` is one aligned store.
    """

    def __init__(self, fd: int, *, read_only: bool = False) -> None:
        shared = SharedWords(fd, magic=STATE_MAGIC, version=STATE_VERSION, what="state table", read_only=read_only)
        self.fd = fd
        self._shared = shared
        self.words = shared.words
        self.connection_count, self.stream_count, self.slot_count = (shared.geometry(i) for i in range(3))
        self._connections_at, self._streams_at, self._slots_at, names_at, latency_at, _ = _offsets(
            self.connection_count, self.stream_count, self.slot_count
        )
        self.connections = self._rows(self._connections_at, self.connection_count, CONNECTION_WORDS)
        self.streams = self._rows(self._streams_at, self.stream_count, STREAM_WORDS)
        self.slots = self._rows(self._slots_at, self.slot_count, SLOT_WORDS)
        self.latency = self._rows(latency_at, self.stream_count, LATENCY_BUCKETS)
        self._names_byte = names_at * WORD_BYTES
        self._latency_at = latency_at

    def _rows(self, at: int, count: int, width: int) -> npt.NDArray[np.uint64]:
        return self._shared.array[at : at + count * width].reshape(count, width)

    @classmethod
    def create(cls, *, connections: int, streams: int, slots: int) -> StateTable:
        """Make a zeroed table for so many rows. Raises StartError when the memory is not there."""
        words = _offsets(connections, streams, slots)[-1]
        fd = SharedWords.create(
            "mpserverd-state",
            round_up(words * WORD_BYTES, PAGE_BYTES),
            magic=STATE_MAGIC,
            version=STATE_VERSION,
            geometry=[connections, streams, slots],
        )
        return cls(fd)

    def connection_base(self, row: int) -> int:
        return self._connections_at + row * CONNECTION_WORDS

    def stream_base(self, row: int) -> int:
        return self._streams_at + row * STREAM_WORDS

    def latency_base(self, row: int) -> int:
        return self._latency_at + row * LATENCY_BUCKETS

    def slot_base(self, slot: int) -> int:
        return self._slots_at + slot * SLOT_WORDS

    def set_stream_name(self, row: int, name: str) -> None:
        """Supervisor (or the storer while OPENING): at most 128 bytes of UTF-8, before STATE is published."""
        encoded = name.encode()
        if len(encoded) > NAME_BYTES - 8:
            raise ValueError(f"stream name of {len(encoded)} bytes, at most {NAME_BYTES - 8}")
        at = self._names_byte + row * NAME_BYTES
        self._shared.map[at + 8 : at + 8 + len(encoded)] = encoded
        self.words[at // WORD_BYTES] = len(encoded)

    def stream_name(self, row: int) -> str:
        at = self._names_byte + row * NAME_BYTES
        length = min(self.words[at // WORD_BYTES], NAME_BYTES - 8)
        return self._shared.map[at + 8 : at + 8 + length].decode(errors="replace")

    def next_number(self, now_unix_ns: int) -> int:
        """Supervisor only: a stream number that was never used, also not by an earlier life of the daemon."""
        number = max(self.words[Head.NEXT_NUMBER], now_unix_ns // 1_000_000)
        self.words[Head.NEXT_NUMBER] = number + 1
        return number

    def next_lease(self) -> int:
        """Supervisor only: the incarnation number of a child, never reused in this table."""
        lease = self.words[Head.NEXT_LEASE] + 1
        self.words[Head.NEXT_LEASE] = lease
        return lease


def _offsets(connections: int, streams: int, slots: int) -> tuple[int, int, int, int, int, int]:
    """Word offsets of connections, streams, slots, names and latency buckets, and the total."""
    at = PAGE_BYTES // WORD_BYTES
    offsets = []
    for count, width in (
        (connections, CONNECTION_WORDS),
        (streams, STREAM_WORDS),
        (slots, SLOT_WORDS),
        (streams, NAME_BYTES // WORD_BYTES),
        (streams, LATENCY_BUCKETS),
    ):
        offsets.append(at)
        at += count * width
    connections_at, streams_at, slots_at, names_at, latency_at = offsets
    return connections_at, streams_at, slots_at, names_at, latency_at, at
