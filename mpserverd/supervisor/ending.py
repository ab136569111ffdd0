"""How a supervisor ends: it stops for good (stopping.py), or leaves everything to the next start.

Leaving is an exit at once: clients, listeners and memory wait in systemd's store, and nobody is told anything. The
unit's ``ExecStop=`` asks for it in a restart. systemd skips that line while the unit starts or reloads, and sends
SIGTERM behind it while the daemon still leaves; so SIGTERM is a stop only when systemd does not say that it restarts
the unit (restarting.py), and does nothing any more once the daemon leaves.
"""

from __future__ import annotations

import logging
import os
import socket
import time

from mpserverd import log
from mpserverd.arena.state import Head
from mpserverd.errors import StartError
from mpserverd.net import tcp_info
from mpserverd.supervisor.accepting import Accepting
from mpserverd.supervisor.children import Children
from mpserverd.supervisor.connections import Connections
from mpserverd.supervisor.core import Core
from mpserverd.supervisor.keeping import Keeping
from mpserverd.supervisor.restarting import ask, unit_name
from mpserverd.supervisor.stopping import Stop, StopPhase
from mpserverd.supervisor.totals import read_totals
from mpserverd.systemd import Notifier

logger = logging.getLogger(__name__)

LOOK_AGAIN_S = 0.01


class Ending:
    """``exit_code`` is that of an end without anything at risk."""

    def __init__(
        self,
        core: Core,
        children: Children,
        connections: Connections,
        accepting: Accepting,
        keeping: Keeping,
        notifier: Notifier,
    ) -> None:
        self._core = core
        self._children = children
        self._connections = connections
        self._accepting = accepting
        self._keeping = keeping
        self._notifier = notifier
        self._stop: Stop | None = None
        self._asking = False
        self._left = False
        self.leaving = False
        self.exit_code = 0
        self.dropped_before = 0
        """Bytes that had been dropped before this run, for the last line."""

    @property
    def stopping(self) -> bool:
        """For good; what waits in the store is to be forgotten."""
        return self._stop is not None

    @property
    def begun(self) -> bool:
        return self.stopping or self.leaving

    @property
    def over(self) -> bool:
        return self._left or (self._stop is not None and self._stop.phase is StopPhase.OVER)

    # -- what was told

    def terminate(self) -> None:
        """SIGTERM: systemd ends the unit, or restarts it. Asking again is impatience."""
        unit = unit_name()
        if self.begun or self._asking or not unit or not self._keeping.present:
            self.stop("SIGTERM")
            return
        self._asking = True
        ask(self._core.loop, unit, self._answered)

    def _answered(self, restarting: bool) -> None:
        if self.begun:
            return
        if restarting:
            self.leave("SIGTERM, and systemd restarts the unit")
        else:
            self.stop("SIGTERM")

    def leave_on_signal(self) -> None:
        try:
            self.leave("SIGQUIT")
        except StartError as error:
            log.event(logger, logging.WARNING, "not leaving", why=str(error))

    # -- stopping

    def stop(self, why: str) -> None:
        """The first time in order; the second time at once. Nothing once the daemon leaves."""
        if self.leaving:
            return
        if self._stop is not None:
            self._stop.force(f"{why} once more")
            return
        self._notifier.stopping()
        self._stop = Stop(
            self._core, self._children, self._connections, self._accepting, self._notifier, self._core.loop.stop
        )
        self._stop.begin(why)

    def say_goodbye(self) -> int:
        """The last line. Returns the exit code."""
        totals = read_totals(self._core.state)
        unread = 0
        if not self._children.alive():  # a socket that somebody reads, or hangs in reading, is not to be asked
            unread = sum(unread_bytes_of(connection.fd) for connection in self._connections.all())
        at_risk = totals.at_risk_bytes + unread
        level, verdict = logging.INFO, "nothing was lost"
        if at_risk:
            level, verdict = logging.ERROR, "not everything became durable"
        elif dropped := totals.dropped_bytes - self.dropped_before:
            level, verdict = logging.WARNING, f"{dropped} bytes were dropped because the memory was full"
        log.event(
            logger,
            level,
            "stopped",
            message_id=log.MessageId.DAEMON_STOPPED,
            connections=totals.connections,
            received_bytes=totals.received_bytes,
            durable_bytes=totals.durable_bytes,
            dropped_bytes=totals.dropped_bytes,
            at_risk_bytes=at_risk,
            verdict=verdict,
        )
        return 1 if at_risk else self.exit_code

    # -- leaving

    def leave(self, why: str) -> None:
        """Exit at once: whatever lives waits in the store. Raises StartError when that cannot be."""
        if not self._keeping.present:
            raise StartError("there is no descriptor store to leave anything in: the daemon was not started by systemd")
        if self._stop is not None:
            raise StartError("the daemon stops")
        if not self.leaving:
            self.leaving = True
            connections = len(self._connections)
            self._core.note(logger, logging.INFO, "leaving", why=why, connections=connections, what="the next start")
            self._notifier.progress(f"leaving {connections} connections to the next start")
            deadline_s = time.monotonic() + self._core.config.server.restart_timeout_s
            self._core.loop.after(0.0, lambda: self._leave_when_kept(deadline_s))

    def _leave_when_kept(self, deadline_s: float) -> None:
        missing = self._keeping.not_kept()
        if missing and time.monotonic() < deadline_s:
            self._core.loop.after(LOOK_AGAIN_S, lambda: self._leave_when_kept(deadline_s))
            return
        if missing:
            log.event(
                logger,
                logging.ERROR,
                "left before everything was kept",
                message_id=log.MessageId.NOT_KEPT,
                missing=missing,
                waited_s=self._core.config.server.restart_timeout_s,
                lost="connections that only that would have kept; the next start says how many",
            )
        self.leave_everything()
        self._left = True
        self._core.loop.stop()

    def leave_everything(self) -> None:
        """Whatever waits in the store is for a successor, and this end is no crash."""
        self._core.set_head(Head.LEFT, 1)


def unread_bytes_of(fd: int) -> int:
    """What waits in a connection that nobody owns any more: its worker is dead."""
    sock = socket.socket(fileno=os.dup(fd))
    try:
        return tcp_info.unread_bytes(sock)
    except OSError:
        return 0
    finally:
        sock.close()
