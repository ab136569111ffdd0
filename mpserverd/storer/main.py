"""The storer process: the only one that writes files and the catalog.

The loop looks at the tables, runs a cycle when one is due, sees streams off, does housekeeping once a second, and
sleeps. ``commit_interval_s`` is the least time between the beginnings of two cycles, unless half of the arena waits.
It sets DOZING, looks once more, and only then sleeps with nothing to do, so that no offer is overlooked.

The heartbeat is a thread of its own: a disk that hangs makes the storer late, not dead.
"""

from __future__ import annotations

import gc
import logging
import os
import select
import socket
import sys
import threading
import time
from typing import NoReturn

from mpserverd import log
from mpserverd.arena.chunks import Arena
from mpserverd.arena.launch import Launch
from mpserverd.arena.state import FIRST_WORKER_SLOT, Slot, StateTable, Str, StreamState
from mpserverd.errors import MpserverdError
from mpserverd.net.channel import Channel, Kind, Message
from mpserverd.storer.advice import advice
from mpserverd.storer.committing import ring, ring_workers, supervisor_starves
from mpserverd.storer.desk import open_desk
from mpserverd.storer.live import EVENT_CHARACTERS_MAX, Desk
from mpserverd.storer.sampling import sample_streams
from mpserverd.storer.store import Store

logger = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
TICK_S = 1.0
LOOK_S = 0.1
"""While something waits that is not due: so often it is looked at again."""
SWITCH_INTERVAL_S = 50e-6
UMASK = 0o027
GARBAGE_OBJECTS = 50_000
"""A cycle makes some objects a stream and leaves none; the collector need not look after each."""


