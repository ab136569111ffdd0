"""Leasing free chunks to workers, ahead of their need.

The chunk table is the truth; what is kept here are only wishes, and a lost wish is spoken again by its worker.
"""

from __future__ import annotations

from mpserverd.arena.state import Head
from mpserverd.supervisor.child import Child
from mpserverd.supervisor.core import Core, ring
from mpserverd.supervisor.policy import lease_count

ASKED_LATELY_S = 1.0


class Leases:
    """Answers NEED; while chunks are short it remembers who waits, and tries again when the storer rings."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._asked_s: dict[int, float] = {}
        self._waiting: dict[int, tuple[Child, int]] = {}

    def need(self, child: Child, wanted_count: int, now_s: float) -> None:
        """``child`` wants so many chunks."""
        self._asked_s = {slot: at for slot, at in self._asked_s.items() if now_s - at < ASKED_LATELY_S}
        self._asked_s[child.slot] = now_s
        if not self._grant(child, wanted_count):
            self._core.count("starved")
            self._waiting[child.slot] = (child, wanted_count)
            self._publish_starving()

    def retry(self) -> None:
        """The storer freed something, or a second went by."""
        if not self._waiting:
            return
        for slot, (child, wanted_count) in list(self._waiting.items()):
            if self._grant(child, wanted_count):
                del self._waiting[slot]
        self._publish_starving()

    def revoke(self, child: Child) -> None:
        """After its pidfd fired: what it had leased is free again."""
        self._waiting.pop(child.slot, None)
        self._asked_s.pop(child.slot, None)
        self._core.arena.table.revoke(child.lease)
        self.retry()
        self._publish_starving()

    def _grant(self, child: Child, wanted_count: int) -> bool:
        table = self._core.arena.table
        askers = max(len(self._asked_s), len(self._waiting), 1)
        granted = table.lease(child.lease, lease_count(table.free_count(), wanted_count, askers))
        if granted:
            self._core.count("chunks_leased", granted)
            ring(self._core.bells.of_slot(child.slot))
        return granted > 0

    def _publish_starving(self) -> None:
        self._core.set_head(Head.STARVING, int(bool(self._waiting)))
