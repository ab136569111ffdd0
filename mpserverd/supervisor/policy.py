"""How many chunks to lease, and when to fork a dead child again.

Pure: time comes in as an argument (monotonic seconds).
"""

from __future__ import annotations

import dataclasses

BACKOFF_S_MIN = 0.1
QUIET_S = 60.0
"""After running so long a child's death counts as its first again."""
GIVE_UP_DEATHS = 10
GIVE_UP_WINDOW_S = 60.0


def lease_count(free_count: int, wanted_count: int, asker_count: int) -> int:
    """Chunks to lease to one of ``asker_count`` workers: its part of half of what is free, at least one if any is.

    Half stays free, so that whoever asks next is not starved by who asked first.
    """
    if free_count <= 0 or wanted_count <= 0:
        return 0
    return min(wanted_count, max(1, free_count // 2 // max(1, asker_count)))


@dataclasses.dataclass(slots=True)
class RestartPolicy:
    """The deaths of one child index. ``died`` says when to try again; None means never."""

    backoff_s_max: float
    may_give_up: bool = True
    _backoff_s: float = 0.0
    _unready_deaths_s: list[float] = dataclasses.field(default_factory=list)

    def ran(self) -> None:
        """The child said READY: what follows is no failure to start."""
        self._unready_deaths_s.clear()

    def died(self, now_s: float, lived_s: float, *, was_ready: bool) -> float | None:
        """Seconds to wait before the next fork, or None to give up."""
        if lived_s >= QUIET_S:
            self._backoff_s = 0.0
        self._backoff_s = min(max(BACKOFF_S_MIN, self._backoff_s * 2), self.backoff_s_max)
        if not was_ready:
            recent = [at for at in self._unready_deaths_s if now_s - at < GIVE_UP_WINDOW_S]
            self._unready_deaths_s = [*recent, now_s]
            if self.may_give_up and len(self._unready_deaths_s) >= GIVE_UP_DEATHS:
                return None
        return self._backoff_s
