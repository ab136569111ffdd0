"""Leases and restarts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpserverd.supervisor.policy import GIVE_UP_DEATHS, QUIET_S, RestartPolicy, lease_count


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 10_000), st.integers(0, 64))
def test_a_lease_is_never_more_than_wanted_or_free_and_leaves_half(free: int, wanted: int, askers: int) -> None:
    count = lease_count(free, wanted, askers)
    assert 0 <= count <= min(free, wanted)
    assert count <= max(1, free // 2)
    assert count > 0 or not free or not wanted


def test_askers_share_half_of_what_is_free() -> None:
    assert [lease_count(100, 1000, askers) for askers in (1, 2, 5)] == [50, 25, 10]


def test_backoff_doubles_up_to_its_bound() -> None:
    policy = RestartPolicy(1.0)
    waits = [policy.died(now, 1.0, was_ready=True) for now in range(6)]
    assert waits == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]


def test_backoff_begins_anew_after_a_quiet_minute() -> None:
    policy = RestartPolicy(30.0)
    for now in range(5):
        policy.died(float(now), 1.0, was_ready=True)
    assert policy.died(100.0, QUIET_S, was_ready=True) == 0.1


def test_ten_deaths_within_a_minute_before_ready_are_the_end() -> None:
    policy = RestartPolicy(0.1)
    waits = [policy.died(now * 5.0, 0.1, was_ready=False) for now in range(GIVE_UP_DEATHS)]
    assert None not in waits[:-1]
    assert waits[-1] is None


def test_slow_failures_are_tried_for_ever() -> None:
    policy = RestartPolicy(30.0)
    assert None not in [policy.died(now * 30.0, 0.1, was_ready=False) for now in range(50)]


def test_a_child_that_was_ready_once_starts_with_a_clean_record() -> None:
    policy = RestartPolicy(0.1)
    for now in range(GIVE_UP_DEATHS - 1):
        policy.died(float(now), 0.1, was_ready=False)
    policy.ran()
    assert policy.died(20.0, 5.0, was_ready=True) is not None
    assert policy.died(21.0, 0.1, was_ready=False) is not None


@pytest.mark.parametrize("deaths", [GIVE_UP_DEATHS, 5 * GIVE_UP_DEATHS])
def test_the_storer_is_never_given_up(deaths: int) -> None:
    policy = RestartPolicy(0.1, may_give_up=False)
    assert None not in [policy.died(now / 10, 0.0, was_ready=False) for now in range(deaths)]
