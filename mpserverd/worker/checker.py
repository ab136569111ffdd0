"""Checks packets in place in the arena: sequence numbers, and one-way latency.

A check record (arena/state.py, ``Check``) lives twice in the stream's row; the valid one is named by CHECK_SELECT,
written last. So a worker that is killed anywhere leaves either the record before or the one after a check, never a
mixture, and its successor counts no gap twice.

What counts: a packet whose number is one above the highest so far is fine; further ahead is a *gap* (and the difference
*missing*); equal is a *repeat*; below is *reordered*. After RESTART_PACKETS consecutive numbers below, the sender has
started again, and counting goes on from there. Numbers wrap at the width of their field.

No system calls, no clock: the time at which bytes were received comes with them.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import numpy.typing as npt

from mpserverd.arena.latency import bucket_of
from mpserverd.arena.state import Check, StateTable, Str
from mpserverd.arena.window import StreamWindow
from mpserverd.protocol.layout import PacketLayout

BLOCK_PACKETS = 16384
"""Packets that one pass looks at: its scratch arrays then stay in the second-level cache."""
RESTART_PACKETS = 64
MARKS_MAX = 64
"""Latency is sampled at one packet a ``recv``, at most so many a check."""


@dataclasses.dataclass(frozen=True, slots=True)
class Field:
    """One number inside a packet."""

    kind: np.dtype[np.generic]
    offset: int

    @property
    def order(self) -> Literal["little", "big"]:
        return "big" if self.kind.byteorder == ">" else "little"


def _field(layout: PacketLayout, name: str | None) -> Field | None:
    if name is None or layout.dtype.fields is None:
        return None
    kind, offset = layout.dtype.fields[name][:2]
    return Field(kind, offset)


def scratch_for(layout: PacketLayout | None) -> Scratch | None:
    """Scratch arrays that fit the layout's sequence field; None when there is nothing to check."""
    field = _field(layout, layout.sequence) if layout is not None else None
    return Scratch(field.kind) if field is not None else None


class Scratch:
    """Scratch arrays for one sequence type; a worker shares them between all its streams.

    ``block_packets`` is at most a quarter of the numbers that the type has, so that ahead and behind stay apart.
    """

    def __init__(self, kind: np.dtype[np.generic]) -> None:
        native = kind.newbyteorder("=")
        bits = 8 * native.itemsize
        self.unsigned = np.dtype(f"u{native.itemsize}")
        self.signed = np.dtype(f"i{native.itemsize}")
        self.mask = (1 << bits) - 1
        self.block_packets = min(BLOCK_PACKETS, 1 << (bits - 2))
        self.ramp = np.arange(self.block_packets).astype(self.unsigned)
        self.expected = np.empty(self.block_packets, self.unsigned)
        self.expected_as_sent = self.expected.view(native)
        self.wrong = np.empty(self.block_packets, np.bool_)


