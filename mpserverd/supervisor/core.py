"""What every part of the supervisor works on: the loop, the shared tables, the doorbells, the settings in force.

``Core`` holds no behaviour of its own beyond counting; each part stands beside it in a module that says what it does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from typing import Any

from mpserverd import log
from mpserverd.arena.chunks import Arena
from mpserverd.arena.counters import Role, column
from mpserverd.arena.state import FIRST_WORKER_SLOT, SUPERVISOR_SLOT, Head, Phase, RefuseReason, Slot, StateTable
from mpserverd.config.schema import Config, ListenerConfig, LogLevel
from mpserverd.limits import WORKERS_MAX
from mpserverd.supervisor.events import EventRing
from mpserverd.supervisor.loop import Loop

WORKER_SLOTS = 2 * WORKERS_MAX
"""Twice, because at a reload the fresh workers run beside the old ones."""
SLOTS = FIRST_WORKER_SLOT + WORKER_SLOTS


@dataclasses.dataclass(frozen=True, slots=True)
class Doorbells:
    """Non-blocking eventfds, made once: ``workers[slot - FIRST_WORKER_SLOT]`` belongs to whoever has that slot."""

    supervisor: int
    storer: int
    workers: tuple[int, ...]

    @classmethod
    def create(cls) -> Doorbells:
        bells = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2 + WORKER_SLOTS)]
        return cls(bells[0], bells[1], tuple(bells[2:]))

    def of_slot(self, slot: int) -> int:
        return self.workers[slot - FIRST_WORKER_SLOT] if slot >= FIRST_WORKER_SLOT else self.storer

    def close(self) -> None:
        for fd in (self.supervisor, self.storer, *self.workers):
            os.close(fd)


def ring(doorbell_fd: int) -> None:
    with contextlib.suppress(BlockingIOError):  # its count is full: it rings already
        os.eventfd_write(doorbell_fd, 1)


def hush(doorbell_fd: int) -> None:
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(doorbell_fd)


@dataclasses.dataclass(slots=True)
class Core:
    """``max_clients`` is what was found to fit, at most ``config.server.max_clients``. ``listeners`` are the settings
    by the id that stands in rows, also those of listeners that are gone while connections of theirs live."""

    loop: Loop
    state: StateTable
    arena: Arena
    bells: Doorbells
    events: EventRing
    config: Config
    max_clients: int
    clients_max: int
    """What the tables and limits made at the start allow; a reload may raise ``max_clients`` up to this."""
    listeners: dict[int, ListenerConfig] = dataclasses.field(default_factory=dict)
    stopping: bool = False
    log_level: str = ""
    """What mpserverctl has set; "" for the settings' own. Until a reload."""
    draining: bool = False
    """No new connections are let in; set by the command drain."""
    spool_lock_fd: int = -1
    connections_lock_fd: int = -1
    may_store: bool = True
    """False while an earlier supervisor's storer, which hangs in the kernel, has the lock on the spool."""

    def note(
        self,
        logger: logging.Logger,
        level: int,
        kind: str,
        *,
        message_id: log.MessageId | None = None,
        source: str = "supervisor",
        **fields: Any,
    ) -> None:
        """A line in the log and an event for mpserverctl; ``kind`` is constant text, such as "child died"."""
        log.event(logger, level, kind, message_id=message_id, **fields)
        self.events.add(kind, source=source, **fields)

    def config_for_children(self) -> Config:
        """The settings in force, with the log level in force."""
        if not self.log_level:
            return self.config
        log_config = dataclasses.replace(self.config.log, level=LogLevel(self.log_level))
        return dataclasses.replace(self.config, log=log_config)

    def count(self, name: str, amount: int = 1) -> None:
        """Add to one of the supervisor's own counters."""
        self.state.words[self.state.slot_base(SUPERVISOR_SLOT) + column(Role.SUPERVISOR, name)] += amount

    def count_refusal(self, reason: RefuseReason) -> None:
        self.state.words[self.state.slot_base(SUPERVISOR_SLOT) + Slot.REASONS + reason] += 1

    def set_head(self, word: int, value: int) -> None:
        self.state.words[word] = value

    def show_phase(self) -> None:
        """For whoever looks into the tables, once the daemon is ready."""
        self.set_head(
            Head.PHASE, Phase.STOPPING if self.stopping else Phase.DRAINING if self.draining else Phase.SERVING
        )

    def ring_storer(self) -> None:
        ring(self.bells.storer)

    def close(self) -> None:
        """Only after the last child is dead."""
        self.bells.close()
        for fd in (
            self.state.fd,
            self.arena.table.fd,
            self.arena.data_fd,
            self.spool_lock_fd,
            self.connections_lock_fd,
        ):
            if fd >= 0:
                os.close(fd)
        self.loop.close()
