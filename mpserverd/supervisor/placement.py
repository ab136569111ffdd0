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
BUSY_CORES = 0.1
"""... and that is so much of a core at least: below, nobody gains."""
GAIN_MIN = 0.2
"""Who takes a connection must stay so far below what the busiest did; else the two would swap for ever."""
PART_MIN = 0.02
"""A connection that does less of what its worker does is not worth a move."""


@dataclasses.dataclass(frozen=True, slots=True)
class Move:
    """Which connection (``row``) goes to which worker."""

    row: int
    to_index: int


def is_lopsided(loads: Sequence[float]) -> bool:
    """``loads`` of all workers, in cores."""
    if len(loads) < 2:
        return False
    return max(loads) > max(LOPSIDED * sum(loads) / len(loads), BUSY_CORES)


def shares(load: float, weights: Mapping[int, float]) -> dict[int, float]:
    """What each connection has in its worker's ``load``, by row; ``weights`` are those of all that it has."""
    whole = sum(weights.values())
    return {row: load * weight / whole if whole else 0.0 for row, weight in weights.items()}


def choose_moves(
    loads: Mapping[int, float], hot_index: int, candidates: Mapping[int, float], count_max: int
) -> list[Move]:
    """The moves that relieve the worker ``hot_index``, one after the other, until it is no longer lopsided.

    ``loads`` by worker index and ``candidates`` by connection row, both in cores.
    """
    after, left = dict(loads), dict(candidates)
    moves: list[Move] = []
    while len(moves) < count_max and is_lopsided(list(after.values())):
        move = choose_move(after, hot_index, left)
        if move is None:
            break
        moves.append(move)
        moved = left.pop(move.row)
        after[hot_index] -= moved
        after[move.to_index] += moved
    return moves


def choose_move(loads: Mapping[int, float], hot_index: int, candidates: Mapping[int, float]) -> Move | None:
    """The move from the worker ``hot_index`` to the idlest one that levels the two best; None when none helps."""
    cold_index = min(loads, key=lambda index: (loads[index], index))
    hot, cold = loads[hot_index], loads[cold_index]
    helpful = [
        row
        for row, part in candidates.items()
        if part and part >= hot * PART_MIN and cold + part <= hot * (1 - GAIN_MIN)
    ]
    if not helpful:
        return None
    row = min(helpful, key=lambda row: (max(hot - candidates[row], cold + candidates[row]), row))
    return Move(row, cold_index)
