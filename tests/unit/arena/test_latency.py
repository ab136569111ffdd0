"""The latency histogram: every latency has one bucket, and what is read back is as near as a bucket is wide."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpserverd.arena.latency import (
    LATENCY_NS_MAX,
    LATENCY_NS_MIN,
    bucket_edges_ns,
    bucket_index,
    bucket_of,
    percentiles,
    quantiles_ns,
)
from mpserverd.arena.state import LATENCY_BUCKETS


def index_of(latency_ns: int) -> int:
    return int(bucket_index(np.array([latency_ns], np.int64))[0])


@given(st.integers(LATENCY_NS_MIN, LATENCY_NS_MAX))
def test_a_latency_lies_between_the_edges_of_its_bucket(latency_ns: int) -> None:
    edges = bucket_edges_ns()
    index = index_of(latency_ns)
    assert edges[index] <= latency_ns < edges[index + 1]


def test_edges_are_exact_on_both_sides() -> None:
    edges = bucket_edges_ns().astype(np.int64)
    assert np.array_equal(bucket_index(edges[:-1]), np.arange(LATENCY_BUCKETS))
    assert np.array_equal(bucket_index(edges[1:] - 1), np.arange(LATENCY_BUCKETS))


def test_no_bucket_is_wider_than_a_quarter_of_its_lower_edge() -> None:
    edges = bucket_edges_ns()
    assert np.all(np.diff(edges) <= edges[:-1] / 4)


@pytest.mark.parametrize("latency_ns", [-(1 << 62), -1, 0, 1, 1023])
def test_what_is_faster_than_the_first_edge_counts_in_the_first_bucket(latency_ns: int) -> None:
    assert index_of(latency_ns) == 0


@pytest.mark.parametrize("latency_ns", [LATENCY_NS_MAX, LATENCY_NS_MAX + 1, (1 << 63) - 1])
def test_what_is_slower_than_the_last_edge_counts_in_the_last_bucket(latency_ns: int) -> None:
    assert index_of(latency_ns) == LATENCY_BUCKETS - 1


def test_unsigned_arrays_and_empty_ones_are_taken_too() -> None:
    assert bucket_index(np.array([5000, 1 << 63], np.uint64)).tolist() == [index_of(5000), LATENCY_BUCKETS - 1]
    assert len(bucket_index(np.array([], np.int64))) == 0


@given(
    st.lists(st.integers(LATENCY_NS_MIN, 10**12), min_size=1, max_size=200), st.sampled_from([0.5, 0.99, 0.999, 1.0])
)
def test_a_percentile_is_within_a_bucket_of_the_true_one(samples: list[int], q: float) -> None:
    counts = np.bincount(bucket_index(np.array(samples, np.int64)), minlength=LATENCY_BUCKETS).astype(np.uint64)
    true = sorted(samples)[max(0, math.ceil(q * len(samples)) - 1)]
    found = percentiles(counts, [q])[0]
    assert found is not None
    assert true / 1.25 <= found <= true * 1.25


def test_percentiles_of_nothing_are_none() -> None:
    assert percentiles(np.zeros(LATENCY_BUCKETS, np.uint64), [0.5, 0.99]) == [None, None]


def test_many_histograms_at_once_give_what_each_gives_alone() -> None:
    rng = np.random.default_rng(3)
    counts = rng.integers(0, 50, (20, LATENCY_BUCKETS)).astype(np.uint64)
    counts[7] = 0
    together = quantiles_ns(counts, [0.5, 0.999])
    for row in range(20):
        alone = percentiles(counts[row], [0.5, 0.999])
        assert [None if np.isnan(v) else float(v) for v in together[row]] == alone


def test_one_latency_falls_into_the_same_bucket_as_an_array_of_it() -> None:
    edges = [int(edge) for edge in bucket_edges_ns()]
    values = sorted({0, 1, *(edge + step for edge in edges for step in (-1, 0, 1))})
    assert [bucket_of(value) for value in values] == bucket_index(np.array(values, np.int64)).tolist()
