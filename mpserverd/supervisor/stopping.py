"""The end of the daemon in order: settle, drain the workers, drain the storer. Within ``stop_timeout_s``, then by
force.

    settling   connections that no worker has find one
    draining   workers read what the kernel holds, finalise everything and leave; one that dies is replaced for its rows
    storing    the storer makes all of it durable and leaves
    over

Each step looks at what is so and moves on when it may; it is called often, and remembers little.
"""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Callable

from mpserverd import log
from mpserverd.arena.counters import Role
from mpserverd.net.channel import Kind
from mpserverd.supervisor.accepting import Accepting
from mpserverd.supervisor.children import Children
from mpserverd.supervisor.connections import Connections
from mpserverd.supervisor.core import Core
from mpserverd.supervisor.states import ChildState
from mpserverd.supervisor.totals import at_risk_bytes
from mpserverd.systemd import Notifier

logger = logging.getLogger(__name__)

STEP_INTERVAL_S = 0.02
STATUS_INTERVAL_S = 1.0
LINE_INTERVAL_S = 5.0
"""A stop that takes longer says in the log, too, what it is at."""
SETTLE_SHARE = 0.2
"""Of the whole time; then connections that wait for a stream of their name get one of their own."""
WORKERS_SHARE = 0.7
"""When so much of the time is over, the workers are killed, so that the storer gets the rest."""
FORCE_S = 2.0
"""After SIGKILL; a process that is not gone then hangs in the kernel and dies when it comes out."""


class StopPhase(enum.Enum):
    SETTLING = "settling"
    DRAINING = "draining"
    STORING = "storing"
    OVER = "over"


class Stop:
    """Begun once. ``on_over`` is called when no child is left, or none that can be waited for."""

    def __init__(
        self,
        core: Core,
        children: Children,
        connections: Connections,
        accepting: Accepting,
        notifier: Notifier,
        on_over: Callable[[], None],
    ) -> None:
        self._core = core
        self._children = children
        self._connections = connections
        self._accepting = accepting
        self._notifier = notifier
        self._on_over = on_over
        self.phase = StopPhase.SETTLING
        self._began_s = time.monotonic()
        self._timeout_s = core.config.server.stop_timeout_s
        self._forced_s = 0.0
        self._status_due_s = self._began_s
        self._line_due_s = self._began_s + LINE_INTERVAL_S

    def begin(self, why: str) -> None:
        core = self._core
        self._core.note(
            logger,
            logging.INFO,
            "stopping",
            message_id=log.MessageId.DAEMON_STOPPING,
            why=why,
            connections=len(self._connections),
            timeout_s=self._timeout_s,
        )
        self._accepting.stop()
        core.stopping = True
        core.show_phase()
        self._step()

    def force(self, why: str) -> None:
        """Kill whatever lives, now."""
        if not self._forced_s:
            self._forced_s = time.monotonic()
            log.event(logger, logging.WARNING, "stopping by force", why=why, phase=self.phase.value)
            self._kill(Role.WORKER, why)
            self._kill(Role.STORER, why)

    def _step(self) -> None:
        """Look again, and come back soon unless it is over."""
        elapsed_s = time.monotonic() - self._began_s
        if elapsed_s > self._timeout_s:
            self.force(f"not done after {self._timeout_s:g} s")
        if self._forced_s:
            self._wait_for_the_killed()
        else:
            self._work(elapsed_s / self._timeout_s)
        if self.phase is StopPhase.OVER:
            self._on_over()
        else:
            self._say_progress(time.monotonic())
            self._core.loop.after(STEP_INTERVAL_S, self._step)

    def _say_progress(self, now_s: float) -> None:
        if now_s < self._status_due_s:
            return
        self._status_due_s = now_s + STATUS_INTERVAL_S
        connections, at_risk = len(self._connections), at_risk_bytes(self._core.state)
        self._notifier.progress(f"stopping: {self.phase.value}, {connections} connections, {at_risk} bytes not durable")
        if now_s >= self._line_due_s:
            self._line_due_s = now_s + LINE_INTERVAL_S
            self._core.note(
                logger,
                logging.INFO,
                "stop goes on",
                phase=self.phase.value,
                connections=connections,
                at_risk_bytes=at_risk,
                for_s=round(now_s - self._began_s),
                timeout_s=self._timeout_s,
            )

    def _work(self, share: float) -> None:
        if self.phase is not StopPhase.STORING and self._children.storer() is None and self._core.may_store:
            # a reload had just made it leave; workers wait for what it does: streams to open, the last ACK
            self._children.fork(self._children.add_storer())
        if self.phase is StopPhase.SETTLING:
            self._settle(share)
        elif self.phase is StopPhase.DRAINING:
            self._drain(share)
        elif self.phase is StopPhase.STORING:
            self._store()

    def _settle(self, share: float) -> None:
        if share > SETTLE_SHARE:
            self._connections.settle_now()
        retiring = any(child.rows for child in self._children.workers() if not child.wanted)
        if share > WORKERS_SHARE or (not self._connections.unsettled_count and not retiring):
            self.phase = StopPhase.DRAINING
            self._drain(share)

    def _drain(self, share: float) -> None:
        if share > WORKERS_SHARE:
            self._kill(Role.WORKER, "did not drain in time")
            for child in self._children.workers():
                child.wanted = False
        elif self._connections.unsettled_count:
            self._replace_dead()
        else:
            for child in self._children.workers():
                if child.wanted:
                    self._children.tell_to_stop(child, Kind.DRAIN)
        if any(child.state.alive for child in self._children.workers()):
            return
        if not self._connections.unsettled_count or share > WORKERS_SHARE:
            self.phase = StopPhase.STORING
            self._store()

    def _replace_dead(self) -> None:
        """A worker died over its last work: somebody must finish it."""
        if not any(child.wanted and child.state is not ChildState.GIVEN_UP for child in self._children.workers()):
            self._children.fork(self._children.add_worker(0))

    def _store(self) -> None:
        storer = self._children.storer()
        if storer is None:
            if not at_risk_bytes(self._core.state):
                self.phase = StopPhase.OVER
            elif self._core.may_store:  # it left or died before everything was durable
                self._children.fork(self._children.add_storer())
        elif storer.state is ChildState.RUNNING and storer.wanted:
            self._children.tell_to_stop(storer, Kind.DRAIN)

    def _wait_for_the_killed(self) -> None:
        if not self._children.alive() or time.monotonic() - self._forced_s > FORCE_S:
            self.phase = StopPhase.OVER

    def _kill(self, role: Role, why: str) -> None:
        for child in self._children:
            if child.role is role:
                child.wanted = False
                self._children.kill(child, why)
