"""Counts of durations in logarithmic buckets: bounded memory, mergeable, percentiles within 3 percent. Pure."""

from __future__ import annotations

from collections.abc import Mapping

SUB_BITS = 5
"""Each power of two is divided into 32 buckets."""


class Histogram:
    """Durations in ns. Those below 0 count as 0."""

    __slots__ = ("count", "counts", "max_ns")

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.count = 0
        self.max_ns = 0

    def add(self, duration_ns: int) -> None:
        duration_ns = max(duration_ns, 0)
        bucket = bucket_of(duration_ns)
        self.counts[bucket] = self.counts.get(bucket, 0) + 1
        self.count += 1
        self.max_ns = max(self.max_ns, duration_ns)

    def merge(self, other: Histogram) -> None:
        for bucket, count in other.counts.items():
            self.counts[bucket] = self.counts.get(bucket, 0) + count
        self.count += other.count
        self.max_ns = max(self.max_ns, other.max_ns)

    def percentile_ns(self, percent: float) -> int:
        """A duration that ``percent`` of all are not above: the upper end of its bucket, at most the maximum."""
        wanted, seen = percent / 100 * self.count, 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            if seen >= wanted:
                return min(bucket_end_ns(bucket) - 1, self.max_ns)
        return self.max_ns

    def as_ms(self, *percents: float) -> dict[str, float] | None:
        """``{"p50": …, "max": …}`` in milliseconds; None when nothing was counted."""
        if not self.count:
            return None
        named = {f"p{percent:g}".replace(".", ""): self.percentile_ns(percent) for percent in percents}
        return {name: round(value / 1e6, 3) for name, value in (named | {"max": self.max_ns}).items()}

    def to_json(self) -> dict[str, object]:
        return {"counts": {str(bucket): count for bucket, count in self.counts.items()}, "max_ns": self.max_ns}

    @classmethod
    def from_json(cls, body: Mapping[str, object]) -> Histogram:
        histogram = cls()
        counts, max_ns = body["counts"], body["max_ns"]
        assert isinstance(counts, dict) and isinstance(max_ns, int)
        histogram.counts = {int(bucket): int(count) for bucket, count in counts.items()}
        histogram.count = sum(histogram.counts.values())
        histogram.max_ns = max_ns
        return histogram


def bucket_of(duration_ns: int) -> int:
    """Below 2**SUB_BITS each number has its own bucket."""
    shift = duration_ns.bit_length() - SUB_BITS - 1
    if shift <= 0:
        return duration_ns
    return (shift << SUB_BITS) + (duration_ns >> shift)


def bucket_end_ns(bucket: int) -> int:
    """The first number after the bucket."""
    if bucket < 2 << SUB_BITS:
        return bucket + 1
    shift = (bucket >> SUB_BITS) - 1
    return (bucket - (shift << SUB_BITS) + 1) << shift
