"""What the packet check promises, against a reference that looks at one packet after the other."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpserverd.arena.chunks import Arena
from mpserverd.arena.state import Check, StateTable, Str, StreamFlag
from mpserverd.arena.window import LeasePool, StreamWindow
from mpserverd.protocol.layout import PacketLayout
from mpserverd.worker.checker import RESTART_PACKETS, Checker, scratch_for

CHUNK = 4096
U8 = PacketLayout("sample16", 16, (("sequence", "<u8"), ("time", "<u8")), "sequence", "time")
U2_ODD = PacketLayout("odd7", 7, (("kind", "u1"), ("sequence", "<u2"), ("value", "<f4")), "sequence")
I1 = PacketLayout("signed3", 3, (("value", "u1"), ("sequence", "i1")), "sequence")
U4_BIG = PacketLayout("big24", 24, (("sequence", ">u4"),), "sequence")


class Stream:
    """A stream in a small arena; ``send`` is what its client and worker do, ``counts`` what the row says."""

    def __init__(self, layout: PacketLayout) -> None:
        self.layout = layout
        self.arena = Arena.create(size_bytes=64 * CHUNK, chunk_bytes=CHUNK)
        self.state = StateTable.create(connections=2, streams=2, slots=3)
        for fd in (self.state.fd, self.arena.table.fd, self.arena.data_fd):
            os.close(fd)  # the maps keep what they need
        base = self.base = self.state.stream_base(0)
        self.state.words[base + Str.NUMBER] = 5
        self.state.words[base + Str.PACKET_SIZE] = layout.size
        self.state.words[base + Str.FLAGS] = StreamFlag(0)
        self.arena.table.lease(1, 64)
        self.pool = LeasePool(self.arena, self.state, 1)
        self.adopt(0)

    def adopt(self, position: int) -> None:
        self.window = StreamWindow(self.state, self.pool, 0)
        self.window.adopt(position)
        self.checker = Checker(self.state, 0, self.layout, scratch_for(self.layout))

    def packets(self, numbers: list[int], times_ns: list[int] | None = None) -> bytes:
        array = np.zeros(len(numbers), self.layout.dtype)
        bits = 8 * array["sequence"].dtype.itemsize
        array["sequence"] = np.array([number % (1 << bits) for number in numbers], f"u{bits // 8}").astype(
            array["sequence"].dtype
        )
        if times_ns is not None:
            array["time"] = times_ns
        return array.tobytes()

    def send(self, sent: bytes) -> None:
        at = 0
        while at < len(sent):
            for place in self.window.room(len(sent) - at):
                part = min(len(place), len(sent) - at)
                place[:part] = sent[at : at + part]
                self.window.received(part)
                at += part

    def check(self) -> None:
        self.checker.check(self.window)
        self.window.offer(self.checker.checked)

    def counts(self) -> tuple[int, int, int, int]:
        select = int(self.state.words[self.base + Str.CHECK_SELECT])
        record = self.base + (Str.CHECK0, Str.CHECK1)[select]
        gaps, missing, repeats, reordered = (
            int(self.state.words[record + column])
            for column in (Check.GAPS, Check.MISSING, Check.REPEATS, Check.REORDERED)
        )
        return gaps, missing, repeats, reordered


def reference(numbers: list[int]) -> tuple[int, int, int, int]:
    """Counts by the definition: compared with the highest number so far."""
    gaps = missing = repeats = reordered = 0
    highest = numbers[0]
    for number in numbers[1:]:
        ahead = number - highest
        gaps += ahead > 1
        missing += max(ahead - 1, 0)
        repeats += ahead == 0
        reordered += ahead < 0
        highest = max(highest, number)
    return gaps, missing, repeats, reordered


@pytest.mark.parametrize("layout", [U8, U2_ODD, I1, U4_BIG], ids=lambda layout: layout.name)
@given(
    start=st.integers(0, 70000),
    steps=st.lists(st.sampled_from([1, 1, 1, 1, 1, 1, 2, 5, 0, -1, -3]), min_size=1, max_size=60),
    cuts=st.lists(st.integers(1, 300), max_size=10),
)
def test_gaps_repeats_and_reordering_are_counted_like_packet_by_packet(
    layout: PacketLayout, start: int, steps: list[int], cuts: list[int]
) -> None:
    numbers = [start + 100]
    for step in steps:
        numbers.append(numbers[-1] + step)
    stream = Stream(layout)
    sent = stream.packets(numbers)
    for cut in cuts:
        stream.send(sent[:cut])
        sent = sent[cut:]
        stream.check()
    stream.send(sent)
    stream.check()
    assert stream.counts() == reference(numbers)


@pytest.mark.parametrize("layout", [U8, U2_ODD, I1, U4_BIG], ids=lambda layout: layout.name)
def test_a_long_stream_in_order_counts_nothing(layout: PacketLayout) -> None:
    stream = Stream(layout)
    sent = stream.packets(list(range(65000, 65000 + 30000)))  # wraps around for the 16-bit sequence
    for start in range(0, len(sent), 12864):
        stream.send(sent[start : start + 12864])
        stream.check()
    assert stream.counts() == (0, 0, 0, 0)


@pytest.mark.parametrize("cut", [1, 24, RESTART_PACKETS, 200])
def test_a_sender_that_starts_again_is_reordering_for_a_while_and_then_a_new_start(cut: int) -> None:
    stream = Stream(U8)
    stream.send(stream.packets(list(range(5000, 6000))))
    stream.check()
    for first in range(0, 400, cut):
        stream.send(stream.packets(list(range(first, first + cut))))
        stream.check()
    assert stream.counts() == (0, 0, 0, RESTART_PACKETS)


def test_a_successor_neither_forgets_nor_counts_twice() -> None:
    stream = Stream(U8)
    numbers = [0, 1, 2, 5, 6, 6, 7]
    stream.send(stream.packets(numbers))
    stream.check()
    stream.send(stream.packets([8, 11]))  # received, not yet checked, when the worker dies
    stream.adopt(stream.window.position)
    stream.check()
    assert stream.counts() == reference([*numbers, 8, 11])
    stream.adopt(stream.window.position)
    stream.check()
    assert stream.counts() == reference([*numbers, 8, 11])


def test_latency_is_taken_from_the_packet_that_each_receive_completed() -> None:
    stream = Stream(U8)
    for index in range(10):
        stream.send(stream.packets([index], [1_000_000_000]))
        stream.checker.marks.append((stream.window.position, 1_000_000_000 + 2_000_000))
    stream.check()
    assert int(stream.state.latency[0].sum()) == 10
    assert int(stream.state.words[stream.base + Str.LATENCY_MAX_NS]) == 2_000_000


def test_opaque_packets_are_only_cut_to_whole_ones() -> None:
    stream = Stream(PacketLayout.opaque(24))
    stream.checker = Checker(stream.state, 0, None, None)
    stream.send(b"x" * 100)
    stream.check()
    assert int(stream.state.words[stream.base + Str.OFFERED]) == 96
