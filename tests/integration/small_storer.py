"""A storer for tests of the supervisor: moves offered bytes into one plain file a stream, and nothing else.

It follows the contract of the shared tables, so that workers and supervisor cannot tell. Environment of the process
decides what it does wrong: see ``Fault``.
"""

from __future__ import annotations

import enum
import os
import select
import socket
import time
from pathlib import Path
from typing import NoReturn

from mpserverd.arena.chunks import FREE, Arena
from mpserverd.arena.launch import Launch
from mpserverd.arena.state import (
    FIRST_WORKER_SLOT,
    Gone,
    Head,
    Slot,
    StateTable,
    Str,
    StreamFlag,
    StreamState,
    Wants,
)
from mpserverd.net.channel import Channel, Kind, Message

FAULT_VARIABLE = "SMALL_STORER_FAULT"


class Fault(enum.Enum):
    NONE = ""
    REFUSES = "refuses"  # says why and leaves with 1
    OPENS_LATE = "opens late"  # streams stay OPENING while the file `hold` is in the spool
    NEVER_DONE = "never done"  # nothing becomes durable


def run(launch: Launch) -> NoReturn:
    SmallStorer(launch).serve()
    os._exit(0)


class SmallStorer:
    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._state = StateTable(launch.state_fd)
        self._arena = Arena(launch.table_fd, launch.data_fd)
        self._channel = Channel(socket.socket(fileno=launch.channel_fd))
        self._spool = Path(launch.config.spool.path)
        self._fault = Fault(os.environ.get(FAULT_VARIABLE, ""))
        self._leaving = False

    def serve(self) -> None:
        if self._fault is Fault.REFUSES:
            self._channel.send(Message(Kind.EVENT, payload={"event": "spool", "text": "spool is not writable"}))
            os._exit(1)
        self._channel.send(Message(Kind.READY))
        poll = select.poll()
        poll.register(self._channel.fileno(), select.POLLIN)
        poll.register(self._launch.doorbell_fd, select.POLLIN)
        while True:
            self._beat()
            poll.poll(20)
            self._hush()
            self._obey()
            busy = self.cycle()
            if self._leaving and not busy:
                self._channel.send(Message(Kind.DRAINED))
                return

    def _beat(self) -> None:
        slot = self._state.slot_base(self._launch.slot)
        self._state.words[slot + Slot.HEARTBEAT_MONO_NS] = time.monotonic_ns()
        self._state.words[slot + Slot.PROGRESS_MONO_NS] = time.monotonic_ns()
        self._state.words[slot + Slot.DOZING] = 1

    def _hush(self) -> None:
        try:
            os.eventfd_read(self._launch.doorbell_fd)
        except BlockingIOError:
            return

    def _obey(self) -> None:
        while (message := self._channel.receive()) is not None:
            if message.kind is Kind.DETACH_ALL:
                os._exit(0)
            self._leaving |= message.kind is Kind.DRAIN

    def cycle(self) -> bool:
        """One look at every stream. True while some stream is still on its way."""
        busy = False
        for row in range(self._state.stream_count):
            state = StreamState(int(self._state.streams[row, Str.STATE]))
            if state is StreamState.OPENING:
                self._open(row)
            elif state in (StreamState.OPEN, StreamState.DRAINING):
                busy |= self._store(row, state)
        self._ring()
        return busy

    def _open(self, row: int) -> None:
        if self._fault is Fault.OPENS_LATE and (self._spool / "hold").exists():
            return
        file = self._spool / self._state.stream_name(row)
        at = file.stat().st_size if file.exists() else 0
        words = self._state.streams[row]
        words[[Str.POSITION, Str.OFFERED, Str.STORED, Str.DURABLE, Str.STARTED_AT]] = at
        words[Str.STATE] = StreamState.OPEN
        self._channel.send(Message(Kind.OPENED, row))

    def _store(self, row: int, state: StreamState) -> bool:
        words = self._state.streams[row]
        stored = bool(int(words[Str.FLAGS]) & StreamFlag.STORE)
        if stored:
            if self._fault is Fault.NEVER_DONE:
                return True
            self._write(row)
        if state is not StreamState.DRAINING:
            return True
        if stored and words[Str.DURABLE] != words[Str.POSITION]:
            return True
        for index in self._arena.table.used_by(int(words[Str.NUMBER])):
            self._arena.table.words_view[int(index)] = FREE
        for word, column in ((Gone.RECEIVED_BYTES, Str.POSITION), (Gone.DURABLE_BYTES, Str.DURABLE)):
            self._state.words[Head.GONE + word] += int(words[column]) if stored or column is Str.POSITION else 0
        words[Str.STATE] = StreamState.FREE
        self._channel.send(Message(Kind.FREED, row))
        return False

    def _write(self, row: int) -> None:
        words, table = self._state.streams[row], self._arena.table
        let_go, offered, durable = int(words[Str.LET_GO]), int(words[Str.OFFERED]), int(words[Str.DURABLE])
        chunks = table.used_by(int(words[Str.NUMBER]))
        if offered > durable:
            # At its own place: what a killed storer wrote and did not publish is written over.
            path = self._spool / self._state.stream_name(row)
            path.touch()
            with open(path, "r+b") as file:
                file.seek(durable)
                for index in chunks:
                    base = int(table.bases[index])
                    first, end = max(durable, base), min(offered, base + table.chunk_bytes)
                    if first < end and first >= int(table.firsts[index]):
                        at = int(index) * table.chunk_bytes - base
                        file.write(self._arena.data[at + first : at + end])
                        durable = end
            words[Str.STORED] = words[Str.DURABLE] = durable
        position = int(words[Str.POSITION])
        for index in chunks:
            end = int(table.bases[index]) + table.chunk_bytes
            let = int(table.serials[index]) <= let_go and min(end, position) <= durable
            if end <= durable or let:
                table.words_view[int(index)] = FREE

    def _ring(self) -> None:
        for at, bell in enumerate(self._launch.worker_doorbell_fds):
            slot = FIRST_WORKER_SLOT + at
            if int(self._state.slots[slot, Slot.WANTS]) & Wants.DURABLE:
                os.eventfd_write(bell, 1)
        if self._state.words[Head.STARVING]:
            os.eventfd_write(self._launch.supervisor_doorbell_fd, 1)
