"""Which worker gets a connection."""

from __future__ import annotations

from collections import Counter

import pytest

from mpserverd.supervisor.placement import Load, choose


def place_many(loads: list[Load], count: int) -> Counter[int]:
    """Place ``count`` connections one after the other, without a new measurement."""
    placed: Counter[int] = Counter()
    last = -1
    for _ in range(count):
        now = [
            Load(load.index, load.rate, load.connection_count + placed[load.index], placed[load.index])
            for load in loads
        ]
        last = choose(now, last)
        placed[last] += 1
    return placed


def test_idle_workers_take_turns() -> None:
    loads = [Load(index, 0.0, 0) for index in range(4)]
    last, order = -1, []
    for _ in range(8):
        last = choose(loads, last)
        order.append(last)
    assert order == [0, 1, 2, 3, 0, 1, 2, 3]


def test_the_least_loaded_worker_is_chosen() -> None:
    assert choose([Load(0, 50_000.0, 5), Load(1, 10_000.0, 5), Load(2, 20_000.0, 5)], last_index=0) == 1


def test_a_burst_of_connections_spreads_before_it_is_measured() -> None:
    placed = place_many([Load(0, 40_000.0, 4), Load(1, 40_000.0, 4), Load(2, 0.0, 0)], 12)
    assert placed[2] <= 7, "the empty worker counts what it was given"
    assert min(placed[0], placed[1]) >= 2


def test_silent_connections_spread_too() -> None:
    assert set(place_many([Load(index, 0.0, 0) for index in range(3)], 9).values()) == {3}


def test_gaps_in_the_indices_do_no_harm() -> None:
    assert choose([Load(5, 0.0, 0), Load(9, 0.0, 0)], last_index=5) == 9
    assert choose([Load(5, 0.0, 0), Load(9, 0.0, 0)], last_index=9) == 5


def test_without_workers_there_is_nothing_to_choose() -> None:
    with pytest.raises(ValueError, match="no worker"):
        choose([], 0)
