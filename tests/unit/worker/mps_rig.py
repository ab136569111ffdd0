"""A worker's view of one mps connection over real TCP: tables, arena, and both ends of the socket."""

from __future__ import annotations

import os
import socket

from mpserverd.arena.chunks import Arena
from mpserverd.arena.state import Con, ConnectionState, StateTable, Str, StreamFlag, StreamState
from mpserverd.arena.window import LeasePool
from mpserverd.net import tcp_info
from mpserverd.protocol.mps import Level
from mpserverd.worker.checker import Checker
from mpserverd.worker.connection import Connection

CHUNK = 4096
EPOCH = 0x1234
HELLO = b"MPS/1 plc-1 16\n"


class Rig:
    """``worker()`` takes the connection up as a fresh worker does; ``die`` forgets one without any goodbye."""

    def __init__(self, *, position: int = 0) -> None:
        self.arena = Arena.create(size_bytes=64 * CHUNK, chunk_bytes=CHUNK)
        self.state = StateTable.create(connections=2, streams=2, slots=3)
        for fd in (self.state.fd, self.arena.table.fd, self.arena.data_fd):
            os.close(fd)  # the maps keep what they need
        self.arena.table.lease(1, 64)
        self.base, self.con = self.state.stream_base(0), self.state.connection_base(0)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.client = socket.create_connection(listener.getsockname())
            self.server, _ = listener.accept()
        self.client.settimeout(5)
        words = self.state.words
        for column, value in (
            (Str.NUMBER, 5),
            (Str.PACKET_SIZE, 16),
            (Str.FLAGS, StreamFlag.STORE | StreamFlag.NAMED | StreamFlag.MPS),
            (Str.STATE, StreamState.OPEN),
            (Str.EPOCH, EPOCH),
            *((column, position) for column in (Str.POSITION, Str.OFFERED, Str.STORED, Str.DURABLE, Str.STARTED_AT)),
        ):
            words[self.base + column] = value
        for column, value in (
            (Con.STATE, ConnectionState.ASSIGNED),
            (Con.COOKIE, tcp_info.cookie(self.server)),
            (Con.STREAM_NUMBER, 5),
            (Con.OFFSET_AT_ATTACH, position),
            (Con.HANDSHAKE_BYTES, len(HELLO)),
        ):
            words[self.con + column] = value
        self.workers: list[Connection] = []

    def worker(self) -> Connection:
        sock = socket.socket(fileno=os.dup(self.server.fileno()))
        sock.setblocking(False)
        pool = LeasePool(self.arena, self.state, 1)
        connection = Connection(
            self.state, pool, 0, sock, lambda row: Checker(self.state, row, None, None), Level.DURABLE
        )
        self.workers.append(connection)
        return connection

    def word(self, column: int) -> int:
        return int(self.state.words[self.base + column])

    def make_durable(self, offset: int) -> None:
        """What the storer does after a commit."""
        for column in (Str.STORED, Str.DURABLE):
            self.state.words[self.base + column] = offset

    def close(self) -> None:
        for sock in (self.client, self.server, *(worker.sock for worker in self.workers)):
            sock.close()
