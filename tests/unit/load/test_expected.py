"""Whoever knows the scenario can find the first byte that is not as it was sent."""

from __future__ import annotations

import socket
from fractions import Fraction
from typing import Any

import pytest

from mpserverd.client.packets import PacketBlock
from mpserverd.load.expected import ExpectedPackets
from mpserverd.load.scenario import Scenario

TARGET = ((int(socket.AF_INET), ("127.0.0.1", 1)),)
START_NS = 1_700_000_000_000_000_000


def expected(**options: Any) -> ExpectedPackets:
    return ExpectedPackets(Scenario(TARGET, **options), START_NS)


def as_sent(packets: ExpectedPackets, client: int, first: int, count: int) -> bytearray:
    return bytearray(packets.packets(client, first, count).tobytes())


@pytest.mark.parametrize("size", [1, 7, 8, 16, 24, 1500])
@pytest.mark.parametrize("place", [0, 1, 4_999, 12_345])
def test_the_first_wrong_byte_is_found_at_its_offset(size: int, place: int) -> None:
    packets = expected(packet_size=size)
    content = as_sent(packets, 2, 30, 20_000 // size)
    at = min(place, len(content) - 1)
    assert packets.first_difference(2, 30, [content]) is None
    content[at] ^= 1
    content[-1] ^= 1
    pieces = [content[:at], content[at : at + 3], content[at + 3 :]]
    assert packets.first_difference(2, 30, pieces) == at


def test_times_of_a_paced_run_are_those_of_the_schedule() -> None:
    packets = expected(packet_size=16, batch=10, rate=Fraction(1000), clients=4)
    times = packets.packets(3, 0, 30).copy().view("<u8").reshape(-1, 2)[:, 1]
    assert times.tolist() == [START_NS + 7_500_000 + 10_000_000 * (index // 10) for index in range(30)]


def test_times_of_a_flat_out_run_are_not_compared_and_all_else_is() -> None:
    packets = expected(packet_size=24, rate=Fraction(0))
    content = bytearray(PacketBlock(24, 100, seed=1).fill(0, 0, 100, 123_456_789))
    assert packets.first_difference(0, 0, [content]) is None
    content[24 * 50 + 16] ^= 1
    assert packets.first_difference(0, 0, [content]) == 24 * 50 + 16


def test_half_a_packet_at_the_end_is_a_difference() -> None:
    packets = expected()
    content = as_sent(packets, 0, 0, 10)
    assert packets.first_difference(0, 0, [content[:-3]]) == 9 * 16
    assert packets.first_difference(0, 0, []) is None
