"""When connections are moved between workers: with real tables and loads that are made up, second by second."""

from __future__ import annotations

import itertools
import random
from typing import Any, cast

import pytest

from mpserverd.arena.counters import Role, column
from mpserverd.arena.state import FIRST_WORKER_SLOT, SUPERVISOR_SLOT, Slot, Str
from mpserverd.supervisor.child import Child
from mpserverd.supervisor.connection import Connection
from mpserverd.supervisor.core import Core
from mpserverd.supervisor.policy import RestartPolicy
from mpserverd.supervisor.rebalancing import HOLD_S, Rebalancing
from mpserverd.supervisor.states import ChildState
from mpserverd.supervisor.stats_tick import PROCESS_INTERVAL_S

PACKET = 1000
ROWS = 4
"""As many connections as the small tables have."""


class Workshop:
    """Workers and their connections, of which ``costs`` says how many cores each takes. Stands in for both tables'
    owners: it answers what Rebalancing asks, and does what it is told."""

    def __init__(self, core: Core, workers: int, costs: list[float], seed: int = 0) -> None:
        self.core, self.costs, self.chance = core, costs, random.Random(seed)
        self.children = [
            Child(Role.WORKER, n, FIRST_WORKER_SLOT + n, RestartPolicy(1.0), ChildState.RUNNING) for n in range(workers)
        ]
        self.connections = [Connection(row, -1, row, cast(Any, None), 0, 0, 0, 0, stream=row) for row in range(ROWS)]
        self.children[0].rows = set(range(ROWS))
        self.moves: list[tuple[float, int, int]] = []
        self.now_s = 1000.0
        self.used = [0.0] * workers
        self.rebalancing = Rebalancing(core, cast(Any, self), cast(Any, self))

    def workers(self) -> list[Child]:
        return self.children

    def get(self, row: int) -> Connection:
        return self.connections[row]

    def move(self, row: int, target: Child) -> None:
        self.connections[row].moved_s = self.now_s
        for child in self.children:
            child.rows.discard(row)
        target.rows.add(row)
        self.moves.append((self.now_s, row, target.index))

    def run(self, seconds: int, noise: float = 0.0) -> None:
        """CPU time shows only in whole intervals, as it does in truth."""
        for _ in range(seconds):
            self.now_s += 1
            for child in self.children:
                self.used[child.index] += sum(self._cost(row, noise) for row in child.rows)
            if self.now_s % PROCESS_INTERVAL_S == 0:
                for child in self.children:
                    cpu_milli = int(1000 * self.used[child.index] / PROCESS_INTERVAL_S)
                    self.core.state.slots[child.slot, Slot.CPU_MILLI] = cpu_milli
                self.used = [0.0] * len(self.children)
            for row, cost in enumerate(self.costs):
                words = self.core.state.streams[row]
                words[Str.PACKET_SIZE], words[Str.RATE_MILLI] = PACKET, int(cost * 1e6)
            self.rebalancing.tick(self.now_s)

    def _cost(self, row: int, noise: float) -> float:
        return self.costs[row] * self.chance.uniform(1 - noise, 1 + noise)

    def loads(self) -> list[float]:
        return [sum(self.costs[row] for row in child.rows) for child in self.children]


def test_a_worker_that_is_busy_with_few_large_packets_is_relieved(core: Core) -> None:
    """What counts is its CPU time, not the number of its packets: 900 a second here."""
    workshop = Workshop(core, 4, [0.225] * ROWS)
    workshop.run(60)
    assert workshop.loads() == [0.225] * 4
    assert core.state.slots[SUPERVISOR_SLOT, column(Role.SUPERVISOR, "rebalanced")] == len(workshop.moves) == 3


def test_nothing_moves_before_two_measurements_agree(core: Core) -> None:
    workshop = Workshop(core, 2, [0.4] * ROWS)
    workshop.run(int(PROCESS_INTERVAL_S + HOLD_S) - 1)
    assert not workshop.moves
    workshop.costs = [0.0] * ROWS
    workshop.run(60)
    assert not workshop.moves, "it was over by then"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("workers", "costs"),
    [(2, [0.4, 0.4, 0.1, 0.1]), (2, [0.9, 0.1, 0.1, 0.1]), (3, [0.5] * 4), (2, [0.3, 0.3, 0.3, 0])],
)
def test_loads_that_go_up_and_down_send_nobody_to_and_fro(
    core: Core, workers: int, costs: list[float], seed: int
) -> None:
    workshop = Workshop(core, workers, costs, seed)
    workshop.run(600, noise=0.3)
    done = len(workshop.moves)
    assert 0 < done <= ROWS
    assert all(
        later[0] == earlier[0] or later[0] - earlier[0] >= HOLD_S
        for earlier, later in itertools.pairwise(workshop.moves)
    )
    workshop.run(3600, noise=0.3)
    assert len(workshop.moves) == done, "an hour of the same brings no move"


def test_one_hot_connection_stays_where_it_is(core: Core) -> None:
    workshop = Workshop(core, 2, [0.9, 0.0, 0.0, 0.0])
    workshop.run(600, noise=0.3)
    assert not workshop.moves
