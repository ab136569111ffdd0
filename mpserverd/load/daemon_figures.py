"""What the daemon itself says: the latency of our connections, what it has received of them, and what it stored.

It looks at the daemon's shared tables, as mpserverctl does, while the connections are still open, because the list of
connections has open ones only. What was stored is the difference of the whole ledger over the run: streams of
connections that broke are in it too, and so are other clients; then the ledger has received more than was sent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

PERCENTILES = ("p50", "p99", "p999", "max")
WAIT_S_MAX, POLL_S = 10.0, 0.1

LEDGER_FIELDS = ("received_bytes", "stored_bytes", "unstored_bytes", "dropped_bytes")

Rows = Sequence[Mapping[str, Any]]
Totals = Mapping[str, int]


@dataclass(frozen=True)
class Look:
    """One look at the daemon: its open connections, and the totals of its ledger."""

    clients: Rows
    totals: Totals


Ask = Callable[[], Look]


@dataclass(frozen=True)
class DaemonFigures:
    """``sent_bytes`` and ``received_bytes`` are by local address of ours, of connections that are open at the end.

    ``latency_ms`` is the worst client's, percentile by percentile; ``ledger`` the difference over the run,
    LEDGER_FIELDS of all streams, None when the daemon began anew meanwhile.
    """

    latency_ms: dict[str, float] | None
    sent_bytes: dict[str, int]
    received_bytes: dict[str, int]
    ledger: dict[str, int] | None = None


def control_client(path: str) -> Ask:
    """A function that looks at the daemon's shared tables, as mpserverctl does.

    The function raises UnreachableError when no daemon answers at ``path``.
    """
    from mpserverd.arena.clients import clients  # noqa: PLC0415 - only needed with --control-socket
    from mpserverd.arena.live import open_state  # noqa: PLC0415

    def look() -> Look:
        live = open_state(path)
        return Look(clients(live), live.ledger.totals)

    return look


def collect(
    ask: Ask,
    sent_bytes: Mapping[str, int],
    before: Totals,
    *,
    wait: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> DaemonFigures:
    """Ask until the daemon has received what each local address sent and has none of it in memory, or for WAIT_S_MAX.

    ``before``: the ledger's totals before anything was sent.
    """
    deadline_s = clock() + WAIT_S_MAX
    while True:
        look = ask()
        figures = merge(look.clients, sent_bytes)
        behind = any(figures.received_bytes.get(address, 0) < sent for address, sent in sent_bytes.items())
        if not (behind or look.totals["in_arena_bytes"]) or clock() >= deadline_s:
            return replace(figures, ledger=difference(before, look.totals))
        wait(POLL_S)


def merge(reply: Rows, sent_bytes: Mapping[str, int]) -> DaemonFigures:
    """Rows of the reply that are ours; a row has at least ``peer``, ``bytes`` and ``latency_ms``."""
    rows = [row for row in reply if row.get("peer") in sent_bytes]
    latencies = [row["latency_ms"] for row in rows if row.get("latency_ms")]
    worst = {
        name: max(latency[name] for latency in latencies if latency.get(name) is not None)
        for name in PERCENTILES
        if any(latency.get(name) is not None for latency in latencies)
    }
    return DaemonFigures(worst or None, dict(sent_bytes), {row["peer"]: int(row["bytes"]) for row in rows})


def difference(before: Totals, after: Totals) -> dict[str, int] | None:
    """What the ledger took up meanwhile. None when it began anew: then nothing can be told."""
    found = {name: after[name] - before[name] for name in LEDGER_FIELDS}
    return None if min(found.values()) < 0 else found
