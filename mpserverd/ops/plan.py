"""The arithmetic before a machine is bought: disk, memory, descriptors, CPU and the settings that go with them. Pure.

Every constant that is no sum was measured, and says where. It looks at no machine; ``doctor`` does.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from mpserverd import limits
from mpserverd.errors import UsageError
from mpserverd.ops.tune import OPEN_FILES

DAY_S = 86_400

WORKER_NS_PER_BYTE = 8.2 / 16
STORER_NS_PER_BYTE = 2.0 / 16
"""docs/benchmarks.md: CPU of a packet of 16 bytes, received, checked, stored and synced on a busy machine; upper
bounds."""
BATCH_NS = 40_000
"""What a batch costs a worker beyond its bytes: waking up, recvmsg, the calls of the check. 28 to 47 us with 100 and
200 clients at 10,050 packets/s in batches of 804; more with fewer, when caches are cold."""
STORER_NS_PER_CYCLE = 1_700_000
STORER_NS_PER_STREAM = 45_000
"""CPU of a cycle with 10, 100 and 200 such clients: 2.0, 6.9 and 10.6 ms. A commit, and for each stream a write, its
share of the sync, and a row."""
CYCLE_S = 0.1
STORER_CPU_MAX = 0.9
"""With more the cycle gets longer instead, and acknowledgements wait."""
DISK_BYTES_PER_S = 1_000_000_000
"""Direct writes in preallocated files: 0.8 to 1.3 GB/s on the machine of docs/benchmarks.md (its plain writer).
``doctor --probe`` measures yours."""
WORKER_CPU_WANTED = 0.6
"""Of one core, so that a burst finds room."""
PROCESS_BYTES = 16 * limits.MIB
"""Memory of one process of ours that it shares with no other: 9 to 14 MiB."""
CONNECTION_BYTES = 22 * limits.KIB
"""docs/benchmarks.md: memory a client, buffers left out."""

BURST_S = 2.0
"""How long the disk may stand still before the buffers are full."""
CLIENTS_SPARE_SHARE = 0.1
"""A client that comes back before its old connection is known to be dead takes a second place."""
SEGMENT_S = 100.0
FREE_S = 60.0
TCP_HEADERS_BYTES = 66
TCP_PAYLOAD_BYTES = 1448


@dataclasses.dataclass(frozen=True, slots=True)
class Demand:
    """``rate`` packets/s and ``batch`` packets a write, of each client."""

    clients: int
    rate: float
    packet_bytes: int
    days: float
    batch: int = 804

    def check(self) -> None:
        """Raises UsageError."""
        for name, value, low, high in (
            ("--clients", self.clients, 1, limits.CLIENTS_MAX - 2),
            ("--rate", self.rate, 0.001, 1e9),
            ("--size", self.packet_bytes, limits.PACKET_BYTES_MIN, limits.PACKET_BYTES_MAX),
            ("--days", self.days, 0.001, 36_600),
            ("--batch", self.batch, 1, 1_000_000),
        ):
            if not low <= value <= high:
                raise UsageError(f"{name} {value:g} must be from {low:g} to {high:g}")


def plan(demand: Demand) -> dict[str, Any]:
    """Everything as plain numbers, with ``toml``: the lines to paste, and ``remarks``: what does not fit."""
    demand.check()
    rate_bytes = demand.clients * demand.rate * demand.packet_bytes
    clients_max = min(limits.CLIENTS_MAX, demand.clients + max(2, math.ceil(demand.clients * CLIENTS_SPARE_SHARE)))
    cpu = _cpu(demand, rate_bytes)
    chunk = 64 * limits.KIB
    segment = _segment_bytes(demand)
    stored = rate_bytes * demand.days * DAY_S
    max_bytes = _round_up(stored + 2 * demand.clients * segment, limits.GIB if stored > limits.GIB else limits.MIB)
    max_bytes = max(max_bytes, segment)
    min_free = min(_round_up(max(limits.GIB, rate_bytes * FREE_S), limits.GIB), limits.SPOOL_BYTES_MAX)
    shares = (limits.CHUNKS_PER_CONNECTION * clients_max + limits.CHUNKS_PER_WORKER * cpu["workers"]) * chunk
    buffers = _round_up(shares + rate_bytes * BURST_S, 16 * limits.MIB)
    processes = cpu["workers"] + 2
    memory = buffers + processes * PROCESS_BYTES + clients_max * CONNECTION_BYTES
    found: dict[str, Any] = {
        "schema_version": 1,
        "demand": dataclasses.asdict(demand),
        "packets_per_s": demand.clients * demand.rate,
        "bytes_per_s": round(rate_bytes),
        "network_bits_per_s": round(8 * rate_bytes * (1 + TCP_HEADERS_BYTES / _tcp_payload(demand))),
        "bytes_per_day": round(rate_bytes * DAY_S),
        "stored_bytes": round(stored),
        "max_bytes": max_bytes,
        "min_free_bytes": min_free,
        "disk_bytes": max_bytes + min_free,
        "segment_bytes": segment,
        "buffers_bytes": buffers,
        "burst_s": round((buffers - shares) / rate_bytes, 1),
        "memory_bytes": memory,
        "descriptors": OPEN_FILES,
        "max_clients": clients_max,
        **cpu,
        "batch_wait_s": demand.batch / demand.rate,
        "disk_share": rate_bytes / DISK_BYTES_PER_S,
    }
    found["remarks"] = _remarks(found)
    found["toml"] = config_lines(found)
    return found


def _cpu(demand: Demand, rate_bytes: float) -> dict[str, Any]:
    """Cores that are busy, and workers for them."""
    turns = demand.clients * demand.rate / demand.batch
    workers_cpu = rate_bytes * WORKER_NS_PER_BYTE / 1e9 + turns * BATCH_NS / 1e9
    per_cycle = (STORER_NS_PER_CYCLE + demand.clients * STORER_NS_PER_STREAM) / 1e9
    storer_cpu = rate_bytes * STORER_NS_PER_BYTE / 1e9 + per_cycle / CYCLE_S
    workers = max(2, math.ceil(workers_cpu / WORKER_CPU_WANTED))
    return {
        "worker_cores": round(workers_cpu, 3),
        "storer_cores": round(min(storer_cpu, STORER_CPU_MAX), 3),
        "workers": min(workers, limits.WORKERS_MAX),
        "durable_after_s": round(max(CYCLE_S, per_cycle / STORER_CPU_MAX), 2),
    }


def _segment_bytes(demand: Demand) -> int:
    """About 100 s of a client, a power of two: what retention frees at a time, and what each client has open."""
    wanted = demand.rate * demand.packet_bytes * SEGMENT_S
    power = max(20, min(30, math.ceil(math.log2(max(wanted, 1)))))
    return 1 << power


def _tcp_payload(demand: Demand) -> int:
    return min(TCP_PAYLOAD_BYTES, demand.batch * demand.packet_bytes)


def _round_up(value: float, unit: int) -> int:
    return math.ceil(value / unit) * unit


def _remarks(found: dict[str, Any]) -> list[str]:
    """What one machine, or one process, will not do."""
    remarks = []
    if found["disk_share"] > 0.8:
        remarks.append(
            f"{found['bytes_per_s']:,} bytes/s are written, the measured disk takes {DISK_BYTES_PER_S:,}: "
            "measure yours with mpserverctl doctor --probe, or split the clients over several machines"
        )
    if found["max_bytes"] > limits.SPOOL_BYTES_MAX:
        remarks.append(f"max_bytes is more than one spool takes ({limits.SPOOL_BYTES_MAX:,} bytes): keep fewer days")
    if found["buffers_bytes"] > limits.BUFFERS_BYTES_MAX:
        remarks.append(f"buffers are more than the {limits.BUFFERS_BYTES_MAX:,} bytes that one daemon takes")
    if found["worker_cores"] > limits.WORKERS_MAX * WORKER_CPU_WANTED:
        remarks.append(f"{found['worker_cores']:g} cores are more than {limits.WORKERS_MAX} workers give")
    if found["durable_after_s"] > CYCLE_S:
        remarks.append(
            f"a round of writing takes about {found['durable_after_s']:g} s with so many streams: "
            "a packet is durable within about twice that"
        )
    return remarks


def config_lines(found: dict[str, Any]) -> str:
    """TOML that loads; sizes in bytes are exact."""
    return "\n".join(
        (
            "[server]",
            f"workers = {found['workers']}",
            f"max_clients = {found['max_clients']}",
            "",
            "[buffers]",
            f"bytes = {min(found['buffers_bytes'], limits.BUFFERS_BYTES_MAX)}",
            'chunk_bytes = "64 KiB"',
            "",
            "[[listener]]",
            'name = "raw"',
            'address = "0.0.0.0:8888"',
            f"packet_size = {found['demand']['packet_bytes']}",
            'allow = ["127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "::1", "fc00::/7", "fe80::/10"]',
            "",
            "[spool]",
            f"segment_bytes = {found['segment_bytes']}",
            f"max_bytes = {min(found['max_bytes'], limits.SPOOL_BYTES_MAX)}",
            f"min_free_bytes = {found['min_free_bytes']}",
            "",
        )
    )
