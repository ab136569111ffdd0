"""A real worker in this process, without its loop: tables, arena, one raw connection over TCP, and a small storer.

``killed_at`` ends a call between any two of its lines, as kill -9 would: nothing is tidied up, and a successor finds
what is in the tables.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import select
import socket
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

from mpserverd.arena.chunks import Arena
from mpserverd.arena.counters import Role
from mpserverd.arena.launch import Launch
from mpserverd.arena.state import (
    FIRST_WORKER_SLOT,
    STORER_SLOT,
    CloseReason,
    Con,
    ConnectionState,
    Slot,
    StateTable,
    Str,
    StreamFlag,
    StreamState,
)
from mpserverd.config.schema import Config, ListenerConfig, SpoolConfig
from mpserverd.net import tcp_info
from mpserverd.net.channel import Channel, Kind, Message
from mpserverd.worker.main import Worker
from tests.integration.small_storer import SmallStorer

CHUNK = 4096
PACKET = 16
NUMBER = 5
NAME = "stream"


class Killed(BaseException):
    """Not an Exception: nothing may handle it."""


def killed_at(point: int, where: set[CodeType], call: Callable[[], object]) -> bool:
    """Run ``call``, and end it before the ``point``-th line that it reaches in ``where``. False when it has fewer."""
    reached = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal reached
        if frame.f_code not in where:
            return None
        if event == "line":
            reached += 1
            if reached == point:
                raise Killed
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Killed:
        return True
    finally:
        sys.settrace(before)
    return False


class WorkerRig:
    """Row 0 of connections and streams are in use. ``worker()`` makes one that has taken the connection up."""

    def __init__(self, directory: pathlib.Path, flags: StreamFlag = StreamFlag.STORE) -> None:
        self.arena = Arena.create(size_bytes=64 * CHUNK, chunk_bytes=CHUNK)
        self.state = StateTable.create(connections=2, streams=2, slots=4)
        self.base, self.con = self.state.stream_base(0), self.state.connection_base(0)
        self._ends: list[socket.socket] = []
        self._bells = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)]
        self._config = Config(spool=SpoolConfig(path=str(directory)))
        self._directory = directory
        self.workers: list[Worker] = []
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.client = socket.create_connection(listener.getsockname(), timeout=5)
            self.server, _ = listener.accept()
        self._fill(flags)
        self.storer = SmallStorer(self._launch(Role.STORER, STORER_SLOT, 1))

    def _fill(self, flags: StreamFlag) -> None:
        self.state.set_stream_name(0, NAME)
        for column, value in ((Str.NUMBER, NUMBER), (Str.PACKET_SIZE, PACKET), (Str.FLAGS, flags)):
            self.state.words[self.base + column] = value
        self.state.words[self.base + Str.STATE] = StreamState.OPEN
        for column, value in (
            (Con.COOKIE, tcp_info.cookie(self.server)),
            (Con.STREAM_NUMBER, NUMBER),
            (Con.STATE, ConnectionState.ASSIGNED),
        ):
            self.state.words[self.con + column] = value

    def _launch(self, role: Role, slot: int, lease: int) -> Launch:
        ours, theirs = Channel.pair()
        self._ends.append(ours)
        return Launch(
            role=role,
            name=role.value,
            index=0,
            slot=slot,
            lease=lease,
            parent_pid=os.getpid(),
            config=self._config,
            listeners={0: ListenerConfig(name="raw", packet_size=PACKET)},
            state_fd=self.state.fd,
            table_fd=self.arena.table.fd,
            data_fd=self.arena.data_fd,
            channel_fd=theirs.detach(),
            doorbell_fd=self._bells[0],
            supervisor_doorbell_fd=self._bells[1],
            storer_doorbell_fd=self._bells[2],
            worker_doorbell_fds=(self._bells[0],),
        )

    def worker(self) -> Worker:
        """A fresh one; what the one before it had leased is free again."""
        lease = len(self.workers) + 2
        self.arena.table.revoke(lease - 1)
        self.arena.table.lease(lease, 32)
        worker = Worker(self._launch(Role.WORKER, FIRST_WORKER_SLOT, lease))
        self.workers.append(worker)
        self.obey(worker, Message(Kind.ATTACH, fd=os.dup(self.server.fileno())))
        self._ends += [connection.sock for connection in worker._by_fd.values()]
        return worker

    @staticmethod
    def obey(worker: Worker, message: Message) -> None:
        worker._obey(message)

    @staticmethod
    def read(worker: Worker) -> None:
        """As the loop does when its sockets are readable."""
        for connection in list(worker._by_fd.values()):
            worker._read(connection)

    @staticmethod
    def handle(worker: Worker, events: int) -> None:
        """An event for each of its sockets."""
        for fd in list(worker._by_fd):
            worker._handle(fd, events)

    def send(self, content: bytes) -> None:
        """To the worker's socket; nothing when that has been shut down."""
        with contextlib.suppress(OSError):
            self.client.sendall(content)
            select.select([self.server], [], [], 5)

    def word(self, column: int) -> int:
        return int(self.state.words[self.base + column])

    def row(self, column: int) -> int:
        return int(self.state.words[self.con + column])

    @property
    def is_over(self) -> bool:
        return self.row(Con.STATE) == ConnectionState.ENDED

    def closed(self, reason: CloseReason) -> int:
        """How many ends of that reason are counted."""
        return int(self.state.slots[FIRST_WORKER_SLOT, Slot.REASONS + reason])

    def stored(self) -> bytes:
        """Let the storer do its work; what is in its file then."""
        self.storer.cycle()
        file = self._directory / NAME
        return file.read_bytes() if file.exists() else b""

    def close(self) -> None:
        for process in (self.storer, *self.workers):
            process._channel.close()
        for worker in self.workers:
            worker._epoll.close()
        for sock in (self.client, self.server, *self._ends):
            sock.close()
        for fd in (*self._bells, self.state.fd, self.arena.table.fd, self.arena.data_fd):
            os.close(fd)
        self.workers.clear()
