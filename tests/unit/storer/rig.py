"""A storer's parts on real tables and a real directory, with this process in the roles of supervisor and worker.

Bytes go in through the worker's own window class; what is on disk is compared with what was sent by content.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import sqlite3
import time
from typing import Any

import numpy as np

from mpserverd.arena.chunks import FREE, Arena
from mpserverd.arena.counters import Role, column
from mpserverd.arena.launch import Launch
from mpserverd.arena.state import (
    FIRST_WORKER_SLOT,
    STORER_SLOT,
    Check,
    Gone,
    Head,
    HoleKind,
    Slot,
    StateTable,
    Str,
    StreamFlag,
    StreamState,
)
from mpserverd.arena.window import LeasePool, StreamWindow
from mpserverd.config.schema import BuffersConfig, ClientConfig, Config, ListenerConfig, SpoolConfig
from mpserverd.config.words import Sync
from mpserverd.storer.desk import open_desk
from mpserverd.storer.sampling import sample_streams
from mpserverd.storer.store import Store
from mpserverd.streams.sidecar import IDENTITY_FILE

CHUNK = 4096
LEASE = 7


def content(seed: int, first: int, end: int) -> bytes:
    """What the sender ``seed`` has at these offsets: different everywhere and for everyone."""
    numbers = np.arange(first, end, dtype=np.uint64) + np.uint64(seed * 7_919_000_003)
    return ((numbers * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)).astype(np.uint8).tobytes()


class Client:
    """A connection and its stream. ``sent`` is the stream offset after the last byte that it gave."""

    def __init__(self, rig: Tables, row: int, seed: int) -> None:
        self.rig = rig
        self.name = rig.state.stream_name(row)
        self.row = row
        self.base = rig.state.stream_base(row)
        self.seed = seed
        self.packet = self.word(Str.PACKET_SIZE)
        self.started_at = self.word(Str.POSITION)
        self.adopt()

    def word(self, col: int) -> int:
        return int(self.rig.state.words[self.base + col])

    def set(self, col: int, value: int) -> None:
        self.rig.state.words[self.base + col] = value

    def adopt(self) -> None:
        """As a fresh worker does."""
        self.window = StreamWindow(self.rig.state, self.rig.pool, self.row)
        self.window.adopt(self.word(Str.POSITION))

    @property
    def sent(self) -> int:
        return self.window.position

    def receive(self, length: int) -> int:
        """Bytes into the arena, as far as there is room; returns how many."""
        taken = 0
        while taken < length:
            places = self.window.room(length - taken)
            if not places:
                break
            for place in places:
                part = min(len(place), length - taken)
                place[:part] = content(self.seed, self.sent, self.sent + part)
                self.window.received(part)
                self.set(Str.SOCKET, self.word(Str.SOCKET) + part)
                taken += part
                if taken == length:
                    break
        return taken

    def offer(self, *, closing: bool = False) -> None:
        checked = self.sent - self.sent % self.packet
        select = self.word(Str.CHECK_SELECT) ^ 1
        self.set((Str.CHECK0, Str.CHECK1)[select] + Check.CHECKED, checked)
        self.set((Str.CHECK0, Str.CHECK1)[select] + Check.GAPS, checked // self.packet)
        self.set(Str.CHECK_SELECT, select)
        self.window.offer(checked, closing=closing)

    def send(self, length: int) -> None:
        """All of it must fit."""
        assert self.receive(length) == length, "the arena is full"
        self.offer()

    def send_all(self, length: int) -> None:
        """With the storer's help where the arena is too small."""
        while length:
            taken = self.receive(min(length, 8 * self.window.chunk_bytes))
            self.offer()
            length -= taken
            if length:
                self._step()

    def _step(self) -> None:
        assert isinstance(self.rig, Rig)
        self.rig.step()

    def end(self) -> None:
        """The connection is over: cut the partial packet, offer the rest, let go."""
        partial = self.sent % self.packet
        for _ in range(10):
            self.offer(closing=True)
            if self.window.offered == self.sent - partial:
                break
            self._step()
        else:
            raise AssertionError("the stream could not be closed")
        self._leave(partial)

    def leave(self) -> None:
        """``end`` for a stream that drops nothing: it needs no help of the storer."""
        self.offer(closing=True)
        self._leave(self.sent % self.packet)

    def _leave(self, partial: int) -> None:
        self.set(Str.TRUNCATED, self.word(Str.TRUNCATED) + partial)
        self.window.close(self.sent - partial)
        self.set(Str.STATE, StreamState.DRAINING)

    def state(self) -> StreamState:
        return StreamState(self.word(Str.STATE))


