"""What the supervisor works out once a second, for placement and for mpserverctl: rates, CPU and memory of the
children.

Rates are measured from words that others count anyway; nobody does more because somebody watches. A second without
connections costs a few microseconds.
"""

from __future__ import annotations

import contextlib
import os
import time

import numpy as np

from mpserverd.arena.state import SUPERVISOR_SLOT, Slot, Str
from mpserverd.supervisor.child import Child
from mpserverd.supervisor.children import Children
from mpserverd.supervisor.connections import Connections
from mpserverd.supervisor.core import Core

PROCESS_INTERVAL_S = 5.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class StatsTick:
    """``tick`` is called about once a second with monotonic ns; intervals are taken as they are, late ones too."""

    def __init__(self, core: Core, children: Children, connections: Connections) -> None:
        self._core = core
        self._children = children
        self._connections = connections
        self._last_ns = time.monotonic_ns()
        self._processes_ns = 0
        self._packets: dict[int, int] = {}
        self._cpu_ticks: dict[int, int] = {}

    def tick(self, now_ns: int) -> None:
        elapsed_s = (now_ns - self._last_ns) / 1e9
        if elapsed_s <= 0:
            return
        self._last_ns = now_ns
        self._stream_rates(elapsed_s)
        for child in self._children.workers():
            self._worker_rate(child, elapsed_s)
        self._connections.measured()
        since_s = (now_ns - self._processes_ns) / 1e9
        if since_s >= PROCESS_INTERVAL_S:
            self._processes_ns = now_ns
            self._processes(since_s)

    def _stream_rates(self, elapsed_s: float) -> None:
        rows = [connection.stream for connection in self._connections.all() if connection.stream is not None]
        if not rows:
            return
        streams = self._core.state.streams
        index = np.array(rows, np.intp)
        positions = streams[index, Str.POSITION]
        moved = positions - np.minimum(positions, streams[index, Str.RATE_POSITION])
        sizes = np.maximum(streams[index, Str.PACKET_SIZE], np.uint64(1))
        streams[index, Str.RATE_POSITION] = positions
        streams[index, Str.RATE_MILLI] = (moved / sizes * (1000.0 / elapsed_s)).astype(np.uint64)

    def _worker_rate(self, child: Child, elapsed_s: float) -> None:
        words = self._core.state.slots[child.slot]
        packets = int(words[Slot.RECEIVED_PACKETS])
        moved = max(0, packets - self._packets.get(child.slot, packets))
        self._packets[child.slot] = packets
        words[Slot.RATE_MILLI] = int(moved * 1000 / elapsed_s)

    def _processes(self, elapsed_s: float) -> None:
        places = [(child.pid, child.slot) for child in self._children.alive()]
        cpu_ticks = {}
        for pid, slot in [(os.getpid(), SUPERVISOR_SLOT), *places]:
            with contextlib.suppress(OSError, ValueError, IndexError):
                cpu_ticks[pid] = ticks = _cpu_ticks(pid)
                used = ticks - self._cpu_ticks.get(pid, ticks)
                words = self._core.state.slots[slot]
                words[Slot.CPU_MILLI] = int(max(0, used) * 1000 / _TICKS_PER_S / elapsed_s)
                words[Slot.RSS_BYTES] = _rss_bytes(pid)
        self._cpu_ticks = cpu_ticks


def _cpu_ticks(pid: int) -> int:
    """User and system time of all threads (proc(5), /proc/pid/stat fields 14 and 15)."""
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
        words = file.read().rpartition(")")[2].split()
    return int(words[11]) + int(words[12])


def _rss_bytes(pid: int) -> int:
    """Resident memory, the shared arena included (proc(5), /proc/pid/statm)."""
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * _PAGE_BYTES
