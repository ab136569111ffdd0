"""Which worker gets a connection, and which connection goes to another one. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """What is known of a worker: ``rate`` in packets/s as last measured, ``newcomer_count`` connections since then."""

    index: int
    rate: float
    connection_count: int
    newcomer_count: int = 0


def choose(loads: Sequence[Load], last_index: int) -> int:
    """The index of the least loaded worker; of equals the next one after ``last_index``, round robin.

    A connection that was placed after the last measurement counts as an average one, so that a burst of clients
    spreads. Each connection weighs one packet/s besides, so that silent ones spread too.
    """
    if not loads:
        raise ValueError("no worker to choose from")
    measured = sum(load.connection_count - load.newcomer_count for load in loads)
    average = sum(load.rate for load in loads) / measured if measured > 0 else 0.0
    span = max(load.index for load in loads) + 1

    def key(load: Load) -> tuple[float, int]:
        weight = load.rate + load.newcomer_count * average + load.connection_count
        return weight, (load.index - last_index - 1) % span

    return min(loads, key=key).index


LOPSIDED = 1.5
"""The busiest worker is relieved when it does so many times the mean ..."""
BUSY_RATE = 10_000.0
"""... and that is so many packets/s at least: below, nobody gains."""
GAIN_MIN = 0.1
"""A move must take so much off the larger of the two loads; else the two would swap for ever."""


@dataclasses.dataclass(frozen=True, slots=True)
class Move:
    """Which connection (``row``) goes to which worker."""

    row: int
    to_index: int


def is_lopsided(rates: Sequence[float]) -> bool:
    """``rates`` of all workers, packets/s."""
    if len(rates) < 2:
        return False
    return max(rates) > max(LOPSIDED * sum(rates) / len(rates), BUSY_RATE)


def choose_move(rates: Mapping[int, float], hot_index: int, candidates: Mapping[int, float]) -> Move | None:
    """The move from the worker ``hot_index`` to the idlest one that levels the two best; None when none helps.

    ``rates`` by worker index and ``candidates`` by connection row, both packets/s.
    """
    cold_index = min(rates, key=lambda index: (rates[index], index))
    hot, cold = rates[hot_index], rates[cold_index]
    if cold_index == hot_index or not candidates:
        return None

    def larger_after(row: int) -> float:
        return max(hot - candidates[row], cold + candidates[row])

    row = min(candidates, key=lambda row: (larger_after(row), row))
    return Move(row, cold_index) if larger_after(row) < hot * (1 - GAIN_MIN) else None