class Tables:
    """The shared tables, a spool's settings, the supervisor's and the worker's doings, and looks at what came of it."""

    def __init__(
        self,
        path: pathlib.Path,
        *,
        chunks: int = 64,
        chunk_bytes: int = CHUNK,
        segment_bytes: int = 64 << 10,
        rows: int = 16,
        sync: Sync = Sync.DURABLE,
        clients: tuple[ClientConfig, ...] = (),
        **spool: float,
    ) -> None:
        self.spool = path / "spool"
        settings: dict[str, object] = {"max_bytes": 0, "min_free_bytes": 0, **spool}
        self.config = Config(
            buffers=BuffersConfig(bytes=chunks * chunk_bytes, chunk_bytes=chunk_bytes),
            spool=SpoolConfig(path=str(self.spool), segment_bytes=segment_bytes, sync=sync, **settings),  # type: ignore[arg-type]
            clients=clients,
        )
        self.arena = Arena.create(size_bytes=chunks * chunk_bytes, chunk_bytes=chunk_bytes)
        self.state = StateTable.create(connections=rows, streams=rows, slots=4)
        self.state.words[Head.ACTIVE_CONNECTIONS] = 1
        self.pool = LeasePool(self.arena, self.state, LEASE)
        self.now_s = time.monotonic()
        self.clients: list[Client] = []
        self.listeners = {0: ListenerConfig()}

    def config_with(self, **changes: object) -> Config:
        return dataclasses.replace(self.config, **changes)  # type: ignore[arg-type]

    def close(self) -> None:
        for fd in (self.state.fd, self.arena.table.fd, self.arena.data_fd):
            os.close(fd)

    # -- supervisor

    def lease(self) -> None:
        self.arena.table.lease(LEASE, self.arena.count)
        self.pool.refresh()

    def take_row(
        self, name: str, packet: int, flags: StreamFlag, state: StreamState, *, epoch: int = 0, client_index: int = 0
    ) -> int:
        row = int(np.flatnonzero(self.state.streams[:, Str.STATE] == StreamState.FREE)[0])
        words = self.state.streams[row]
        words[:] = 0
        self.state.set_stream_name(row, name)
        words[Str.NUMBER] = self.state.next_number(time.time_ns())
        words[Str.PACKET_SIZE] = packet
        words[Str.FLAGS] = flags
        words[Str.EPOCH] = epoch or int.from_bytes(os.urandom(8), "big") | 1
        words[Str.CREATED_UNIX_NS] = time.time_ns()
        words[Str.CLIENT_INDEX] = client_index
        self.state.words[self.state.stream_base(row) + Str.STATE] = state
        return row

    def fresh(
        self, name: str = "peer", packet: int = 16, flags: StreamFlag = StreamFlag.STORE, seed: int | None = None
    ) -> Client:
        self.lease()
        row = self.take_row(name, packet, flags, StreamState.OPEN)
        self.clients.append(Client(self, row, len(self.clients) + 1 if seed is None else seed))
        return self.clients[-1]

    # -- what came of it

    def ask(self, question: str, *values: object) -> list[tuple[object, ...]]:
        with sqlite3.connect(self.spool / "catalog.sqlite") as connection:
            found = connection.execute(question, values).fetchall()
        connection.close()
        return found

    def one(self, question: str, *values: object) -> object:
        return self.ask(question, *values)[0][0]

    def stored(self, name: str) -> bytes:
        """Everything durable of the youngest stream of that name, as its files have it; holes are zeros."""
        number, directory, first, durable = self.ask(
            "SELECT id, directory, first_offset, durable FROM stream WHERE name = ? ORDER BY id DESC LIMIT 1", name
        )[0]
        result = bytearray(int(str(durable)))
        for start, end in self.ask("SELECT first, end FROM segment WHERE stream = ? ORDER BY first", number):
            file = self.spool / "streams" / str(directory) / f"{start:020d}.seg"
            begin, stop = int(str(start)), int(str(durable if end is None else end))
            data = file.read_bytes()[: stop - begin]
            assert len(data) == stop - begin, f"{file} is too short"
            result[begin:stop] = data
        return bytes(result[int(str(first)) :])

    def assert_stored(self, client: Client, name: str | None = None, upto: int | None = None) -> None:
        """The stream's files have what was sent, holes as zeros, by hash."""
        name = name or self.state.stream_name(client.row)
        end = client.sent - client.sent % client.packet if upto is None else upto
        wanted = bytearray(content(client.seed, 0, end))
        number = self.one("SELECT id FROM stream WHERE name = ? ORDER BY id DESC LIMIT 1", name)
        for first, stop in self.ask("SELECT first, end FROM hole WHERE stream = ?", number):
            a, b = int(str(first)), int(str(stop))
            wanted[a:b] = bytes(b - a)
        found = self.stored(name)
        assert len(found) == end
        assert hashlib.sha256(found).digest() == hashlib.sha256(wanted).digest(), first_difference(found, wanted)

    def files(self, pattern: str = "**/*") -> list[str]:
        """All but what directories say about themselves."""
        root = self.spool / "streams"
        found = (path for path in root.glob(pattern) if path.is_file() and path.name != IDENTITY_FILE)
        return sorted(str(path.relative_to(root)) for path in found)

    def gone(self, word: int) -> int:
        assert self.state.words[Head.GONE_VERSION] % 2 == 0
        return int(self.state.words[Head.GONE + word])

    def counter(self, name: str) -> int:
        return int(self.state.slots[STORER_SLOT, column(Role.STORER, name)])

    def free_chunks(self) -> int:
        """FREE and leased ones: none of them is any stream's."""
        self.pool.give_back(0)
        found = int(np.count_nonzero(self.arena.table.words == FREE))
        self.lease()
        return found


