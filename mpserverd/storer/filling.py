"""In how long the disk will be full, from what it took in the last minutes. Pure: sizes and times come in.

Two things take space: our segments, and everybody else. Ours are reckoned by their content, because their files grow in
steps; the room that is allocated and not yet filled counts as room. What retention holds below a limit stops growing
there. It does not know what was configured: the caller says how much our segments may still grow.
"""

from __future__ import annotations

import collections
import dataclasses

WINDOW_S = 120.0
SPAN_S_MIN = 2.0
"""With less than this between the first and the last look there is no rate yet."""
FAR_S = 10 * 365 * 86400.0
"""What is so far away is never."""


@dataclasses.dataclass(frozen=True, slots=True)
class Look:
    """One look at the disk. ``content_bytes`` of all segments; ``allocated_bytes`` is what their files take.

    ``stored_bytes`` is everything that was ever stored, retired or not.
    """

    at_s: float
    content_bytes: int
    allocated_bytes: int
    free_bytes: int
    stored_bytes: int

    @property
    def others_bytes(self) -> int:
        """Grows as others take space; its zero has no meaning."""
        return -(self.free_bytes + self.allocated_bytes)


class Filling:
    """``note`` each look; ``time_to_full_s`` is reckoned from those of the last WINDOW_S."""

    def __init__(self) -> None:
        self._looks: collections.deque[Look] = collections.deque()

    def note(self, look: Look) -> None:
        self._looks.append(look)
        while look.at_s - self._looks[0].at_s > WINDOW_S:
            self._looks.popleft()

    @property
    def stored_per_s(self) -> float:
        """Bytes; 0 while unknown."""
        return self._rate("stored_bytes")

    def time_to_full_s(self, kept_bytes: int, may_grow_bytes: int | None, retirable_bytes: int = 0) -> float | None:
        """None: not at this rate. ``kept_bytes`` must stay free; our segments grow by ``may_grow_bytes`` at most. Where
        ``retirable_bytes`` go for what must stay free, ours make room for themselves, and others use up those too."""
        if not self._looks:
            return None
        last = self._looks[-1]
        room = last.free_bytes - kept_bytes + last.allocated_bytes - last.content_bytes
        ours_per_s = 0.0 if retirable_bytes > 0 else self._rate("content_bytes")
        found = until_full_s(room + max(0, retirable_bytes), ours_per_s, self._rate("others_bytes"), may_grow_bytes)
        return None if found is None or found > FAR_S else found

    def _rate(self, name: str) -> float:
        first, last = self._looks[0], self._looks[-1]
        seconds = last.at_s - first.at_s
        return (getattr(last, name) - getattr(first, name)) / seconds if seconds >= SPAN_S_MIN else 0.0


def until_full_s(room: float, ours_per_s: float, others_per_s: float, may_grow_bytes: int | None) -> float | None:
    """Seconds until both have used up ``room``; ours stop when they have grown by ``may_grow_bytes``."""
    if room <= 0:
        return 0.0
    together = ours_per_s + others_per_s
    alone = room / together if together > 0 else None
    if may_grow_bytes is None or ours_per_s <= 0:
        return alone
    ours_stop_s = may_grow_bytes / ours_per_s
    if alone is not None and alone <= ours_stop_s:
        return alone
    left = room - together * ours_stop_s
    return ours_stop_s + left / others_per_s if others_per_s > 0 else None
