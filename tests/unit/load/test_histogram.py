"""Histograms of durations are small, exact in count and maximum, and within 3 percent elsewhere."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from mpserverd.load.histogram import Histogram, bucket_end_ns, bucket_of

DURATIONS = st.lists(st.integers(0, 10**13), min_size=1, max_size=50)


@given(st.integers(0, 2**62))
def test_buckets_hold_their_number_and_are_narrow(duration_ns: int) -> None:
    bucket = bucket_of(duration_ns)
    end_ns = bucket_end_ns(bucket)
    assert duration_ns < end_ns
    assert bucket_of(end_ns) == bucket + 1
    assert end_ns - duration_ns <= max(1, duration_ns / 32)


@given(DURATIONS, st.sampled_from([1.0, 50.0, 99.0, 99.9, 100.0]))
def test_percentiles_are_within_3_percent(durations: list[int], percent: float) -> None:
    histogram = Histogram()
    for duration_ns in durations:
        histogram.add(duration_ns)
    wanted = -(-percent * len(durations) // 100)
    exact = sorted(durations)[int(wanted) - 1]
    assert exact <= histogram.percentile_ns(percent) <= exact * (1 + 1 / 32) + 1


@given(DURATIONS, DURATIONS)
def test_merged_histograms_are_one_of_everything(first: list[int], second: list[int]) -> None:
    parts, whole = (Histogram(), Histogram()), Histogram()
    for part, durations in zip(parts, (first, second), strict=True):
        for duration_ns in durations:
            part.add(duration_ns)
            whole.add(duration_ns)
    merged = Histogram.from_json(json.loads(json.dumps(parts[0].to_json())))
    merged.merge(parts[1])
    assert (merged.counts, merged.count, merged.max_ns) == (whole.counts, whole.count, whole.max_ns)


def test_an_empty_histogram_has_no_figures() -> None:
    assert Histogram().as_ms(50) is None


def test_figures_are_milliseconds_by_name() -> None:
    histogram = Histogram()
    for duration_ns in (1_000_000, -5):
        histogram.add(duration_ns)
    figures = histogram.as_ms(50, 99.9)
    assert figures == {"p50": 0.0, "p999": 1.0, "max": 1.0}
