"""What an earlier supervisor left in systemd's store: looked through at the start, then taken up or thrown away.

Rules: memory is used only when every part is there and its layout is understood (arena/layouts.py); otherwise all of it
is dropped, and what is lost with it is said. Five crashes within a minute mean that the memory itself may be the cause:
it is dropped too. Listeners hold nothing and are kept in any case, so no client is refused.

Nothing here decides what becomes of a connection (``Connections.take_up``), or of the memory's size (moving.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import select
import socket
import stat
import time

import numpy as np

from mpserverd import log
from mpserverd.arena.chunks import LEASED, Arena
from mpserverd.arena.layouts import CONNECTIONS, STREAMS, StateMemory
from mpserverd.arena.state import (
    CRASHES_KEPT,
    FIRST_WORKER_SLOT,
    ConnectionState,
    Slot,
    StateTable,
    StreamFlag,
    StreamState,
)
from mpserverd.errors import LayoutError, MpserverdError, StartError
from mpserverd.net import tcp_info
from mpserverd.supervisor.carrier import Carrier, CarrierFullError
from mpserverd.supervisor.fd_store import FdStore, claim
from mpserverd.supervisor.keeping import LISTENER_PREFIX, carrier_names, carrier_number
from mpserverd.supervisor.stored_memory import FACTS, StoredMemory, memory_generation

logger = logging.getLogger(__name__)

CRASH_WINDOW_S = 60.0
BARRIER_S = 5.0
"""systemd answers within milliseconds."""
CRASHES_MAX_VARIABLE = "MPSERVERD_CRASHES_MAX"
"""0 switches the safe start off, for tests that kill the supervisor many times a minute."""
_FREE = 0


class TooManyCrashesError(MpserverdError):
    """The last supervisors died in quick succession."""


@dataclasses.dataclass(eq=False, slots=True)
class Inheritance:
    """Everything that waited. ``memory`` is None at a first start, or when it was thrown away.

    Of ``carriers`` the newest comes first; their ends are owned here until they are handed to Keeping.
    """

    memory: StoredMemory | None = None
    listeners: dict[str, socket.socket] = dataclasses.field(default_factory=dict)
    carriers: list[tuple[int, Carrier]] = dataclasses.field(default_factory=list)
    next_number: int = 1
    """For carriers made from now on: no name is used twice."""

    def close_listeners(self) -> None:
        """Close those that nobody took."""
        for sock in self.listeners.values():
            sock.close()
        self.listeners.clear()


def look_through(fds: dict[str, list[int]], store: FdStore, now_ns: int) -> Inheritance:
    """Sort what systemd handed over; unknown names are a socket unit's and left alone."""
    found = Inheritance()
    memory: dict[str, int] = {}
    ends: dict[int, dict[str, int]] = {}
    ours = set()
    for name, several in fds.items():
        number = carrier_number(name)
        if number is not None:
            ends.setdefault(number, {})[name] = several[0]
        elif (name == FACTS or memory_generation(name)) and stat.S_ISREG(os.fstat(several[0]).st_mode):
            memory[name] = several[0]
        elif name.startswith(LISTENER_PREFIX):
            found.listeners[name.removeprefix(LISTENER_PREFIX)] = socket.socket(fileno=several[0])
        else:
            continue
        ours.add(name)
        for extra in several[1:]:
            os.close(extra)
    claim(ours)
    found.next_number = max(ends, default=0) + 1
    found.carriers = whole_carriers(ends, store)
    if memory or found.carriers:
        _open_memory(found, memory, store, now_ns)
    return found


def whole_carriers(ends: dict[int, dict[str, int]], store: FdStore) -> list[tuple[int, Carrier]]:
    """From the ends by number and name, the newest first.

    One end alone means that the supervisor died between its two pushes: an older carrier holds everything, and the end
    must not stay, since the store's places are few and it says nothing when they are used up.
    """
    found = []
    for number in sorted(ends, reverse=True):
        if len(ends[number]) == len(carrier_names(number)):
            found.append((number, Carrier.from_store(ends[number][name] for name in carrier_names(number))))
            continue
        for name, fd in ends[number].items():
            os.close(fd)
            store.remove(name)
    return found


def _open_memory(found: Inheritance, fds: dict[str, int], store: FdStore, now_ns: int) -> None:
    try:
        found.memory = StoredMemory.open(fds, store)
        _judge_crashes(found.memory.state, now_ns)
    except (LayoutError, TooManyCrashesError) as error:
        discard(found, store, error, fds)
    except Exception as error:
        # Whatever stands there: until the crash is counted, an error here would come at every start, for ever.
        why = LayoutError(f"what was stored cannot be understood: {type(error).__name__}: {error}")
        discard(found, store, why, fds)


def discard(found: Inheritance, store: FdStore, why: Exception, fds: dict[str, int] | None = None) -> None:
    """Clients see their connections end, and come back. ``fds`` are the memory's, where it could not be opened."""
    log.event(
        logger,
        logging.ERROR,
        "stored sockets and state discarded",
        message_id=log.MessageId.SAFE_START,
        why=str(why),
        lost=_what_is_lost(found.memory),
    )
    fds = found.memory.fds if found.memory is not None else fds or {}
    found.memory = None
    for _, carrier in found.carriers:
        for _, fd in carrier.take_all():
            with contextlib.suppress(OSError), socket.socket(fileno=fd) as sock:
                sock.shutdown(socket.SHUT_RDWR)  # whoever holds a dup: the client learns of it now
    for number, carrier in found.carriers:
        carrier.close()
        for name in carrier_names(number):
            store.remove(name)
    found.carriers.clear()
    for name, fd in fds.items():
        os.close(fd)
        store.remove(name)


