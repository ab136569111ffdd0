"""Time until the disk is full: from the rate of the last minutes, ours and everybody's, and what retention holds."""

from __future__ import annotations

import pytest

from mpserverd.storer.filling import FAR_S, SPAN_S_MIN, WINDOW_S, Filling, Look, until_full_s

MIB = 1 << 20


@pytest.mark.parametrize(
    ("room", "ours_per_s", "others_per_s", "may_grow", "expected"),
    [
        (0, 10, 0, None, 0),
        (-5, 0, 0, None, 0),
        (1000, 10, 0, None, 100),
        (1000, 0, 10, None, 100),
        (1000, 10, 10, None, 50),
        (1000, 10, -10, None, None),
        (1000, -10, 0, None, None),
        (1000, 10, 0, 2000, 100),
        (1000, 10, 0, 999, None),  # retention holds it
        (1000, 10, 10, 300, 30 + 400 / 10),  # ours stop after 30 s, the others go on
        (1000, 10, -1, 999, None),
        (1000, -5, 10, 0, 200),
    ],
)
def test_until_full(
    room: float, ours_per_s: float, others_per_s: float, may_grow: int | None, expected: float | None
) -> None:
    found = until_full_s(room, ours_per_s, others_per_s, may_grow)
    assert found == (None if expected is None else pytest.approx(expected))


def filled(
    seconds: int, ours_per_s: int, others_per_s: int = 0, *, free: int = 1000 * MIB, step: int = 64 * MIB
) -> Filling:
    """A look a second; files grow in steps, content steadily."""
    filling = Filling()
    for at in range(seconds + 1):
        content = ours_per_s * at
        allocated = content + -content % step
        filling.note(Look(at, content, allocated, free - allocated - others_per_s * at, content))
    return filling


def test_the_estimate_does_not_jump_with_the_steps_in_which_files_grow() -> None:
    for seconds in range(3, 100):
        found = filled(seconds, MIB).time_to_full_s(0, None)
        assert found == pytest.approx(1000 - seconds)


def test_what_others_write_counts_and_what_must_stay_free_does_not() -> None:
    assert filled(50, MIB, MIB).time_to_full_s(100 * MIB, None) == pytest.approx((1000 - 100 - 100) / 2)


def test_without_a_rate_there_is_no_time() -> None:
    assert Filling().time_to_full_s(0, None) is None
    assert filled(int(SPAN_S_MIN) - 1, MIB).time_to_full_s(0, None) is None
    assert filled(60, 0).time_to_full_s(0, None) is None
    assert filled(60, 0).time_to_full_s(2000 * MIB, None) == 0, "it is full already"
    assert filled(60, 1, free=int(3 * FAR_S), step=1).time_to_full_s(0, None) is None, "not in a lifetime"


def test_an_old_rate_is_forgotten() -> None:
    filling = filled(100, MIB)
    last = filling._looks[-1]
    for at in range(101, 102 + int(WINDOW_S)):
        filling.note(Look(at, last.content_bytes, last.allocated_bytes, last.free_bytes, last.stored_bytes))
    assert filling.time_to_full_s(0, None) is None
    assert filling.stored_per_s == 0
