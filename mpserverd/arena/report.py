"""The reports of mpserverctl, computed from the shared tables: stats, workers, ledger. (Clients: clients.py.)

Each is made of plain numbers, words, lists and objects, ready for JSON; the field names are a promise, and fields are
only ever added. docs/mpserverctl.md describes every one. Nothing here writes a word, asks the daemon or looks at the
machine: the host's values are handed in.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from mpserverd.arena.counters import COUNTERS, NEVER_S, Counter, Role
from mpserverd.arena.ledger import FIELDS, Ledger
from mpserverd.arena.live import LiveState
from mpserverd.arena.state import (
    FIRST_WORKER_SLOT,
    STORER_SLOT,
    SUPERVISOR_SLOT,
    CloseReason,
    Head,
    Phase,
    RefuseReason,
    Slot,
    Str,
)

SCHEMA_VERSION = 1
BROKEN = (CloseReason.RESET, CloseReason.TIMED_OUT, CloseReason.FAILED, CloseReason.QUARANTINED)
"""Ends that are errors. The others are the client's or the operator's will, or a deadline that was configured."""


# -- stats


def stats(live: LiveState, host: dict[str, Any] | None = None) -> dict[str, Any]:
    """The state of the whole daemon. ``host`` is what control/host.py measured."""
    ledger = live.ledger
    packets, received = ledger.totals["received_packets"], ledger.totals["received_bytes"]
    rates = live.state.streams[ledger.streams.rows, Str.RATE_MILLI].astype(np.float64) / 1000
    by_reason = errors_by_reason(live)
    errors = sum(by_reason.values())
    words = live.state.words
    return {
        "schema_version": SCHEMA_VERSION,
        "version": live.facts.get("version", ""),
        "pid": live.facts.get("pid", 0),
        "phase": Phase(words[Head.PHASE]).name.lower(),
        "uptime_s": live.facts.get("uptime_s", 0.0),
        "reload_error": live.facts.get("reload_error"),
        "active_connections": int(words[Head.ACTIVE_CONNECTIONS]),
        "max_connections": live.facts.get("max_clients", 0),
        "total_connections": int(words[Head.TOTAL_CONNECTIONS]),
        "total_packets": packets,
        "total_bytes": received,
        "packets_per_s": round(float(rates.sum()), 1),
        "bytes_per_s": round(float((rates * ledger.streams.packet_sizes).sum())),
        "errors": errors,
        "error_rate": errors / packets if packets else 0.0,
        "errors_by_reason": by_reason,
        "closed_by_reason": {reason.word: _closed(live, reason) for reason in CloseReason if reason},
        "workers": len(live.facts.get("workers", [])),
        "worker_list": workers(live),
        "listeners": listeners(live),
        "storer": storer(live),
        "buffers": buffers(live),
        "ledger": {**_totals(ledger), "holds": ledger.holds},
        "spool": spool(live),
        "counters": counters(live),
        "host": host or {"cpu_percent": None, "memory_percent": None, "net_bytes_per_s": None},
    }


def errors_by_reason(live: LiveState) -> dict[str, int]:
    """Packets truncated, dropped, lost and out of sequence; connections refused and broken. Every reason is there."""
    totals = live.ledger.totals
    slots = live.state.slots
    found = {
        "truncated": _counter_sum(live, Role.SUPERVISOR, "truncated_packets"),
        "dropped": _packets_of(live.ledger, "dropped"),
        "lost": _packets_of(live.ledger, "lost"),
        **{name: totals[name] for name in ("gaps", "repeats", "reordered")},
    }
    for refusal in RefuseReason:
        if refusal:
            found[f"refused-{refusal.word}"] = int(slots[SUPERVISOR_SLOT, Slot.REASONS + refusal])
    for counter in _rows(Role.SUPERVISOR):
        if counter.name.startswith("hello_"):
            word = counter.name.removeprefix("hello_").replace("_", "-")
            found[f"hello-{word}"] = int(slots[SUPERVISOR_SLOT, counter.column])
    for broken in BROKEN:
        found[f"broken-{broken.word}"] = _closed(live, broken)
    return found


def _closed(live: LiveState, reason: CloseReason) -> int:
    return int(live.state.slots[FIRST_WORKER_SLOT:, Slot.REASONS + reason].sum())


def _packets_of(ledger: Ledger, kind: str) -> int:
    """Holes of that kind, "dropped" or "lost", as packets."""
    here = ledger.streams.columns[f"{kind}_bytes"] // ledger.streams.packet_sizes
    return int(here.sum()) + ledger.gone[f"{kind}_packets"]


def workers(live: LiveState) -> list[dict[str, Any]]:
    """One entry a worker, in the order of the supervisor."""
    return [
        {
            "index": worker["index"],
            "slot": worker["slot"],
            "pid": worker["pid"],
            "state": worker["state"],
            "restarts": worker["restarts"],
            "connections": int(row[Slot.CONNECTIONS]),
            "packets_per_s": round(int(row[Slot.RATE_MILLI]) / 1000, 1),
            "cpu_percent": int(row[Slot.CPU_MILLI]) / 10,
            "rss_bytes": int(row[Slot.RSS_BYTES]),
            "received_bytes": int(row[Slot.RECEIVED_BYTES]),
            "received_packets": int(row[Slot.RECEIVED_PACKETS]),
            "heartbeat_age_s": heartbeat_age_s(row),
            **_named_counters(row, Role.WORKER),
        }
        for worker in live.facts.get("workers", [])
        for row in (live.state.slots[worker["slot"]],)
    ]


def storer(live: LiveState) -> dict[str, Any] | None:
    """None when nothing is stored."""
    facts = live.facts.get("storer")
    if not facts:
        return None
    row = live.state.slots[STORER_SLOT]
    return {
        "pid": facts.get("pid", 0),
        "state": facts.get("state", ""),
        "restarts": facts.get("restarts", int(row[Slot.RESTARTS])),
        "cpu_percent": int(row[Slot.CPU_MILLI]) / 10,
        "rss_bytes": int(row[Slot.RSS_BYTES]),
        "heartbeat_age_s": heartbeat_age_s(row),
        **_named_counters(row, Role.STORER),
    }


def buffers(live: LiveState) -> dict[str, int]:
    """The arena's chunks by what they are for."""
    states = np.bincount((live.chunks.words & np.uint64(3)).astype(np.intp), minlength=3)
    return {
        "bytes": live.chunks.count * live.chunks.chunk_bytes,
        "chunk_bytes": live.chunks.chunk_bytes,
        "chunks": live.chunks.count,
        "chunks_free": int(states[0]),
        "chunks_leased": int(states[1]),
        "chunks_used": int(states[2]),
    }


