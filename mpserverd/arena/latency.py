"""The latency histogram: 128 buckets, four to an octave, from 1,024 ns up, in the manner of floating point numbers.

Bucket *i* begins at ``(4 + i % 4) * 2**(8 + i // 4)`` ns, so a bucket is at most a quarter wider than its lower edge.
What is faster than 1,024 ns counts in bucket 0, what is slower than 2**42 ns (73 minutes) in the last one.

Pure. The worker fills the buckets (one writer a row), reports read them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mpserverd.arena.state import LATENCY_BUCKETS

BUCKETS_PER_OCTAVE = 4
FIRST_OCTAVE = 10
LATENCY_NS_MIN = 1 << FIRST_OCTAVE
LATENCY_NS_MAX = (1 << (FIRST_OCTAVE + LATENCY_BUCKETS // BUCKETS_PER_OCTAVE)) - 1

Integers = npt.NDArray[np.int64] | npt.NDArray[np.uint64]


def bucket_index(latencies_ns: Integers) -> npt.NDArray[np.intp]:
    """The bucket of each latency. Exact: no value near an edge is rounded over it."""
    inside = np.clip(latencies_ns, LATENCY_NS_MIN, LATENCY_NS_MAX).astype(np.float64)  # below 2**53: nothing is rounded
    mantissa, exponent = np.frexp(inside)  # mantissa in [0.5, 1)
    octave = exponent.astype(np.intp) - (FIRST_OCTAVE + 1)
    quarter = (mantissa * (2 * BUCKETS_PER_OCTAVE)).astype(np.intp) - BUCKETS_PER_OCTAVE
    return octave * BUCKETS_PER_OCTAVE + quarter


def bucket_of(latency_ns: int) -> int:
    """The bucket of one latency: the same as ``bucket_index``, without numpy's cost for a single number."""
    inside = min(max(latency_ns, LATENCY_NS_MIN), LATENCY_NS_MAX)
    octave = inside.bit_length() - 1
    quarter = (inside >> (octave - 2)) % BUCKETS_PER_OCTAVE
    return (octave - FIRST_OCTAVE) * BUCKETS_PER_OCTAVE + quarter


def bucket_edges_ns() -> npt.NDArray[np.float64]:
    """Lower edges of all buckets and, last, the upper edge of the last: LATENCY_BUCKETS + 1 numbers."""
    octave, quarter = np.divmod(np.arange(LATENCY_BUCKETS + 1), BUCKETS_PER_OCTAVE)
    edges: npt.NDArray[np.float64] = np.ldexp((BUCKETS_PER_OCTAVE + quarter) * 1.0, FIRST_OCTAVE - 2 + octave)
    return edges


def quantiles_ns(counts: npt.NDArray[np.uint64], qs: Sequence[float]) -> npt.NDArray[np.float64]:
    """For each row of ``counts`` (rows x LATENCY_BUCKETS) the latency below which a share ``q`` of the samples lies.

    Within a bucket the samples are taken as evenly spread. NaN for a row without samples. Shape: rows x len(qs).
    """
    up_to = np.cumsum(counts, axis=1, dtype=np.float64)
    total = up_to[:, -1]
    edges = bucket_edges_ns()
    row = np.arange(len(counts))
    found = np.full((len(counts), len(qs)), np.nan)
    filled = total > 0
    for number, q in enumerate(qs):
        wanted = np.clip(q, 0.0, 1.0) * total
        bucket = np.minimum((up_to < wanted[:, None]).sum(axis=1), LATENCY_BUCKETS - 1)
        inside = counts[row, bucket].astype(np.float64)
        below = up_to[row, bucket] - inside
        share = np.divide(wanted - below, inside, out=np.zeros(len(counts)), where=inside > 0)
        values = edges[bucket] + share * (edges[bucket + 1] - edges[bucket])
        found[filled, number] = values[filled]
    return found


def percentiles(counts: npt.NDArray[np.uint64], qs: Sequence[float]) -> list[float | None]:
    """The same for one histogram, as plain numbers in ns; None without samples."""
    return [None if np.isnan(value) else float(value) for value in quantiles_ns(counts.reshape(1, -1), qs)[0]]
