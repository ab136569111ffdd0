"""What a program may hand over becomes whole packets, or an error that says both numbers."""

from __future__ import annotations

import array
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mpserverd.client import intake
from mpserverd.client.errors import PacketLengthError

WHOLE = bytes(range(64))
RECORD = np.dtype([("sequence", "<u4"), ("value", "<f4"), ("time", "<u8")])


def taken(packets: Any) -> bytes:
    found = [bytes(block) for block in intake.blocks(packets, 16)]
    assert all(len(block) % 16 == 0 for block in found)
    return b"".join(found)


@pytest.mark.parametrize(
    "packets",
    [
        WHOLE,
        bytearray(WHOLE),
        memoryview(WHOLE),
        memoryview(WHOLE).cast("I"),
        array.array("d", WHOLE),
        np.frombuffer(WHOLE, np.uint8),
        np.frombuffer(WHOLE, "<u8"),
        np.frombuffer(WHOLE, "<u4").reshape(4, 4),
        np.frombuffer(WHOLE, "<u4").reshape(2, 2, 4),
        np.frombuffer(WHOLE, RECORD),
        np.frombuffer(WHOLE, "V16"),
        np.asfortranarray(np.frombuffer(WHOLE, "<u4").reshape(4, 4)),
        np.frombuffer(WHOLE, RECORD)[::-1][::-1],
        [WHOLE[at : at + 16] for at in range(0, 64, 16)],
        (memoryview(WHOLE)[at : at + 16] for at in range(0, 64, 16)),
        list(np.frombuffer(WHOLE, RECORD)),
    ],
)
def test_whatever_holds_packets_gives_their_bytes_in_order(packets: Any) -> None:
    assert taken(packets) == WHOLE


def test_every_other_element_of_an_array_is_copied_right() -> None:
    assert taken(np.frombuffer(WHOLE, RECORD)[::2]) == WHOLE[:16] + WHOLE[32:48]
    assert taken(memoryview(np.frombuffer(WHOLE, "V16").copy()[::2])) == WHOLE[:16] + WHOLE[32:48]


@pytest.mark.parametrize("packets", [b"", [], iter(()), np.zeros(0, RECORD), np.zeros((0, 4), "<u4"), memoryview(b"")])
def test_nothing_is_no_packet(packets: Any) -> None:
    assert taken(packets) == b""


@pytest.mark.parametrize(
    ("packets", "text"),
    [
        (WHOLE[:17], "17 bytes are no whole number of packets of 16"),
        (np.zeros(3, "<u8"), "24 bytes are no whole number of packets of 16"),
        (np.zeros((2, 3), "<u8"), "a row of this array has 24 bytes, a packet 16"),
        (np.zeros(2, "V8"), "an element of this array has 8 bytes, a packet 16"),
        (np.zeros(2, "S32"), "an element of this array has 32 bytes, a packet 16"),
        ([WHOLE[:16], WHOLE[:15]], "packet 1 has 15 bytes, not 16"),
        ([WHOLE], "packet 0 has 64 bytes, not 16"),
    ],
)
def test_what_is_no_whole_number_of_packets_is_refused(packets: Any, text: str) -> None:
    with pytest.raises(PacketLengthError, match=text):
        taken(packets)


@pytest.mark.parametrize(
    "packets", ["0123456789abcdef", 16, None, ["0123456789abcdef"], [16], np.array([b"", None], object)]
)
def test_what_holds_no_bytes_is_refused(packets: Any) -> None:
    with pytest.raises(TypeError):
        taken(packets)


def test_an_iterable_is_taken_up_to_what_is_wrong_and_in_bounded_blocks() -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield bytes(16)

    blocks = intake.blocks(endless(), 16)
    assert [len(next(blocks)) for _ in range(3)] == [intake.GATHER_BYTES] * 3
