"""The ring of events."""

from __future__ import annotations

import json

from mpserverd.arena.state import CloseReason
from mpserverd.supervisor.events import EventRing


def test_events_are_numbered_and_old_ones_are_pushed_out() -> None:
    ring = EventRing(3)
    for number in range(5):
        ring.add("child died", child=f"worker-{number}")
    assert [event["number"] for event in ring.since(0)] == [3, 4, 5]
    assert [event["child"] for event in ring.since(4)] == ["worker-4"]


def test_whatever_stands_in_an_event_can_be_sent_as_json() -> None:
    ring = EventRing()
    ring.add("connection ended", reason=CloseReason.TIMED_OUT, number=7, why=ValueError("x"))
    (event,) = json.loads(json.dumps(ring.since(0)))
    assert event["reason"] == "timed-out"
    assert event["number"] == 1, "a field cannot take the place of the number"
