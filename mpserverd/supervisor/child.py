"""What the supervisor remembers of one child process. Who forks, watches and ends it: see children.py."""

from __future__ import annotations

import collections
import dataclasses
import os
import signal

from mpserverd.arena.counters import Role
from mpserverd.net.channel import Channel, Message
from mpserverd.supervisor.loop import Timer
from mpserverd.supervisor.policy import RestartPolicy
from mpserverd.supervisor.states import ChildState


@dataclasses.dataclass(eq=False, slots=True)
class Child:
    """One place for a process, over all its incarnations. ``rows`` are the connections it owns or is to own."""

    role: Role
    index: int
    slot: int
    policy: RestartPolicy
    state: ChildState = ChildState.DEAD
    pid: int = 0
    pidfd: int = -1
    lease: int = 0
    channel: Channel | None = None
    outbox: collections.deque[Message] = dataclasses.field(default_factory=collections.deque)
    rows: set[int] = dataclasses.field(default_factory=set)
    listeners: frozenset[int] = frozenset()
    """Ids of the listeners that it was told of at its fork; connections of others it cannot serve."""
    restarts: int = 0
    was_ready: bool = False
    wanted: bool = True
    """False once it is told to stop: its exit is then its end."""
    drained: bool = False
    held: bool = False
    """Its messages wait for room in the kernel, and a timer looks again."""
    killed_why: str = ""
    exit_status: int = 0
    """How the last incarnation ended, as waitpid says it."""
    last_words: str = ""
    """Text of its last EVENT; why a storer could not start."""
    forked_ns: int = 0
    killed_ns: int = 0
    timer: Timer | None = None

    @property
    def name(self) -> str:
        return child_name(self.role, self.index)

    @property
    def was_killed_by_others(self) -> bool:
        """SIGKILL that was not ours: an operator, or the kernel for want of memory. No fault of what it did."""
        by_signal = os.WIFSIGNALED(self.exit_status) and os.WTERMSIG(self.exit_status) == signal.SIGKILL
        return by_signal and not self.killed_why

    @property
    def takes_connections(self) -> bool:
        return self.role is Role.WORKER and self.state is ChildState.RUNNING and self.wanted

    def takes(self, listener: int) -> bool:
        """Connections of that listener; one that a reload has made or changed is for workers forked after it."""
        return self.takes_connections and listener in self.listeners


def child_name(role: Role, index: int) -> str:
    return f"worker-{index}" if role is Role.WORKER else "storer"
