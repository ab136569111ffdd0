"""How fast packets are acknowledged as durable, and how soon: mps against the disk itself and against peers."""

from __future__ import annotations

import shutil
import statistics
import sys
from typing import TYPE_CHECKING, Any

from tests.bench import baselines
from tests.bench.peers import PACKET_BYTES, PEERS, acked_packets_per_s

if TYPE_CHECKING:
    from tests.bench.bench import Bench

BATCH_PACKETS = 804
LISTENER = {"name": "mps", "protocol": "mps"}
STREAMS = (1, 4)
LOADS = ((10, 10_050.0), (1_000, 804.0))
"""(clients, packets/s of each) for the time that an acknowledgement takes."""
LATENCY_S = 15.0


def rate(bench: Bench, settings: dict[str, Any]) -> None:
    """Clients flat out, the plain writer and every peer that is installed, round by round."""
    peers = [peer for peer in PEERS if shutil.which(peer.program) is not None]
    for peer in PEERS:
        if peer not in peers:
            print(f"bench: left out: {peer.name}; type: sudo apt-get install {peer.program}", file=sys.stderr)
    rows: dict[str, list[float]] = {}
    for _ in range(bench.rounds):
        for streams in STREAMS:
            with bench.daemon(**settings) as daemon:
                report = bench.load(daemon.port("mps"), clients=streams, protocol="mps")
            rows.setdefault(f"acknowledged, {_clients(streams)}", []).append(report["acked_rate"])
        writer = baselines.direct_writer_bytes_per_s(bench.directory, bench.duration_s) / PACKET_BYTES
        rows.setdefault("plain O_DIRECT writer", []).append(writer)
        for peer in peers:
            for count in (BATCH_PACKETS, 1):
                acked = acked_packets_per_s(peer, bench.directory, bench.duration_s, count)
                rows.setdefault(f"{peer.name}, {count} an entry", []).append(acked)
    medians = {name: statistics.median(values) for name, values in rows.items()}
    writer = medians["plain O_DIRECT writer"]
    for name, value in medians.items():
        bench.add(name, value / 1e6, "M packets/s")
        if name.startswith("acknowledged"):
            bench.add("  against the plain writer", value / writer, "times", 0.8, higher_is_better=True)


def latency(bench: Bench, settings: dict[str, Any]) -> None:
    """From when a batch of 804 was due to when all of it was acknowledged."""
    for clients, packets_per_s in LOADS:
        with bench.daemon(**settings) as daemon:
            port = daemon.port("mps")
            report = bench.load(port, clients=clients, rate=packets_per_s, duration_s=LATENCY_S, protocol="mps")
        where = f"{_clients(clients)} x {packets_per_s:,.0f}/s"
        for percentile in ("p50", "p99"):
            bench.add(f"acknowledged after, {percentile}, {where}", report["ack_latency_ms"][percentile], "ms")


def _clients(count: int) -> str:
    return "1 client" if count == 1 else f"{count:,} clients"
