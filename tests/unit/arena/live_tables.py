"""Real shared tables for tests, written as the processes write them: the worker's side is the worker's own code
(arena/window.py), the storer's and the supervisor's are the few stores that docs/SYSTEM_ARCHITECTURE.md promises."""

from __future__ import annotations

import os
import time
from types import TracebackType
from typing import Any

import numpy as np

from mpserverd.arena.chunks import FREE, Arena, ChunkTable, used_word
from mpserverd.arena.counters import Role, column
from mpserverd.arena.ledger import Ledger, settle
from mpserverd.arena.live import LiveState
from mpserverd.arena.state import (
    FIRST_WORKER_SLOT,
    STORER_SLOT,
    SUPERVISOR_SLOT,
    Check,
    Con,
    ConnectionState,
    Gone,
    Head,
    Phase,
    Slot,
    StateTable,
    Str,
    StreamFlag,
    StreamState,
)
from mpserverd.arena.window import LeasePool, StreamWindow

CHUNK_BYTES = 4096
LEASE = 7
PEER_HIGH, PEER_LOW = 0, 0xFFFF_C000_0201  # ::ffff:192.0.2.1


class Stream:
    """One stream with an open connection, as its worker has it."""

    def __init__(self, tables: Tables, row: int, packet_size: int, handshake: int) -> None:
        self.tables, self.row, self.packet_size = tables, row, packet_size
        self.window = StreamWindow(tables.state, tables.pool, row)
        self.window.adopt(0)
        self.handshake = handshake
        self.words: Any = tables.state.streams[row]
        self.words[Str.HANDSHAKE] = handshake
        self.words[Str.SOCKET] = handshake
        self.closed = False

    @property
    def whole(self) -> int:
        return self.window.position - self.window.position % self.packet_size

    def receive(self, count: int) -> int:
        """As much of it as there is room for."""
        places = self.window.room(count)
        taken = min(count, sum(map(len, places)))
        if taken:
            self.window.received(taken)
            self.words[Str.SOCKET] = self.window.position + self.handshake
        return taken

    def offer(self) -> None:
        self.window.offer(self.whole)

    def drop(self) -> int:
        self.offer()
        return self.window.drop_oldest()

    def close(self) -> bool:
        """The connection ends, its partial packet is cut. False while a hole is in the way of the rest."""
        partial = self.window.position - self.whole
        self.window.offer(self.whole, closing=True)
        if self.window.offered != self.whole:
            return False
        self.words[Str.TRUNCATED] = partial
        self.window.close(self.whole)
        self.words[Str.STATE] = StreamState.DRAINING
        self.closed = True
        return True

    # -- the storer's side

    def write(self) -> None:
        """Written, not yet synced."""
        words = self.words
        offered, before = int(words[Str.OFFERED]), int(words[Str.STORED])
        words[Str.STORED_HOLES] += np.uint64(sum(end - first for first, end in self.holes() if before < end <= offered))
        words[Str.STORED] = offered

    def commit(self) -> None:
        """Synced and committed; what is durable is freed."""
        words = self.words
        stored, before = int(words[Str.STORED]), int(words[Str.DURABLE])
        passed = np.uint64(sum(end - first for first, end in self.holes() if before < end <= stored))
        words[Str.DROPPED] += passed
        words[Str.DURABLE_HOLES] += passed
        words[Str.DURABLE] = stored
        self.tables.free_durable(self)

    def holes(self) -> list[tuple[int, int]]:
        words = self.words
        pairs = ((Str.HOLE0_FIRST, Str.HOLE0_END), (Str.HOLE1_FIRST, Str.HOLE1_END))
        return [(int(words[a]), int(words[b])) for a, b in pairs if words[b] > words[a]]


