"""The life of a child as a table."""

from __future__ import annotations

import itertools

import pytest

from mpserverd.supervisor.states import (
    TRANSITIONS,
    ChildEvent,
    ChildState,
    IllegalMoveError,
    next_state,
    state_from_number,
)

PAIRS = list(itertools.product(ChildState, ChildEvent))


@pytest.mark.parametrize(("state", "event"), PAIRS, ids=lambda each: each.value)
def test_every_pair_is_a_move_of_the_table_or_raises(state: ChildState, event: ChildEvent) -> None:
    if (state, event) in TRANSITIONS:
        assert next_state(state, event) is TRANSITIONS[state, event]
    else:
        with pytest.raises(IllegalMoveError, match=state.value):
            next_state(state, event)


def test_a_process_ends_only_by_its_exit() -> None:
    """Adoption may begin when a child is no longer alive, so nothing but EXITED may say so."""
    for (state, event), new in TRANSITIONS.items():
        if state.alive and not new.alive:
            assert event is ChildEvent.EXITED


def test_every_living_child_can_be_killed_and_can_exit() -> None:
    for state in ChildState:
        if state.alive:
            assert next_state(state, ChildEvent.SIGKILLED) is ChildState.KILLED
            assert next_state(state, ChildEvent.EXITED) is ChildState.DEAD


def test_every_state_can_be_reached() -> None:
    assert {ChildState.DEAD, *TRANSITIONS.values()} == set(ChildState)


def test_numbers_of_states_come_back() -> None:
    assert [state_from_number(state.number) for state in ChildState] == list(ChildState)
    assert ChildState.DEAD.number == 0, "a slot that was never used reads as dead"