def run(launch: Launch) -> NoReturn:
    """Serve until DRAIN or DETACH_ALL is done. Never returns: the caller forked."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.freeze()  # what the supervisor made is never garbage here
    gc.set_threshold(GARBAGE_OBJECTS)
    os.umask(UMASK)
    os._exit(Storer(launch).serve())


class Storer:
    """The loop's own state; what a successor needs is in the tables and in the catalog."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._state = StateTable(launch.state_fd)
        self._words = self._state.words
        self._slot = self._state.slot_base(launch.slot)
        self._channel = Channel(socket.socket(fileno=launch.channel_fd))
        self._epoll = select.epoll()
        self._epoll.register(self._channel.fileno(), select.EPOLLIN)
        self._epoll.register(launch.doorbell_fd, select.EPOLLIN)
        self._interval_s = launch.config.spool.commit_interval_s
        self._next_cycle_s = 0.0
        self._next_tick_s = 0.0
        self._idle = False
        self._draining = False
        self._leaving = False

    def serve(self) -> int:
        """Returns the exit code."""
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        try:
            desk = open_desk(self._launch, self._state, Arena(self._launch.table_fd, self._launch.data_fd))
            store = Store(desk)
            store.recover()
        except MpserverdError as error:
            return self._refuse(str(error))
        except OSError as error:
            return self._refuse(advice(error))
        desk.outbox.append(Message(Kind.READY))
        while not self._leaving:
            self._turn(desk, store)
            self._flush(desk)
            if not self._leaving:
                self._wait(desk, store)
        store.close()
        desk.outbox.append(Message(Kind.DRAINED))
        self._flush(desk, patience_s=1.0)
        return 0

    def _beat(self) -> None:
        while True:
            self._words[self._slot + Slot.HEARTBEAT_MONO_NS] = time.monotonic_ns()
            time.sleep(HEARTBEAT_S)

    def _refuse(self, text: str) -> int:
        log.event(logger, logging.ERROR, "storer cannot start", reason=text)
        self._channel.send(
            Message(Kind.EVENT, payload={"event": "storer cannot start", "text": text[:EVENT_CHARACTERS_MAX]})
        )
        return 1

    # -- one turn

    def _turn(self, desk: Desk, store: Store) -> None:
        now_s = time.monotonic()
        self._words[self._slot + Slot.PROGRESS_MONO_NS] = time.monotonic_ns()
        opened = store.open_streams(now_s)
        freed = self._store_what_is_due(desk, store, now_s)
        ended = store.see_off(now_s)
        if now_s >= self._next_tick_s:
            self._next_tick_s = now_s + TICK_S
            store.tick(now_s)
            freed += store.cycle.free_idle()
        if opened or ended or (freed > 0 and supervisor_starves(desk)):
            ring(self._launch.supervisor_doorbell_fd)
        if self._draining and not sample_streams(self._state).pending.any():
            self._leaving = store.put_everything_away()

    def _store_what_is_due(self, desk: Desk, store: Store, now_s: float) -> int:
        """Run a cycle if it is time for one. Returns how many chunks were freed."""
        sample = sample_streams(self._state)
        self._idle = not sample.pending.any()
        due = self._draining or store.cycle.more or now_s >= self._next_cycle_s
        if self._idle or not (due or store.cycle.pressed()):
            return 0
        ripe = store.cycle.ripe(sample, now_s, urgent=self._draining or self._workers_wait())
        if not len(ripe):
            self._next_cycle_s = now_s + min(LOOK_S, self._interval_s)
            return 0
        self._next_cycle_s = now_s + self._interval_s
        freed = store.cycle.run(sample, ripe, now_s)
        ring_workers(desk, self._launch.worker_doorbell_fds)
        return freed

    def _workers_wait(self) -> bool:
        """Some worker is pressed, or wants to hear of a commit."""
        return bool(self._state.slots[FIRST_WORKER_SLOT:, Slot.WANTS].any())

    # -- waiting

    def _wait(self, desk: Desk, store: Store) -> None:
        now_s = time.monotonic()
        until_s = self._next_tick_s
        doze = self._idle and now_s >= self._next_cycle_s
        if store.more:
            until_s = now_s
        elif not doze:  # under steady traffic nobody need ring: the next look is when the next cycle is due
            until_s = min(until_s, self._next_cycle_s)
        else:
            self._words[self._slot + Slot.DOZING] = 1
            if self._something_to_do():
                until_s = min(until_s, max(now_s, store.failures.catalog_retry_s))
        if desk.outbox:
            until_s = min(until_s, now_s + LOOK_S)
        events = self._epoll.poll(max(0.0, until_s - now_s))
        if doze:
            self._words[self._slot + Slot.DOZING] = 0
        for descriptor, _ in events:
            if descriptor == self._launch.doorbell_fd:
                self._hush()
            else:
                self._listen()

    def _something_to_do(self) -> bool:
        states = self._state.streams[:, Str.STATE]
        if ((states == StreamState.OPENING) | (states == StreamState.DRAINING)).any():
            return True
        return bool(sample_streams(self._state).pending.any())

    def _hush(self) -> None:
        try:
            os.eventfd_read(self._launch.doorbell_fd)
        except BlockingIOError:
            return

    # -- the supervisor

    def _listen(self) -> None:
        while True:
            try:
                message = self._channel.receive()
            except EOFError:
                os._exit(0)  # the supervisor is gone: its successor starts another storer
            if message is None:
                return
            if message.kind is Kind.DRAIN:
                self._draining = True
            elif message.kind is Kind.DETACH_ALL:
                self._leaving = True
            elif message.kind is Kind.LOG_LEVEL and message.payload:
                log.set_level(message.payload["level"])
            elif message.kind is Kind.REOPEN_LOG:
                log.reopen()

    def _flush(self, desk: Desk, patience_s: float = 0.0) -> None:
        deadline_s = time.monotonic() + patience_s
        while desk.outbox:
            try:
                sent = self._channel.send(desk.outbox[0])
            except OSError:
                os._exit(0)
            if sent:
                desk.outbox.popleft()
            elif time.monotonic() >= deadline_s:
                return
            else:
                self._channel.await_room(LOOK_S)
