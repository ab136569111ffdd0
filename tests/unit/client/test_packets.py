"""What load clients send can be made again by anybody who knows the rules at the top of the module."""

from __future__ import annotations

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpserverd.client.packets import PacketBlock, count_for_bytes, pattern

SIZES = st.sampled_from([1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 1500])


def content(block: PacketBlock, client: int, cuts: list[int], time_ns: int = 5) -> bytes:
    """The packets 0 to the last cut, filled in pieces."""
    pieces, at = [], 0
    for cut in cuts:
        pieces.append(bytes(block.fill(client, at, cut - at, time_ns)))
        at = cut
    return b"".join(pieces)


@given(size=SIZES, client=st.integers(0, 10**5), cuts=st.lists(st.integers(0, 60), min_size=1, max_size=6))
def test_content_does_not_depend_on_how_it_is_cut(size: int, client: int, cuts: list[int]) -> None:
    block, ends = PacketBlock(size, 60, seed=3), sorted(cuts)
    assert content(block, client, ends) == content(PacketBlock(size, 60, seed=3), client, [ends[-1]])


@given(size=SIZES, turns=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 10**12)), min_size=1, max_size=8))
def test_a_block_that_serves_many_clients_mixes_nothing_up(size: int, turns: list[tuple[int, int]]) -> None:
    shared = PacketBlock(size, 9, seed=1)
    for client, first in turns:
        assert bytes(shared.fill(client, first, 9, 7)) == bytes(PacketBlock(size, 9, seed=1).fill(client, first, 9, 7))


@given(firsts=st.lists(st.tuples(st.sampled_from([0, 9, 18, 27, 5]), st.sampled_from([9, 9, 9, 4]), st.integers(0, 2))))
def test_a_block_that_goes_on_is_as_one_filled_anew(firsts: list[tuple[int, int, int]]) -> None:
    """The short cut for full blocks in a row, with every way to fall off it."""
    block = PacketBlock(16, 9, seed=1)
    for first, count, time_ns in firsts:
        anew = PacketBlock(16, 9, seed=1).fill(0, first, count, time_ns)
        assert bytes(block.fill(0, first, count, time_ns)) == bytes(anew)


def test_packets_begin_with_sequence_and_time() -> None:
    packets = bytes(PacketBlock(24, 4, seed=1).fill(2, 1000, 4, 1_700_000_000_000_000_007))
    for index in range(4):
        sequence, time_ns = struct.unpack_from("<QQ", packets, index * 24)
        assert (sequence, time_ns) == (1000 + index, 1_700_000_000_000_000_007)


def test_packets_too_small_for_a_time_begin_with_the_sequence() -> None:
    packets = bytes(PacketBlock(9, 2, seed=1).fill(0, 77, 2, 123))
    assert struct.unpack_from("<Q", packets, 9) == (78,)


def test_tiny_packets_follow_the_pattern_by_their_place() -> None:
    tile = pattern(4)
    assert bytes(PacketBlock(3, 10, seed=4).fill(0, 5, 10, 0)) == tile[15:45]
    assert bytes(PacketBlock(1, 4, seed=4).fill(0, len(tile) - 2, 4, 0)) == tile[-2:] + tile[:2]


@pytest.mark.parametrize("size", [1, 7, 12, 40])
def test_clients_and_seeds_differ_in_their_filler(size: int) -> None:
    a, b, c = (
        bytes(PacketBlock(size, 40, seed=seed).fill(client, 0, 40, 0)) for client, seed in ((0, 1), (1, 1), (0, 2))
    )
    assert len({a, b, c}) == 3


def test_the_content_is_the_same_in_every_version() -> None:
    """Hashes in reports of old runs stay comparable."""
    packets = b"".join(bytes(PacketBlock(size, 100, seed=1).fill(3, 50, 100, 9)) for size in (1, 7, 8, 15, 16, 32))
    assert hashlib.sha256(packets).hexdigest() == "3f21e063afe8ee241a1747807adf3fc6507f5516c452c0a7b46338eb8b120d6d"


@pytest.mark.parametrize(("size", "count"), [(0, 1), (65_537, 1), (16, 0)])
def test_impossible_blocks_are_refused(size: int, count: int) -> None:
    with pytest.raises(ValueError, match="packets of"):
        PacketBlock(size, count, seed=1)


def test_more_packets_than_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="5 packets asked of a block for 4"):
        PacketBlock(16, 4, seed=1).fill(0, 0, 5, 0)


def test_the_largest_packet_fits_a_block_of_one() -> None:
    assert count_for_bytes(65_536, 1000) == 1
    assert len(PacketBlock(65_536, 1, seed=1).fill(60_000, 0, 1, 0)) == 65_536
