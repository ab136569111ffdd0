"""The connections of a running daemon, one entry each, computed from the shared tables.

Bytes, packets and times are the connection's; gaps, latency and what is at risk are its stream's, which may have had
connections before. At risk is what a power cut now would take from the client for good: of a raw client everything that
was received and is not durable, of an mps client nothing, because it keeps what is not acknowledged. What the kernel
holds unread comes on top for raw. Nothing here writes a word or asks the daemon.
"""

from __future__ import annotations

import ipaddress
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from mpserverd.arena.latency import quantiles_ns
from mpserverd.arena.ledger import Accounts
from mpserverd.arena.live import LiveState
from mpserverd.arena.state import Con, ConnectionFlag, ConnectionState, Str, StreamFlag

QUANTILES = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
RAW = "raw"
_NO_LATENCY: dict[str, float | None] = dict.fromkeys((*QUANTILES, "max"))


def clients(live: LiveState) -> list[dict[str, Any]]:
    """Every connection that the daemon holds, the oldest first. ``id`` is the client's, else its peer."""
    table = live.state.connections.copy()
    rows = np.flatnonzero(table[:, Con.STATE] != ConnectionState.FREE)
    rows = rows[np.argsort(table[rows, Con.ACCEPTED_MONO_NS], kind="stable")]
    streams = live.ledger.streams
    index_of = {int(number): index for index, number in enumerate(streams.numbers)}
    indices = [index_of.get(int(table[row, Con.STREAM_NUMBER])) for row in rows]
    latencies = _latencies(live, streams, [index for index in indices if index is not None])
    now_ns = time.monotonic_ns()
    found = []
    for row, index in zip(rows, indices, strict=True):
        entry = _connection(live, int(row), table[row], now_ns)
        if index is None:
            found.append({**entry, **_no_stream(entry["level"])})
        else:
            found.append({**entry, **_stream(live, streams, index, table[row], latencies[index], entry["level"])})
    return found


def peer_text(high: int, low: int, port: int) -> str:
    """``192.0.2.1:4711`` or ``[2001:db8::1]:4711`` from the address words of a connection row."""
    address = ipaddress.IPv6Address(high << 64 | low)
    mapped = address.ipv4_mapped
    return f"{mapped}:{port}" if mapped is not None else f"[{address}]:{port}"


def _connection(live: LiveState, row: int, words: npt.NDArray[np.uint64], now_ns: int) -> dict[str, Any]:
    state = ConnectionState(int(words[Con.STATE]))
    listener = live.facts.get("listeners", {}).get(str(int(words[Con.LISTENER])), {})
    peer = peer_text(int(words[Con.PEER_HIGH]), int(words[Con.PEER_LOW]), int(words[Con.PEER_PORT]))
    return {
        "id": peer,
        "connection": row,
        "stream": None,
        "peer": peer,
        "listener": listener.get("name"),
        "worker": int(words[Con.WORKER]) if state is not ConnectionState.ACCEPTED else None,
        "connected_s": round(max(0, now_ns - int(words[Con.ACCEPTED_MONO_NS])) / 1e9, 3),
        "state": state.name.lower(),
        "paused": bool(int(words[Con.FLAGS]) & ConnectionFlag.PAUSED),
        "blocked": bool(words[Con.BLOCKED]),
        "adoptions": int(words[Con.ADOPTIONS]),
        "level": level(listener.get("protocol", RAW), live.facts.get("sync", "durable")),
    }


def level(protocol: str, sync: str) -> str:
    """What the protocol promises for a packet: ``raw`` nothing; else what an acknowledgement means."""
    if protocol == RAW:
        return RAW
    return "durable" if sync == "durable" else "stored"


def at_risk_text(level: str, at_risk_bytes: int, unacked_bytes: int | None, *, stored: bool = True) -> str:
    """In words what a power cut now would take for good."""
    if level == RAW:
        return f"raw: up to {at_risk_bytes} bytes" if stored else "raw: not stored"
    kept = f"the client keeps {unacked_bytes} bytes" if unacked_bytes else "everything is acknowledged"
    return f"0: {kept}" if level == "durable" else f"what is not synced; {kept}"


def _no_stream(level: str) -> dict[str, Any]:
    """A connection that waits for its stream: its bytes are still in the kernel."""
    numbers = dict.fromkeys(("packets", "bytes", "gaps", "missing", "repeats", "reordered", "at_risk_bytes"), 0)
    return {
        **numbers,
        "packets_per_s": 0.0,
        "latency_ms": dict(_NO_LATENCY),
        "stream_bytes": 0,
        "stream_packets": 0,
        "unacked_bytes": None if level == RAW else 0,
        "at_risk": "nothing read yet",
    }


def _stream(
    live: LiveState,
    streams: Accounts,
    index: int,
    words: npt.NDArray[np.uint64],
    latency: dict[str, float | None],
    level: str,
) -> dict[str, Any]:
    row, packet_size = int(streams.rows[index]), int(streams.packet_sizes[index])
    account = streams.of(index)
    received = max(0, account["position_bytes"] - int(words[Con.OFFSET_AT_ATTACH]))
    name = live.state.stream_name(row)
    flags = StreamFlag(int(live.state.streams[row, Str.FLAGS]))
    at_risk = account["at_risk_bytes"] if level == RAW else 0
    unacked = None if level == RAW else max(0, account["received_bytes"] - account["acked_bytes"])
    return {
        **({"id": name} if StreamFlag.NAMED in flags else {}),
        "stream": name,
        "packets": received // packet_size,
        "bytes": received,
        "packets_per_s": int(live.state.streams[row, Str.RATE_MILLI]) / 1000,
        **{field: account[field] for field in ("gaps", "missing", "repeats", "reordered")},
        "latency_ms": latency,
        "stream_bytes": account["received_bytes"],
        "stream_packets": account["received_packets"],
        "at_risk_bytes": at_risk,
        "unacked_bytes": unacked,
        "at_risk": at_risk_text(level, at_risk, unacked, stored=StreamFlag.STORE in flags),
    }


def _latencies(live: LiveState, streams: Accounts, indices: list[int]) -> dict[int, dict[str, float | None]]:
    """Percentiles in ms for these streams; None where nothing was measured."""
    if not indices:
        return {}
    rows = streams.rows[indices]
    values_ms = quantiles_ns(live.state.latency[rows], list(QUANTILES.values())) / 1e6
    slowest_ms = live.state.streams[rows, Str.LATENCY_MAX_NS].astype(np.float64) / 1e6
    found = {}
    for place, index in enumerate(indices):
        if np.isnan(values_ms[place, 0]):
            found[index] = dict(_NO_LATENCY)
            continue
        slowest = float(slowest_ms[place])
        quantiles = (min(float(value), slowest) if slowest else float(value) for value in values_ms[place])
        found[index] = {
            **{name: round(value, 6) for name, value in zip(QUANTILES, quantiles, strict=True)},
            "max": round(slowest, 6),
        }
    return found
