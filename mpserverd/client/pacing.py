"""When things are due: batches on an absolute schedule, and attempts to connect with growing pauses. Pure.

Rules: times are integer nanoseconds of one monotonic clock and come in as arguments. Batch k is due at a time computed
from k alone, never from when the batch before it went out, so that nothing drifts and a client that was stalled has
its late batches on the schedule still (no coordinated omission).
"""

from __future__ import annotations

import random
from fractions import Fraction

NS_PER_S = 1_000_000_000


class Schedule:
    """Packets [0, packets) of one client, in batches, evenly spread from ``start_ns`` on. Never changes."""

    __slots__ = ("_per", "_period", "batch", "packets", "start_ns")

    def __init__(self, start_ns: int, rate: Fraction, batch: int, packets: int) -> None:
        """``rate`` is packets a second, above 0."""
        if rate <= 0 or batch < 1 or packets < 0:
            raise ValueError(f"a schedule of {packets} packets at {rate}/s in batches of {batch}")
        self.start_ns, self.batch, self.packets = start_ns, batch, packets
        # a batch takes _period / _per nanoseconds; ints, because floats drift after 2**53 of them
        self._period = batch * NS_PER_S * rate.denominator
        self._per = rate.numerator

    def due_ns(self, index: int) -> int:
        """When the batch that packet ``index`` belongs to is due."""
        return self.start_ns + index // self.batch * self._period // self._per

    def due_packets(self, now_ns: int) -> int:
        """How many packets are due at ``now_ns``: packets [0, that) should have been sent."""
        elapsed_ns = now_ns - self.start_ns
        if elapsed_ns < 0:
            return 0
        batches = ((elapsed_ns + 1) * self._per - 1) // self._period + 1
        return min(batches * self.batch, self.packets)

    def batch_end(self, index: int) -> int:
        """Index after the last packet of the batch that packet ``index`` belongs to."""
        return min((index // self.batch + 1) * self.batch, self.packets)

    @property
    def end_ns(self) -> int:
        """When the time that the packets stand for is over: ``packets / rate`` after the start."""
        return self.start_ns + self.packets * self._period // (self.batch * self._per)


class Backoff:
    """Pauses between attempts: doubling from ``first_ns`` to ``max_ns``, each shortened at random by up to a half so
    that clients who lost their connections together do not come back together."""

    def __init__(self, first_ns: int, max_ns: int, seed: int) -> None:
        self._first_ns, self._max_ns = first_ns, max_ns
        self._random = random.Random(seed)
        self._failures = 0

    def next_ns(self) -> int:
        """The pause after one more failure."""
        pause_ns = min(self._first_ns << min(self._failures, 32), self._max_ns)
        self._failures += 1
        return pause_ns - self._random.randrange(pause_ns // 2 + 1)

    def reset(self) -> None:
        """An attempt succeeded; the next pause is short again."""
        self._failures = 0