class Tables:
    """A state table and an arena. Use as a context manager."""

    def __init__(self, *, chunks: int = 32, streams: int = 8, connections: int = 8, slots: int = 6) -> None:
        self.arena = Arena.create(size_bytes=chunks * CHUNK_BYTES, chunk_bytes=CHUNK_BYTES)
        self.state = StateTable.create(connections=connections, streams=streams, slots=slots)
        self.arena.table.lease(LEASE, chunks)
        self.pool = LeasePool(self.arena, self.state, LEASE)
        self.facts: dict[str, Any] = {
            "version": "0.0.1",
            "pid": 4711,
            "uptime_s": 12.5,
            "max_clients": connections,
            "spool": "/spool",
            "listeners": {
                "1": {
                    "name": "raw",
                    "address": "127.0.0.1:8888",
                    "protocol": "raw",
                    "packet_size": 16,
                    "layout": None,
                    "store": True,
                    "on_full": "drop-oldest",
                }
            },
            "workers": [
                {"index": i, "pid": 100 + i, "state": "running", "restarts": i, "slot": FIRST_WORKER_SLOT + i}
                for i in range(2)
            ],
            "storer": {"pid": 99, "state": "running", "restarts": 0, "slot": STORER_SLOT},
        }
        self.state.words[Head.PHASE] = Phase.SERVING
        self.beat()
        self.look_at_spool()

    def __enter__(self) -> Tables:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for fd in (self.state.fd, self.arena.table.fd, self.arena.data_fd):
            os.close(fd)

    @property
    def table(self) -> ChunkTable:
        return self.arena.table

    def look_at_spool(self, free_bytes: int = 1 << 30) -> None:
        """What the storer says of it."""
        self.state.slots[STORER_SLOT, column(Role.STORER, "free_bytes")] = free_bytes

    def beat(self) -> None:
        for slot in (SUPERVISOR_SLOT, STORER_SLOT, *(worker["slot"] for worker in self.facts["workers"])):
            self.state.slots[slot, Slot.HEARTBEAT_MONO_NS] = time.monotonic_ns()

    def live(self) -> LiveState:
        """What a tool sees: maps of its own, read-only."""
        state = StateTable(self.state.fd, read_only=True)
        return LiveState(self.facts, state, ChunkTable(self.table.fd, read_only=True))

    def ledger(self, tries: int = 0) -> Ledger:
        return settle(self.state, self.table, lambda number: None, tries)

    def open(
        self,
        row: int,
        *,
        name: str = "",
        packet_size: int = 16,
        flags: StreamFlag = StreamFlag.STORE | StreamFlag.DROP_OLDEST,
        handshake: int = 0,
    ) -> Stream:
        words = self.state.streams[row]
        words[:] = 0
        self.state.latency[row] = 0
        self.state.set_stream_name(row, name or f"stream-{row}")
        words[Str.NUMBER] = self.state.next_number(time.time_ns())
        words[Str.PACKET_SIZE] = packet_size
        words[Str.LISTENER] = 1
        words[Str.FLAGS] = flags
        words[Str.STATE] = StreamState.OPEN
        return Stream(self, row, packet_size, handshake)

    def connect(self, row: int, stream: Stream | None, *, worker: int = 0, port: int = 5000) -> None:
        words = self.state.connections[row]
        words[:] = 0
        words[Con.LISTENER] = 1
        words[Con.PEER_HIGH], words[Con.PEER_LOW], words[Con.PEER_PORT] = PEER_HIGH, PEER_LOW, port
        words[Con.ACCEPTED_MONO_NS] = time.monotonic_ns()
        words[Con.STATE] = ConnectionState.ACCEPTED
        if stream is not None:
            words[Con.STREAM], words[Con.STREAM_NUMBER] = stream.row, stream.words[Str.NUMBER]
            words[Con.OFFSET_AT_ATTACH] = stream.words[Str.POSITION]
            words[Con.WORKER] = worker
            words[Con.STATE] = ConnectionState.ASSIGNED
        self.state.words[Head.ACTIVE_CONNECTIONS] += 1
        self.state.words[Head.TOTAL_CONNECTIONS] += 1

    def set_check(self, stream: Stream, **counts: int) -> None:
        select = int(stream.words[Str.CHECK_SELECT]) ^ 1
        base = (Str.CHECK0, Str.CHECK1)[select]
        for name, count in counts.items():
            stream.words[base + getattr(Check, name.upper())] = count
        stream.words[Str.CHECK_SELECT] = select

    def free_durable(self, stream: Stream) -> None:
        words, table = stream.words, self.table
        durable, let_go, position = int(words[Str.DURABLE]), int(words[Str.LET_GO]), int(words[Str.POSITION])
        for index in table.used_by(int(words[Str.NUMBER])):
            end = int(table.bases[index]) + CHUNK_BYTES
            if end <= durable or (table.serials[index] <= let_go and min(end, position) <= durable):
                table.words[index] = FREE
        self.lease_free()

    def lease_free(self) -> None:
        """The supervisor leases whatever is free; the worker looks."""
        self.table.lease(LEASE, self.table.count)
        self.pool.refresh()

    def evict(self, stream: Stream) -> None:
        """DRAINING to FREE: its totals go to GONE in the same step."""
        state, words = self.state, stream.words
        check = (Str.CHECK0, Str.CHECK1)[int(words[Str.CHECK_SELECT])]
        lost = int(words[Str.LOST])
        received = int(words[Str.POSITION]) - lost
        kept = bool(int(words[Str.FLAGS]) & StreamFlag.STORE)
        totals = {
            Gone.RECEIVED_BYTES: received,
            Gone.RECEIVED_PACKETS: received // stream.packet_size,
            Gone.STORED_BYTES: int(words[Str.STORED]) - int(words[Str.STORED_HOLES]),
            Gone.DURABLE_BYTES: int(words[Str.DURABLE]) - int(words[Str.DURABLE_HOLES]),
            Gone.TRUNCATED_BYTES: int(words[Str.TRUNCATED]),
            Gone.DROPPED_BYTES: int(words[Str.DROPPED]),
            Gone.DROPPED_PACKETS: int(words[Str.DROPPED]) // stream.packet_size,
            Gone.LOST_BYTES: lost,
            Gone.LOST_PACKETS: lost // stream.packet_size,
            Gone.HANDSHAKE_BYTES: int(words[Str.HANDSHAKE]),
            Gone.UNSTORED_BYTES: 0 if kept else int(words[Str.OFFERED]),
            Gone.SOCKET_BYTES: int(words[Str.SOCKET]),
            Gone.GAPS: int(words[check + Check.GAPS]),
            Gone.STREAMS: 1,
        }
        state.words[Head.GONE_VERSION] += 1
        for word, value in totals.items():
            state.words[Head.GONE + word] += value
        words[Str.STATE] = StreamState.FREE
        state.words[Head.GONE_VERSION] += 1
        self.table.words[self.table.words == np.uint64(used_word(int(words[Str.NUMBER])))] = FREE
        self.lease_free()