class Rig(Tables):
    """``step`` is one turn of the storer; ``restart`` is what kill -9 leaves, and a successor."""

    def __init__(self, path: pathlib.Path, **settings: Any) -> None:
        super().__init__(path, **settings)
        self.store = self.open()

    def open(self) -> Store:
        launch = Launch(
            role=Role.STORER,
            name="storer",
            index=0,
            slot=STORER_SLOT,
            lease=1,
            parent_pid=os.getppid(),
            config=self.config,
            listeners=self.listeners,
            state_fd=self.state.fd,
            table_fd=self.arena.table.fd,
            data_fd=self.arena.data_fd,
            channel_fd=-1,
            doorbell_fd=-1,
            supervisor_doorbell_fd=-1,
            storer_doorbell_fd=-1,
            worker_doorbell_fds=(),
        )
        self.desk = open_desk(launch, self.state, self.arena)
        store = Store(self.desk)
        store.recover()
        return store

    def close(self) -> None:
        self.store.close()
        super().close()

    def restart(self) -> None:
        """Nothing is put away; only this process's own descriptors are closed."""
        self.store.close()
        self.store = self.open()

    def named(
        self, name: str = "one", packet: int = 16, seed: int = 1, flags: StreamFlag = StreamFlag.STORE, **row: int
    ) -> Client:
        self.lease()
        number = self.take_row(name, packet, flags | StreamFlag.NAMED, StreamState.OPENING, **row)
        self.store.open_streams(self.now_s)
        self.clients.append(Client(self, number, seed))
        return self.clients[-1]

    # -- storer

    def step(self, *, urgent: bool = True) -> int:
        """Returns how many chunks were freed."""
        self.now_s = max(self.now_s + 0.1, self.store.failures.catalog_retry_s)
        self.store.open_streams(self.now_s)
        sample = sample_streams(self.state)
        ripe = self.store.cycle.ripe(sample, self.now_s, urgent=urgent)
        freed = self.store.cycle.run(sample, ripe, self.now_s) if len(ripe) else 0
        self.store.see_off(self.now_s)
        self.lease()
        return freed

    def steps(self, count: int = 20) -> None:
        for _ in range(count):
            self.step()


def break_file(rig: Rig, client: Client) -> str:
    """Every write to the stream's present segment fails from now on: its descriptor is read-only."""
    file = rig.desk.streams[client.row].segment
    assert file is not None
    broken = os.open(file.path, os.O_RDONLY)
    os.dup2(broken, file.fd)
    os.close(broken)
    return file.path


def first_difference(found: bytes, wanted: bytes | bytearray) -> str:
    a, b = np.frombuffer(found, np.uint8), np.frombuffer(bytes(wanted), np.uint8)
    wrong = np.flatnonzero(a != b)
    return f"{len(wrong)} bytes differ, from {wrong[0]} to {wrong[-1]}"


__all__ = ["CHUNK", "FIRST_WORKER_SLOT", "Client", "Gone", "HoleKind", "Rig", "Slot", "break_file", "content"]