def _judge_crashes(state: StateMemory, now_ns: int) -> None:
    """Note this crash, if it was one. Raises TooManyCrashesError."""
    left, crash_count, crashes = (state.head_words(name) for name in ("LEFT", "CRASH_COUNT", "CRASHES"))
    if left[0]:
        left[0] = 0
        return
    count = int(crash_count[0])
    crashes[count % CRASHES_KEPT] = now_ns
    crash_count[0] = count + 1
    oldest_ns = int(crashes[(count + 1) % CRASHES_KEPT])
    wanted = os.environ.get(CRASHES_MAX_VARIABLE, "") != "0"
    if wanted and count + 1 >= CRASHES_KEPT and now_ns - oldest_ns < CRASH_WINDOW_S * 1e9:
        raise TooManyCrashesError(f"the supervisor crashed {CRASHES_KEPT} times within {CRASH_WINDOW_S:.0f} s")


def _what_is_lost(memory: StoredMemory | None) -> str:
    """As far as the memory that is given up can still be read."""
    with contextlib.suppress(Exception):
        if memory is not None:
            return _lost_of(memory.state)
    return "every connection, and what was not durable"


def _lost_of(state: StateMemory) -> str:
    active = int((state.column(CONNECTIONS, "STATE") != ConnectionState.FREE).sum())
    streams = state.column(STREAMS, "STATE") != StreamState.FREE
    waiting = state.column(STREAMS, "POSITION").astype(np.int64) - state.column(STREAMS, "DURABLE").astype(np.int64)
    stored = (state.column(STREAMS, "FLAGS") & np.uint64(StreamFlag.STORE)) != 0
    return f"{active} connections, {int(waiting[streams & stored].sum())} bytes that were not durable"


def free_leases(arena: Arena) -> None:
    """Every child is dead: what was leased to one is free again."""
    words = arena.table.words
    words[(words & 3) == LEASED] = _FREE


def clear_slots(state: StateTable) -> None:
    """Nobody has a slot; what counts up goes on from where it stood."""
    state.slots[:, [Slot.PID, Slot.STATE, Slot.CONNECTIONS, Slot.WANTS, Slot.DOZING, Slot.RATE_MILLI]] = 0
    state.slots[:, [Slot.CPU_MILLI, Slot.RSS_BYTES]] = 0
    state.slots[FIRST_WORKER_SLOT:, Slot.IN_HAND] = 0


class Unloading:
    """Moves what the old carriers hold into fresh ones that the store has already.

    A descriptor leaves an old carrier only after it is in a fresh one. Mostly one is enough; but messages are moved as
    they are, so many connections that were added one by one, live ones and ended ones, may need another.
    """

    def __init__(self, store: FdStore, carriers: list[tuple[int, Carrier]], next_number: int) -> None:
        self._store = store
        self._old = carriers
        self.next_number = next_number
        """For carriers made from now on."""
        self.fds: dict[int, int] = {}
        """Descriptor by cookie, doubles dropped; the caller owns them."""

    def run(self) -> list[tuple[int, Carrier]]:
        """The fresh carriers and their numbers, the oldest first; none when there was nothing. Raises StartError when
        the store does not answer: everything waits for the next start."""
        waiting = [(number, old) for number, old in self._old if not self._drop_empty(number, old)]
        fresh = [self._fresh()] if waiting else []
        for number, old in waiting:
            while not self._try_empty(old, fresh[-1][1]):
                fresh.append(self._fresh())
            self._drop_empty(number, old)
        return fresh

    def _drop_empty(self, number: int, old: Carrier) -> bool:
        """At once: starts that are killed, one after another, must not use up the places of the store, which says
        nothing when it has none left."""
        if old.is_empty:
            for name in carrier_names(number):
                self._store.remove(name)
            old.close()
            return True
        return False

    def _try_empty(self, old: Carrier, fresh: Carrier) -> bool:
        """False when ``fresh`` is full. Raises CarrierFullError when not even an empty one takes the next message."""
        was_empty = fresh.is_empty
        try:
            for cookie, fd in fresh.refill_from(old, lambda cookie: cookie not in self.fds):
                self.fds[cookie] = fd
        except CarrierFullError:
            if was_empty and fresh.is_empty:
                raise
            return False
        return True

    def _fresh(self) -> tuple[int, Carrier]:
        number, carrier = self.next_number, Carrier.make()
        self.next_number += 1
        for name, end in zip(carrier_names(number), carrier.ends, strict=True):
            self._store.push(name, [end])
        if not await_barrier(self._store):
            for name in carrier_names(number):
                self._store.remove(name)
            carrier.close()
            raise StartError("the descriptor store does not answer")
        return number, carrier


def await_barrier(store: FdStore) -> bool:
    """Block until the store has taken everything; only at the start, when nobody else is to be served. False when it
    does not answer."""
    barrier = store.barrier()
    if barrier is None:
        return True
    try:
        deadline_s = time.monotonic() + BARRIER_S
        poll = select.poll()
        poll.register(barrier, select.POLLIN)
        while time.monotonic() < deadline_s:
            store.flush()
            if poll.poll(10):
                return True
    finally:
        os.close(barrier)
    log.event(logger, logging.ERROR, "the descriptor store does not answer", waited_s=BARRIER_S)
    return False


def is_untouched(sock: socket.socket) -> bool:
    """Whether a socket without a row is a client from which nothing was read. The callers' workers are dead.

    A client that has reset it after it sent something is one too: what it sent can still be read.
    """
    try:
        found = tcp_info.consumed(sock)
        if not found.consumed_bytes and not found.unread_bytes:
            sock.getpeername()  # fails when it is over
        return not found.consumed_bytes
    except OSError:
        return False
