"""Which worker gets a connection."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpserverd.supervisor.placement import (
    BUSY_CORES,
    Load,
    Move,
    choose,
    choose_move,
    choose_moves,
    is_lopsided,
    shares,
)


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


# -- rebalancing


def test_one_worker_is_never_lopsided() -> None:
    assert not is_lopsided([1.0])
    assert not is_lopsided([])


def test_a_worker_with_more_than_half_above_the_mean_is_relieved() -> None:
    assert is_lopsided([0.8, 0.2])
    assert not is_lopsided([0.7, 0.3])


def test_nobody_moves_while_there_is_little_to_do() -> None:
    assert not is_lopsided([BUSY_CORES, 0.0])


def test_the_connection_that_levels_two_workers_best_moves_to_the_idlest() -> None:
    loads = {0: 1.0, 1: 0.2, 2: 0.0}
    assert choose_move(loads, 0, {5: 0.1, 6: 0.5, 7: 0.9}) == Move(6, 2)


def test_moves_stop_when_the_worker_is_relieved_and_at_their_limit() -> None:
    loads, candidates = {0: 1.0, 1: 0.0, 2: 0.0}, dict.fromkeys(range(10), 0.1)
    assert [move.to_index for move in choose_moves(loads, 0, candidates, 9)] == [1, 2, 1, 2, 1]
    assert len(choose_moves(loads, 0, candidates, 2)) == 2


def test_a_worker_s_load_is_shared_out_by_weight() -> None:
    assert shares(0.8, {3: 100.0, 4: 300.0}) == {3: pytest.approx(0.2), 4: pytest.approx(0.6)}
    assert shares(0.8, {3: 0.0}) == {3: 0.0}


def test_a_worker_with_many_small_connections_is_relieved_too() -> None:
    assert choose_move({0: 1.0, 1: 0.0}, 0, dict.fromkeys(range(40), 0.025)) == Move(0, 1)


def test_a_worker_with_one_hot_connection_keeps_it() -> None:
    assert choose_move({0: 1.0, 1: 0.0}, 0, {5: 1.0}) is None


def test_silent_connections_are_left_where_they_are() -> None:
    assert choose_move({0: 1.0, 1: 0.0}, 0, {5: 0.0, 6: 0.001}) is None
    assert choose_move({0: 1.0, 1: 0.0}, 0, {}) is None


RATES = st.just(0.0) | st.floats(1e-3, 1e7)
"""Half of the smallest float is nothing."""


@given(st.lists(RATES, min_size=1, max_size=40), st.integers(2, 8), st.randoms(use_true_random=False))
def test_moves_end_and_each_lowers_the_larger_of_two_loads(
    rates: list[float], workers: int, chance: random.Random
) -> None:
    """Without a rule of time too: no connection is sent to and fro for ever."""
    home = {row: chance.randrange(workers) for row in range(len(rates))}
    for _ in range(40 * len(rates)):
        loads = {index: sum(rates[row] for row, at in home.items() if at == index) for index in range(workers)}
        hot = max(loads, key=lambda index: loads[index])
        move = choose_move(loads, hot, {row: rates[row] for row, at in home.items() if at == hot})
        if move is None:
            return
        assert max(loads[hot] - rates[move.row], loads[move.to_index] + rates[move.row]) < loads[hot]
        home[move.row] = move.to_index
    raise AssertionError("moves go on for ever")
