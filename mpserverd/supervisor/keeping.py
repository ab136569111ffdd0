"""Keeps everything that must outlive the supervisor in systemd's descriptor store, while it runs.

Names in the store: the memory's (stored_memory.py), ``listener-<name>`` (its first name), and the two
ends of a carrier, ``carrier-<n>-in`` and ``carrier-<n>-out``.

Rules: a connection goes into the carrier as soon as it is admitted, then gets its row, then a worker; so one that is
carried and has no row is a fresh one, or one that is over. Carriers fill up with connections that have ended, so a
fresh one is packed now and then; until the store has it (a barrier comes back) newcomers go into both, and only then is
the old one removed. Who did not get into the newest one (the kernel has no room) makes for another one, once a second
until all are in. Outside systemd all of this does nothing.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Iterable

from mpserverd import log
from mpserverd.supervisor.carrier import Carrier, CarrierFullError
from mpserverd.supervisor.core import Core
from mpserverd.supervisor.fd_store import FdStore
from mpserverd.supervisor.guard import Guard
from mpserverd.supervisor.loop import READ

logger = logging.getLogger(__name__)

ENDED_MAX = 1000
"""So many ended connections may lie in a carrier before it is packed anew ..."""
ENDED_AGE_TICKS = 60
"""... or any at all for so many seconds: each holds a socket in the kernel."""
FLUSH_AGAIN_S = 0.01
GUARD_AGAIN_S, GUARD_AGAIN_S_MAX = 0.1, 60.0
ANSWER_S = 2.0
"""So long newcomers wait for a store that does not answer; then they are served without."""
LISTENER_PREFIX = "listener-"

Live = Callable[[], Iterable[tuple[int, int]]]


def carrier_names(number: int) -> tuple[str, str]:
    return f"carrier-{number}-in", f"carrier-{number}-out"


def carrier_number(name: str) -> int | None:
    """The number in a carrier's name; None for other names."""
    kind, _, rest = name.partition("-")
    number, _, end = rest.partition("-")
    return int(number) if kind == "carrier" and number.isdecimal() and end in ("in", "out") else None


