"""The last thousand things that happened, for ``mpserverctl events``, numbered; what was pushed out is a gap."""

from __future__ import annotations

import collections
import time
from typing import Any

from mpserverd.log_text import plain_value

EVENTS_MAX = 1000


class EventRing:
    """Events of the supervisor and of its children, oldest first."""

    def __init__(self, length_max: int = EVENTS_MAX) -> None:
        self._events: collections.deque[dict[str, Any]] = collections.deque(maxlen=length_max)
        self._number = 0

    def add(self, kind: str, /, *, source: str = "supervisor", **fields: Any) -> None:
        """``kind`` is constant text, such as "child died"; values that JSON does not know become words."""
        self._number += 1
        known = {key: value if type(value) in _JSON else plain_value(value) for key, value in fields.items()}
        self._events.append(
            {**known, "number": self._number, "unix_ns": time.time_ns(), "source": source, "kind": kind}
        )

    def since(self, number: int) -> list[dict[str, Any]]:
        """All events after that number that are still known."""
        return [event for event in self._events if event["number"] > number]


_JSON = {str, int, float, bool, type(None), list, dict}
"""Exactly these: an enum that is an int too has a word that says more."""