def spool(live: LiveState) -> dict[str, Any]:
    """``time_to_full_s``: at the rate of the last minutes, as the storer reckons it; None: not, or not known yet."""
    values = _named_counters(live.state.slots[STORER_SLOT], Role.STORER)
    full, until_s = bool(values["full"]), values["time_to_full_s"]
    known = until_s != NEVER_S and (values["free_bytes"] or values["spool_bytes"])
    return {
        "path": live.facts.get("spool", ""),
        "bytes": values["spool_bytes"],
        "free_bytes": values["free_bytes"],
        "time_to_full_s": 0.0 if full else float(until_s) if known else None,
        "full": full,
        "direct": bool(values["direct"]),
    }


def counters(live: LiveState) -> dict[str, dict[str, int]]:
    """Every counter that a process keeps for itself, by role; those of workers are added up."""
    found: dict[str, dict[str, int]] = {role.value: {} for role in Role}
    for counter in COUNTERS:
        found[counter.role.value][counter.name] = _counter_sum(live, counter.role, counter.name)
    return found


def _counter_sum(live: LiveState, role: Role, name: str) -> int:
    slots = {
        Role.SUPERVISOR: slice(SUPERVISOR_SLOT, SUPERVISOR_SLOT + 1),
        Role.STORER: slice(STORER_SLOT, STORER_SLOT + 1),
        Role.WORKER: slice(FIRST_WORKER_SLOT, None),
    }[role]
    return sum(int(live.state.slots[slots, counter.column].sum()) for counter in _rows(role) if counter.name == name)


def _rows(role: Role) -> list[Counter]:
    return [counter for counter in COUNTERS if counter.role is role]


def _named_counters(row: npt.NDArray[np.uint64], role: Role) -> dict[str, int]:
    return {counter.name: int(row[counter.column]) for counter in _rows(role)}


def heartbeat_age_s(row: npt.NDArray[np.uint64]) -> float | None:
    """Seconds since the process in this slot gave a sign of life; None before its first."""
    beat_ns = int(row[Slot.HEARTBEAT_MONO_NS])
    return round(max(0, time.monotonic_ns() - beat_ns) / 1e9, 3) if beat_ns else None


def listeners(live: LiveState) -> list[dict[str, Any]]:
    """Address and port are None for one that a reload closed while connections of it live on."""
    found = []
    for number, listener in live.facts.get("listeners", {}).items():
        port = (listener.get("address") or "").rpartition(":")[2]
        found.append({"id": int(number), **listener, "port": int(port) if port.isdecimal() else None})
    return found


# -- ledger


def ledger(live: LiveState, *, every_stream: bool = False) -> dict[str, Any]:
    """Totals, equations with both sides, and the streams that are off; with ``every_stream`` all that are in the
    table."""
    found = live.ledger
    streams = found.streams
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "holds": found.holds,
        "totals": _totals(found),
        "equations": [
            {"equation": one.equation.text, "left": one.left, "right": one.right, "holds": one.holds}
            for one in found.equations
        ],
        "stream_count": len(streams.rows),
        "gone_streams": found.gone_streams,
        "gone_readable": found.gone_readable,
        "streams_off": [_account(live, int(index)) for index in found.off],
        "tries": found.tries,
    }
    if every_stream:
        report["streams"] = [_account(live, index) for index in range(len(streams.rows))]
    return report


def _totals(found: Ledger) -> dict[str, Any]:
    return {**{name: found.totals[name] for name in FIELDS}, "forwarded_bytes": {}}


def _account(live: LiveState, index: int) -> dict[str, Any]:
    streams = live.ledger.streams
    return {
        "stream": live.state.stream_name(int(streams.rows[index])),
        "packet_size": int(streams.packet_sizes[index]),
        **streams.of(index),
        "forwarded_bytes": {},
    }
