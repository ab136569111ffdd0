"""Schedules do not drift, and pauses before new attempts grow within bounds."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpserverd.client.pacing import NS_PER_S, Backoff, Schedule

RATES = st.fractions(min_value=Fraction(1, 100), max_value=10**8, max_denominator=1000)


def test_batches_of_the_usual_client_are_80_ms_apart() -> None:
    schedule = Schedule(1_000, Fraction(10_050), 804, 3_000)
    assert [schedule.due_ns(index) for index in (0, 803, 804, 1608)] == [1_000, 1_000, 80_001_000, 160_001_000]


def test_a_year_of_batches_ends_to_the_nanosecond() -> None:
    year_s = 365 * 86_400
    schedule = Schedule(0, Fraction(10_050), 804, 10_050 * year_s)
    assert schedule.due_ns(10_050 * year_s) == schedule.end_ns == year_s * NS_PER_S


@given(rate=RATES, batch=st.integers(1, 5000), batches=st.integers(1, 50), late_ns=st.integers(-3, 3))
def test_what_is_due_agrees_with_when_it_is_due(rate: Fraction, batch: int, batches: int, late_ns: int) -> None:
    schedule = Schedule(12_345, rate, batch, batch * 100)
    now_ns = schedule.due_ns(batches * batch) + late_ns
    due = schedule.due_packets(now_ns)
    assert due == 0 or schedule.due_ns(due - 1) <= now_ns
    assert due == schedule.packets or schedule.due_ns(due) > now_ns


def test_nothing_is_due_before_the_start_and_no_more_than_all_ever() -> None:
    schedule = Schedule(500, Fraction(1000), 10, 25)
    assert schedule.due_packets(499) == 0
    assert schedule.due_packets(500) == 10
    assert schedule.due_packets(10**15) == 25
    assert [schedule.batch_end(index) for index in (0, 9, 10, 24)] == [10, 10, 20, 25]


@pytest.mark.parametrize(("rate", "batch", "packets"), [(0, 1, 1), (1, 0, 1), (1, 1, -1)])
def test_impossible_schedules_are_refused(rate: int, batch: int, packets: int) -> None:
    with pytest.raises(ValueError, match="a schedule of"):
        Schedule(0, Fraction(rate), batch, packets)


@given(seed=st.integers(0, 2**64))
def test_pauses_double_up_to_the_maximum_and_lose_at_most_half(seed: int) -> None:
    backoff = Backoff(100, 1000, seed)
    for full_ns in (100, 200, 400, 800, 1000, 1000):
        assert full_ns / 2 <= backoff.next_ns() <= full_ns
    backoff.reset()
    assert backoff.next_ns() <= 100


def test_pauses_are_those_of_the_seed() -> None:
    first, again, other = (Backoff(10**9, 10**10, seed) for seed in (7, 7, 8))
    pauses = [first.next_ns() for _ in range(5)]
    assert pauses == [again.next_ns() for _ in range(5)]
    assert pauses != [other.next_ns() for _ in range(5)]
