"""Makes again what a client sent, and finds where stored bytes differ from it. Pure."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from mpserverd.client.pacing import Schedule
from mpserverd.client.packets import SEQUENCE_BYTES, TIME_END, PacketBlock, carries_time, count_for_bytes
from mpserverd.load.scenario import Scenario

COMPARE_BYTES = 1 << 20

Bytes2d = npt.NDArray[np.uint8]


class ExpectedPackets:
    """The packets of all clients of a run that began at ``start_unix_ns``.

    Flat out the times are not known afterwards, so those bytes are left out of comparisons (``times_known`` False).
    """

    def __init__(self, scenario: Scenario, start_unix_ns: int) -> None:
        self.scenario = scenario
        self.size = scenario.packet_size
        self.times_known = not scenario.flat_out
        self._start_ns = start_unix_ns
        self._block = PacketBlock(self.size, count_for_bytes(self.size, COMPARE_BYTES), scenario.seed)

    def packets(self, client: int, first: int, count: int) -> Bytes2d:
        """Packets [first, first + count) as rows; times are 0 where they are not known."""
        if not self.times_known or not carries_time(self.size):
            return self._rows(client, first, count, 0)
        schedule = schedule_of(self.scenario, client, self._start_ns)
        parts, at, end = [], first, first + count
        while at < end:
            batch_end = min(schedule.batch_end(at), end)
            parts.append(self._rows(client, at, batch_end - at, schedule.due_ns(at)))
            at = batch_end
        return np.concatenate(parts)

    def _rows(self, client: int, first: int, count: int, time_ns: int) -> Bytes2d:
        pieces, at, end = [], first, first + count
        while at < end:
            part = min(self._block.count_max, end - at)
            pieces.append(np.frombuffer(bytes(self._block.fill(client, at, part, time_ns)), np.uint8))
            at += part
        return np.concatenate(pieces).reshape(count, self.size)

    def first_difference(self, client: int, first: int, stored: Iterable[bytes | memoryview]) -> int | None:
        """Offset of the first byte of ``stored`` (which begins with packet ``first``) that ``client`` did not send.

        None: all of it is as it was sent. A part of a packet at the end is a difference at its first byte.
        """
        rest, at, count_max = b"", 0, self._block.count_max
        for piece in stored:
            rest += piece
            while len(rest) >= self.size:
                count = min(len(rest) // self.size, count_max)
                found = self._difference(client, first + at // self.size, rest[: count * self.size])
                if found is not None:
                    return at + found
                at, rest = at + count * self.size, rest[count * self.size :]
        return at if rest else None

    def _difference(self, client: int, first: int, stored: bytes) -> int | None:
        rows = np.frombuffer(stored, np.uint8).reshape(-1, self.size)
        differ = rows != self.packets(client, first, len(rows))
        if not self.times_known and carries_time(self.size):
            differ[:, SEQUENCE_BYTES:TIME_END] = False
        places = np.flatnonzero(differ)
        return int(places[0]) if len(places) else None


def schedule_of(scenario: Scenario, client: int, start_ns: int) -> Schedule:
    """The schedule of one client of a paced run that starts at ``start_ns``."""
    packets = scenario.packets_per_client
    assert packets is not None and not scenario.flat_out
    begin_ns = start_ns + int(scenario.phase_step * client)
    return Schedule(begin_ns, scenario.rate, scenario.batch_packets(1), packets)
