"""What the time index beside a segment proves about the catalog: a pair is written before its commit, so at most one is
ever ahead of it. Two pairs ahead mean that a commit is missing: the catalog is older than the files.
"""

from __future__ import annotations

import itertools
import os

from mpserverd.limits import SEGMENT_BYTES_MAX
from mpserverd.storer.segment_file import INDEX_PAIR, index_name

_TAIL_BYTES = 64 * INDEX_PAIR.size


def read_tail(directory: str, first: int) -> list[int]:
    """The last offsets in the index of a segment, as they stand there; none where it is missing or makes no sense."""
    try:
        descriptor = os.open(os.path.join(directory, index_name(first)), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        size = os.fstat(descriptor).st_size
        size -= size % INDEX_PAIR.size
        start = max(0, size - _TAIL_BYTES)
        tail = os.pread(descriptor, size - start, start)
    except OSError:
        return []
    finally:
        os.close(descriptor)
    pairs = list(INDEX_PAIR.iter_unpack(tail[: len(tail) - len(tail) % INDEX_PAIR.size]))
    offsets = [offset for offset, unix_ns in pairs if unix_ns]
    limits = [first, *offsets, first + SEGMENT_BYTES_MAX]
    return offsets if all(a <= b for a, b in itertools.pairwise(limits)) else []


def ahead(offsets: list[int], durable: int) -> list[int]:
    """Different offsets behind ``durable``, rising."""
    return sorted({offset for offset in offsets if offset > durable})