class Keeping:
    """``live`` gives (cookie, descriptor) of every connection that the supervisor holds."""

    def __init__(self, core: Core, store: FdStore, live: Live) -> None:
        self._core = core
        self._store = store
        self._live = live
        self._carriers: list[tuple[int, Carrier]] = []
        """The one in use last; before it what is being replaced."""
        self._next_number = 1
        self._ended_count = 0
        self._ticks = 0
        self._guard = Guard(core.state)
        self._guard_again_s = GUARD_AGAIN_S
        self.on_guard: Callable[[], None] = _nothing
        """There is another guard: its pid is to be remembered."""
        self._barrier = -1
        self._barrier_s = 0.0
        self._short = False
        self._missed = False
        self._flushing = False
        self._listeners: dict[int, str] = {}
        """Name under which each listening socket is stored, by its inode."""
        self._memory_names: list[str] = []

    @property
    def present(self) -> bool:
        """Whether anything outlives this process."""
        return self._store.present

    # -- memory and listeners

    def keep_memory(self, fds: dict[str, int]) -> None:
        for name, fd in fds.items():
            self._store.push(name, [fd])
        self._memory_names = list(fds)
        self._flush()

    def know_listeners(self, fds: dict[str, int]) -> None:
        """Those that an earlier supervisor has stored, by the names under which they came."""
        self._listeners = {os.fstat(fd).st_ino: name for name, fd in fds.items()}

    def keep_listeners(self, fds: dict[str, int]) -> None:
        """These are the open ones now, by name; others are dropped from the store.

        One that the store has is not taken again: it stays under its first name, whatever the listener is called now.
        """
        if not self.present:
            return
        names = {os.fstat(fd).st_ino: name for name, fd in fds.items()}
        for inode in [inode for inode in self._listeners if inode not in names]:
            self._store.remove(LISTENER_PREFIX + self._listeners.pop(inode))
        for inode, name in names.items():
            if inode not in self._listeners:
                self._listeners[inode] = self._free_name(name)
            self._store.push(LISTENER_PREFIX + self._listeners[inode], [fds[name]])
        self._flush()

    def _free_name(self, name: str) -> str:
        """Another socket may have been stored under it. No listener has a name with a +."""
        taken = set(self._listeners.values())
        names = itertools.chain([name], (f"{name}+{number}" for number in itertools.count(2)))
        return next(free for free in names if free not in taken)

    # -- connections

    def take_up(self, carriers: list[tuple[int, Carrier]], next_number: int) -> None:
        """Go on with carriers that are in the store and together hold every connection, the newest last."""
        self._next_number = next_number
        self._use(carriers)

    def begin(self) -> None:
        """Make the first carrier, or pack what was taken up."""
        if self.present:
            self._start_guard()
            self.pack()

    @property
    def guard_pid(self) -> int:
        """0 while there is none."""
        return self._guard.pid

    def _start_guard(self) -> None:
        try:
            self._guard.begin()
        except OSError as error:
            if self._guard_again_s == GUARD_AGAIN_S:
                then = "who is being accepted when the supervisor is killed is cut off"
                log.event(logger, logging.WARNING, "no guard", why=error.strerror, then=then)
            self._core.loop.after(self._guard_again_s, self._start_guard)
            self._guard_again_s = min(2 * self._guard_again_s, GUARD_AGAIN_S_MAX)
            return
        self._guard_again_s = GUARD_AGAIN_S
        self._core.loop.watch(self._guard.pidfd, READ, lambda _: self._guard_died())
        self.on_guard()

    def _guard_died(self) -> None:
        """Somebody killed it; the next one is a moment away."""
        self._end_guard()
        self._core.loop.after(GUARD_AGAIN_S, self._start_guard)

    def _end_guard(self) -> None:
        self._core.loop.unwatch(self._guard.pidfd)
        self._guard.end()

    def _use(self, carriers: list[tuple[int, Carrier]]) -> None:
        """From now on newcomers go into these; whoever closes another one does it after this."""
        self._carriers = carriers
        self._guard.point_at([carrier.ends[0] for _, carrier in carriers])

    def has_room(self) -> bool:
        """Whether newcomers can be carried now; if not, the kernel's queue keeps them until systemd has answered."""
        if self._barrier < 0 or not any(carrier.is_full for _, carrier in self._carriers):
            return True  # until the answer comes the store may have the old one only
        return time.monotonic() - self._barrier_s > ANSWER_S

    def carry(self, cookie: int, fd: int) -> None:
        """A newcomer; its row is written, and a worker gets it, after this."""
        if not self._carriers:
            return
        carried = [self._try_put(carrier, cookie, fd) for _, carrier in self._carriers]
        present = len(carried)
        if self._carriers[-1][1].wants_packing:
            # only now, since it takes milliseconds; and the newcomer is not among those who live yet
            self.pack()
            carried += [self._try_put(carrier, cookie, fd) for _, carrier in self._carriers[present:]]
        if not carried[-1]:  # those before it are on their way out
            self._missed = True
            self._say_short()

    def _try_put(self, carrier: Carrier, cookie: int, fd: int) -> bool:
        try:
            carrier.put([(cookie, fd)])
        except CarrierFullError:
            return False
        return True

    def _say_short(self) -> None:
        if not self._short:
            self._short = True
            log.event(
                logger,
                logging.WARNING,
                "connections without a carrier",
                what="the kernel takes no more descriptors in flight; raise LimitNOFILE",
                then="they are lost if the supervisor dies",
            )

    def ended(self) -> None:
        """A connection is gone, and lies in a carrier still."""
        self._ended_count += 1

    def tick(self) -> None:
        """Once a second."""
        self._ticks += 1
        if self._missed or self._ended_count >= ENDED_MAX or (self._ended_count and self._ticks >= ENDED_AGE_TICKS):
            self.pack()

    def pack(self) -> None:
        """Fill a fresh carrier with who lives, store it, and drop the old one when the store has it."""
        if not self.present or self._barrier >= 0:
            return
        fresh, self._missed = Carrier.make(), False
        try:
            fresh.fill(self._live())
        except CarrierFullError:
            self._missed = True  # tried again at the next tick
            self._say_short()
            if self._carriers:  # the old one holds more than a part of them
                fresh.close()
                return
        number, self._next_number = self._next_number, self._next_number + 1
        self._use([*self._carriers, (number, fresh)])
        self._ended_count = self._ticks = 0
        for name, end in zip(carrier_names(number), fresh.ends, strict=True):
            self._store.push(name, [end])
        barrier = self._store.barrier()
        self._flush()
        if barrier is not None:
            self._barrier, self._barrier_s = barrier, time.monotonic()
            self._core.loop.watch(barrier, READ, lambda _: self._stored())

    def _stored(self) -> None:
        """The barrier came back: the store has the last carrier."""
        self._drop_barrier()
        *before, last = self._carriers
        self._use([last])
        for number, old in before:
            for name in carrier_names(number):
                self._store.remove(name)
            old.close()
        self._flush()
        if self._missed or self._carriers[-1][1].wants_packing:
            self.pack()
        else:
            self._short = False

    def _drop_barrier(self) -> None:
        if self._barrier >= 0:
            self._core.loop.unwatch(self._barrier)
            os.close(self._barrier)
            self._barrier = -1

    # -- leaving

    def not_kept(self) -> str:
        """What has not reached the store yet; empty when all has."""
        self._store.flush()
        if self._store.waiting_count:
            return f"{self._store.waiting_count} messages to systemd, and the descriptors in them"
        return "the answer of systemd to the last carrier" if self._barrier >= 0 else ""

    def forget_all(self) -> None:
        """The daemon stops for good: nothing is to wait for a successor."""
        self.keep_listeners({})
        for name in self._memory_names:
            self._store.remove(name)
        self._memory_names = []
        for number, _ in self._carriers:
            for name in carrier_names(number):
                self._store.remove(name)
        self._flush()

    def close(self) -> None:
        self._drop_barrier()
        self._end_guard()
        for _, carrier in self._carriers:
            carrier.close()
        self._carriers = []
        self._store.close()

    def _flush(self) -> None:
        self._store.flush()
        if self._store.waiting_count and not self._flushing:
            self._flushing = True
            self._core.loop.after(FLUSH_AGAIN_S, self._flush_again)

    def _flush_again(self) -> None:
        self._flushing = False
        self._flush()


def _nothing() -> None:
    """Nobody wants to know."""
