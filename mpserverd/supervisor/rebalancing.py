"""Relieves a worker that does much more than the others: one connection is handed over to the idlest, once a second.

A connection that was moved stays where it is for STAY_S, so that bursts don't send it to and fro. Which one moves is
decided in placement.py; how, is the ordinary hand-over (DETACH, RELEASED, ATTACH).
"""

from __future__ import annotations

import logging

from mpserverd import log
from mpserverd.arena.state import Slot, Str
from mpserverd.supervisor.children import Child, Children
from mpserverd.supervisor.connection import Connection
from mpserverd.supervisor.connections import Connections
from mpserverd.supervisor.core import Core
from mpserverd.supervisor.placement import choose_move, is_lopsided

logger = logging.getLogger(__name__)

STAY_S = 30.0


class Rebalancing:
    """``tick`` once a second, after the rates were measured."""

    def __init__(self, core: Core, children: Children, connections: Connections) -> None:
        self._core = core
        self._children = children
        self._connections = connections

    def tick(self, now_s: float) -> None:
        workers = [child for child in self._children.workers() if child.takes_connections]
        rates = {child.index: self._rate(child) for child in workers}
        if len(rates) != len(workers) or not is_lopsided(list(rates.values())):
            return  # during a reload two workers have one index
        hot = max(workers, key=lambda child: rates[child.index])
        candidates = {
            connection.row: self._stream_rate(connection)
            for connection in map(self._connections.get, hot.rows)
            if connection is not None and now_s - connection.moved_s >= STAY_S
        }
        move = choose_move(rates, hot.index, candidates)
        if move is not None:
            target = next(child for child in workers if child.index == move.to_index)
            self._connections.move(move.row, target)
            log.event(
                logger,
                logging.INFO,
                "connection moves",
                row=move.row,
                packets_per_s=round(candidates[move.row]),
                of=hot.name,
                to=target.name,
            )

    def _rate(self, child: Child) -> float:
        return int(self._core.state.slots[child.slot, Slot.RATE_MILLI]) / 1000

    def _stream_rate(self, connection: Connection) -> float:
        if connection.stream is None:
            return 0.0
        return int(self._core.state.streams[connection.stream, Str.RATE_MILLI]) / 1000
