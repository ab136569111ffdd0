"""The pure part: what is written, and from where."""

from __future__ import annotations

import random

import pytest

from mpserverd.storer.plan import (
    ChunkList,
    MissingChunkError,
    bounds_as_begun,
    extents,
    fitting_segment_bytes,
    overlap,
    published_holes,
    segment_bounds,
    target,
)

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def test_pieces_join_neighbours_and_keep_the_order() -> None:
    chunks = ChunkList(100, [0, 100, 200, 300], [500, 600, 0, 100], [0, 100, 200, 300])
    assert chunks.pieces(50, 350, 0, 4) == [(550, 150), (0, 150)]
    assert chunks.pieces(199, 201, 0, 4) == [(699, 1), (0, 1)]


@pytest.mark.parametrize(("first", "end"), [(0, 10), (250, 310), (390, 401)])
def test_bytes_without_a_chunk_are_an_error(first: int, end: int) -> None:
    chunks = ChunkList(100, [100, 200, 300], [0, 100, 200], [100, 200, 300])
    if first == 250:
        chunks = ChunkList(100, [100, 200, 400], [0, 100, 200], [100, 200, 400])
    with pytest.raises(MissingChunkError):
        chunks.pieces(first, end, 0, 3)


def test_a_stream_sees_only_its_own_part_of_the_list() -> None:
    chunks = ChunkList(100, [0, 100, 0, 100], [0, 100, 200, 300], [0, 100, 0, 100])
    assert chunks.pieces(0, 200, 2, 4) == [(200, 200)]
    with pytest.raises(MissingChunkError):
        chunks.pieces(0, 300, 0, 2)


def test_holes_below_durable_and_above_offered_do_not_count() -> None:
    assert published_holes([10, 20, 0, 50, 60, 1], 0, 100) == [(10, 20, 0), (50, 60, 1)]
    assert published_holes([10, 20, 0, 50, 60, 1], 20, 50) == []
    assert published_holes([90, 20, 0, 0, 0, 0], 0, 100) == [], "a slot that is being filled again"


def test_extents_leave_the_holes_out() -> None:
    assert extents(0, 100, []) == [(0, 100)]
    assert extents(0, 100, [(0, 10, 0), (50, 100, 0)]) == [(10, 50)]
    assert extents(10, 20, [(10, 20, 0)]) == []


def test_a_bounded_cycle_ends_with_a_packet_and_never_inside_a_hole() -> None:
    rng = random.Random(3)
    for _ in range(500):
        packet = rng.randrange(1, 50)
        durable = packet * rng.randrange(100)
        offered = durable + packet * rng.randrange(1, 200)
        first = durable + packet * rng.randrange(0, 150)
        hole = (first, min(first + packet * rng.randrange(1, 60), offered), 0)
        holes = [hole] if hole[0] < hole[1] else []
        end = target(durable, offered, holes, packet, rng.randrange(1, 3000))
        assert durable < end <= offered
        assert end % packet == 0
        assert not any(a < end < b for a, b, _ in holes)


def test_segments_begin_on_the_grid_or_at_the_durable_offset() -> None:
    assert segment_bounds(0, 0, 100) == (0, 100)
    assert segment_bounds(200, 200, 100) == (200, 300)
    assert segment_bounds(250, 120, 100) == (200, 300), "after a hole that ended inside"
    assert segment_bounds(250, 230, 100) == (230, 300), "after a file that failed"


def test_a_file_that_was_begun_is_gone_on_with_as_it_was_and_never_reached_over() -> None:
    begun = {100: 200, 200: 300}
    assert bounds_as_begun(100, (100, 400), begun) == (100, 200), "the grid became wider"
    assert bounds_as_begun(250, (240, 260), begun) == (200, 300), "the grid became narrower"
    assert bounds_as_begun(50, (50, 400), begun) == (50, 100), "the file before them failed"
    assert bounds_as_begun(300, (300, 400), begun) == (300, 400)


def test_segments_shrink_where_many_streams_share_a_bounded_spool() -> None:
    assert fitting_segment_bytes(64 * MIB, 64 * KIB, 0, 10_000) == 64 * MIB
    assert fitting_segment_bytes(64 * MIB, 64 * KIB, 10 * GIB, 10) == 64 * MIB
    assert fitting_segment_bytes(64 * MIB, 64 * KIB, 10 * GIB, 1000) == 2 * MIB
    assert fitting_segment_bytes(64 * MIB, 64 * KIB, 10 * GIB, 10_000) == 1 * MIB
    assert fitting_segment_bytes(3 * MIB, MIB, 1 * MIB, 10) == 3 * MIB, "half of it is no multiple of a chunk"


def test_overlap_counts_the_bytes_in_holes() -> None:
    assert overlap([(0, 10), (50, 60)], 5, 55) == 10
