"""Which worker gets a connection. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


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
