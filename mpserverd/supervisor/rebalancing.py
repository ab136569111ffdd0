"""Relieves a worker that does much more than the others: some of its connections are handed over to the idlest.

What a worker does is the CPU time that it takes; a connection's part of that goes by its bytes. CPU time is measured
every PROCESS_INTERVAL_S, so a move shows in the second measurement after it. Nothing moves before the workers have been
lopsided for HOLD_S, and nothing again for as long; a connection that was moved stays where it is for STAY_S.

Which ones move is decided in placement.py; how, is the ordinary hand-over (DETACH, RELEASED, ATTACH).
"""

from __future__ import annotations

import logging

from mpserverd import log
from mpserverd.arena.state import Slot, Str
from mpserverd.supervisor.child import Child
from mpserverd.supervisor.children import Children
from mpserverd.supervisor.connection import Connection
from mpserverd.supervisor.connections import Connections
from mpserverd.supervisor.core import Core
from mpserverd.supervisor.placement import choose_moves, is_lopsided, shares
from mpserverd.supervisor.stats_tick import PROCESS_INTERVAL_S

logger = logging.getLogger(__name__)

HOLD_S = 2 * PROCESS_INTERVAL_S + 1.0
STAY_S = 30.0
MOVES_MAX = 4
"""At once: the parts are an estimate, so the rest waits for the next measurement."""


class Rebalancing:
    """``tick`` once a second, after the loads were measured."""

    def __init__(self, core: Core, children: Children, connections: Connections) -> None:
        self._core = core
        self._children = children
        self._connections = connections
        self._lopsided_since_s: float | None = None

    def tick(self, now_s: float) -> None:
        workers = [child for child in self._children.workers() if child.takes_connections]
        loads = {child.index: self._cores(child) for child in workers}
        if len(loads) != len(workers) or not is_lopsided(list(loads.values())):
            self._lopsided_since_s = None  # during a reload two workers have one index
        elif self._lopsided_since_s is None:
            self._lopsided_since_s = now_s
        elif now_s - self._lopsided_since_s >= HOLD_S:
            self._lopsided_since_s = None
            hot = max(workers, key=lambda child: loads[child.index])
            self._relieve(hot, {child.index: child for child in workers}, loads, now_s)

    def _relieve(self, hot: Child, workers: dict[int, Child], loads: dict[int, float], now_s: float) -> None:
        connections = [each for row in hot.rows if (each := self._connections.get(row)) is not None]
        parts = shares(loads[hot.index], {each.row: self._bytes_per_s(each) for each in connections})
        movable = {each.row: parts[each.row] for each in connections if now_s - each.moved_s >= STAY_S}
        for move in choose_moves(loads, hot.index, movable, MOVES_MAX):
            self._connections.move(move.row, workers[move.to_index])
            self._core.count("rebalanced")
            log.event(
                logger,
                logging.INFO,
                "connection moves",
                row=move.row,
                cores=round(movable[move.row], 3),
                of=hot.name,
                to=workers[move.to_index].name,
            )

    def _cores(self, child: Child) -> float:
        return int(self._core.state.slots[child.slot, Slot.CPU_MILLI]) / 1000

    def _bytes_per_s(self, connection: Connection) -> float:
        if connection.stream is None:
            return 0.0
        words = self._core.state.streams[connection.stream]
        return int(words[Str.RATE_MILLI]) * int(words[Str.PACKET_SIZE]) / 1000
