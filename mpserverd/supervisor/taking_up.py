"""The start after another supervisor: its listeners' settings, its connections, and the spool when that is free.

Everybody who could touch a connection is dead by then (moving.py); memory of the right size is in the core. The order
is the caller's: ``know_listeners`` before listeners are opened, ``take_up`` after that, ``await_spool`` at last.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

from mpserverd import log
from mpserverd.arena.state import Con, ConnectionState
from mpserverd.config.schema import Protocol, Sync
from mpserverd.supervisor.accepting import Accepting
from mpserverd.supervisor.connections import Connections
from mpserverd.supervisor.core import Core
from mpserverd.supervisor.fd_store import FdStore
from mpserverd.supervisor.keeping import Keeping
from mpserverd.supervisor.remembered import Remembered, known_listeners
from mpserverd.supervisor.spool_lock import is_locked_now, lock_holders, open_spool
from mpserverd.supervisor.takeover import Inheritance, Unloading, clear_slots, free_leases

logger = logging.getLogger(__name__)

SPOOL_AGAIN_S = 0.05


class TakingUp:
    """``on_spool`` is called once the storer may be started."""

    def __init__(
        self,
        core: Core,
        facts: Remembered,
        connections: Connections,
        accepting: Accepting,
        on_spool: Callable[[], object],
    ) -> None:
        self._core = core
        self._facts = facts
        self._connections = connections
        self._accepting = accepting
        self._on_spool = on_spool
        self._waits = False
        self._over = False

    def know_listeners(self) -> None:
        """Rows name listeners by numbers of the earlier supervisor."""
        core, facts = self._core, self._facts.read()
        known, layouts = known_listeners(facts)
        core.listeners.update(known)
        core.config = dataclasses.replace(core.config, layouts={**layouts.layouts, **core.config.layouts})
        self._keep_promise(facts.get("sync", core.config.spool.sync))
        self._connections.quarantine.take_up(facts.get("quarantine", []))
        core.draining = bool(facts.get("draining", False))
        self._accepting.next_id = max([int(facts.get("next_id", 1)), *(number + 1 for number in known)])

    def _keep_promise(self, sync: str) -> None:
        """What OK has told clients that are still connected holds for as long as they are."""
        core = self._core
        mps = {number for number, listener in core.listeners.items() if listener.protocol is Protocol.MPS}
        rows = core.state.connections[core.state.connections[:, Con.STATE] != ConnectionState.FREE]
        promised = not mps.isdisjoint(rows[:, Con.LISTENER].tolist())
        if promised and sync != core.config.spool.sync:
            core.config = dataclasses.replace(
                core.config, spool=dataclasses.replace(core.config.spool, sync=Sync(sync))
            )
            log.event(
                logger,
                logging.WARNING,
                "needs a stop",
                message_id=log.MessageId.SETTING_NEEDS_RESTART,
                key="spool.sync",
                why="clients that stay connected were told the other level",
            )

    def take_up(self, found: Inheritance, store: FdStore, keeping: Keeping) -> None:
        """Go on with every connection that waited."""
        core = self._core
        core.spool_lock_fd = open_spool(core.config.spool.path)
        core.may_store = False
        free_leases(core.arena)
        clear_slots(core.state)
        unloading = Unloading(store, found.carriers, found.next_number)
        keeping.take_up(unloading.run(), unloading.next_number)
        taken = self._connections.take_up(unloading.fds)
        new_count = sum(self._accepting.take_stray(fd) for fd in unloading.fds.values())
        core.note(
            logger,
            logging.WARNING,
            "connections adopted",
            message_id=log.MessageId.CONNECTIONS_ADOPTED,
            count=taken.count,
            lost=taken.lost_count,
            unknown=new_count,
            of="supervisor",
        )

    def give_up(self) -> None:
        """The daemon is being stopped without having the spool: nobody waits for it any more."""
        self._over = True

    def await_spool(self) -> None:
        """A storer of the earlier supervisor may hang in the kernel; clients are served meanwhile."""
        core = self._core
        if self._over:
            return
        if is_locked_now(core.spool_lock_fd):
            core.may_store = True
            self._on_spool()
            return
        if not self._waits:
            self._waits = True
            holders = ", ".join(map(str, lock_holders(core.spool_lock_fd)))
            core.note(
                logger,
                logging.WARNING,
                "spool is locked",
                message_id=log.MessageId.CHILD_STUCK,
                child="storer",
                why=f"the earlier storer is not gone yet; its lock was taken by pid {holders or '?'}",
                goes_on="clients are served; what they send waits in memory",
            )
        core.loop.after(SPOOL_AGAIN_S, self.await_spool)