class Checker:
    """Checks one stream. ``checked`` is the stream offset below which every whole packet was looked at."""

    def __init__(self, state: StateTable, row: int, layout: PacketLayout | None, scratch: Scratch | None) -> None:
        self._words = state.words
        self._base = base = state.stream_base(row)
        self._scratch = scratch
        self._latency_base = state.latency_base(row)
        self._select = int(state.words[base + Str.CHECK_SELECT]) & 1
        record = base + (Str.CHECK0, Str.CHECK1)[self._select]
        self.checked = int(state.words[record + Check.CHECKED])
        self.last = int(state.words[record + Check.LAST_SEQUENCE])
        self.known = bool(state.words[record + Check.SEQUENCE_KNOWN])
        self.gaps, self.missing, self.repeats, self.reordered = (
            int(state.words[record + column]) for column in (Check.GAPS, Check.MISSING, Check.REPEATS, Check.REORDERED)
        )
        self.marks: list[tuple[int, int]] = []
        """(stream offset reached, unix ns) of each ``recv`` since the last check, when the layout has a time."""
        self._behind_next = self._behind_count = 0
        self._sequence = _field(layout, layout.sequence) if layout is not None else None
        self._time = _field(layout, layout.time) if layout is not None else None
        self.wants_marks = self._time is not None

    def forget_sequence(self) -> None:
        """A new connection: the next packet begins a sequence. Holes need none of this: what is dropped was checked."""
        self.known = False

    def check(self, window: StreamWindow) -> None:
        """Look at all whole packets up to the window's position, then publish the record."""
        packet = window.packet_size
        end = window.position - window.position % packet
        if end <= self.checked:
            return
        if self._sequence is not None and self._scratch is not None:
            self._check_sequence(window, end, packet, self._sequence, self._scratch)
        if self.marks and self._time is not None:
            self._sample_latency(window, packet, self._time)
        self.checked = end
        self._publish()

    def _publish(self) -> None:
        words = self._words
        select = self._select ^ 1
        record = self._base + (Str.CHECK0, Str.CHECK1)[select]
        words[record + Check.CHECKED] = self.checked
        words[record + Check.LAST_SEQUENCE] = self.last
        words[record + Check.SEQUENCE_KNOWN] = self.known
        words[record + Check.GAPS] = self.gaps
        words[record + Check.MISSING] = self.missing
        words[record + Check.REPEATS] = self.repeats
        words[record + Check.REORDERED] = self.reordered
        words[self._base + Str.CHECK_SELECT] = self._select = select

    def _check_sequence(self, window: StreamWindow, end: int, packet: int, field: Field, scratch: Scratch) -> None:
        """Whole packets are looked at where they lie; one that straddles two chunks is joined first."""
        data = window.data
        first = self.checked
        carry = b""
        for at, length in window.pieces(first, end):
            if carry:
                missing = packet - len(carry)
                carry += bytes(data[at : at + min(missing, length)])
                if len(carry) < packet:
                    continue
                self._look(carry, 0, 1, packet, field, scratch)
                at, length = at + missing, length - missing  # noqa: PLW2901
            count = length // packet
            for block in range(0, count, scratch.block_packets):
                here = min(scratch.block_packets, count - block)
                self._look(data, at + block * packet, here, packet, field, scratch)
            carry = bytes(data[at + count * packet : at + length])

    def _look(
        self,
        buffer: memoryview | bytes,
        at: int,
        count: int,
        packet: int,
        field: Field,
        scratch: Scratch,
    ) -> None:
        """Check ``count`` packets that lie side by side at ``at``.

        All in order costs three passes: 0.8 ns a packet here, against 1.4 for subtracting neighbours, which reads the
        widely spaced numbers twice.
        """
        numbers: npt.NDArray[np.generic] = np.ndarray((count,), field.kind, buffer, at + field.offset, (packet,))
        first = (self.last + 1) & scratch.mask if self.known else int(numbers[0]) & scratch.mask
        wrong = scratch.wrong[:count]
        np.add(scratch.ramp[:count], scratch.unsigned.type(first), out=scratch.expected[:count])
        np.not_equal(numbers, scratch.expected_as_sent[:count], out=wrong)
        if not wrong.any():
            self.last, self.known = (first + count - 1) & scratch.mask, True
            return
        self._look_closely(numbers, scratch)

    def _look_closely(self, numbers: npt.NDArray[np.generic], scratch: Scratch) -> None:
        values = numbers.astype(scratch.unsigned)
        last = self.last if self.known else (int(values[0]) - 1) & scratch.mask
        ahead = (values - scratch.unsigned.type(last)).view(scratch.signed)
        if int(ahead[-1]) < 0 and (values[1:] - values[:-1] == 1).all():
            self._fall_behind(int(values[0]), len(values), scratch)
            return
        highest = np.maximum.accumulate(np.concatenate((np.zeros(1, scratch.signed), ahead)))
        step = ahead - highest[:-1]
        jumps = step[step > 1]
        self.gaps += len(jumps)
        self.missing += int(np.sum(jumps.astype(np.uint64) - np.uint64(1)))
        self.repeats += int(np.count_nonzero(step == 0))
        self.reordered += int(np.count_nonzero(step < 0))
        self.last, self.known = (last + int(highest[-1])) & scratch.mask, True

    def _fall_behind(self, first: int, count: int, scratch: Scratch) -> None:
        """``count`` consecutive numbers below the highest one: late packets, or a sender that started again."""
        if first != self._behind_next:
            self._behind_count = 0
        last = (first + count - 1) & scratch.mask
        self.reordered += min(count, RESTART_PACKETS - self._behind_count)
        self._behind_count += count
        self._behind_next = (last + 1) & scratch.mask
        if self._behind_count >= RESTART_PACKETS:
            self.last, self._behind_count = last, 0

    def _sample_latency(self, window: StreamWindow, packet: int, field: Field) -> None:
        """One packet a ``recv``: the last whole one that it completed."""
        words, slowest = self._words, 0
        for reached, received_ns in self.marks[-MARKS_MAX:]:
            start = (reached // packet - 1) * packet
            if start < self.checked:
                continue
            pieces = window.pieces(start, start + packet)
            if len(pieces) == 1:
                at = pieces[0][0] + field.offset
                raw = bytes(window.data[at : at + field.kind.itemsize])
            else:
                joined = b"".join(bytes(window.data[at : at + length]) for at, length in pieces)
                raw = joined[field.offset : field.offset + field.kind.itemsize]
            if len(raw) == field.kind.itemsize:
                latency_ns = max(0, received_ns - int.from_bytes(raw, field.order))
                words[self._latency_base + bucket_of(latency_ns)] += 1
                slowest = max(slowest, latency_ns)
        self.marks.clear()
        if slowest > words[self._base + Str.LATENCY_MAX_NS]:  # noqa: PLR1730  (a store that is nearly never needed)
            words[self._base + Str.LATENCY_MAX_NS] = slowest
