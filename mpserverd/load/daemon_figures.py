"""What the daemon itself says about our connections: latency, and how much it has received.

It looks at the daemon's shared tables, as mpserverctl does, while the connections are still open, because the list of
connections has open ones only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PERCENTILES = ("p50", "p99", "p999", "max")
WAIT_S_MAX, POLL_S = 10.0, 0.1

Rows = Sequence[Mapping[str, Any]]
Ask = Callable[[], Rows]


@dataclass(frozen=True)
class DaemonFigures:
    """Bytes are by local address of ours; ``latency_ms`` is the worst client's, percentile by percentile."""

    latency_ms: dict[str, float] | None
    sent_bytes: dict[str, int]
    received_bytes: dict[str, int]


def control_client(path: str) -> Ask:
    """A function that returns the daemon's clients, computed from its shared tables as mpserverctl does.

    The function raises UnreachableError when no daemon answers at ``path``.
    """
    from mpserverd.arena.clients import clients  # noqa: PLC0415 - only needed with --control-socket
    from mpserverd.arena.live import open_state  # noqa: PLC0415

    return lambda: clients(open_state(path))


def collect(
    ask: Ask,
    sent_bytes: Mapping[str, int],
    *,
    wait: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> DaemonFigures:
    """Ask until the daemon has received what each local address sent, or for WAIT_S_MAX."""
    deadline_s = clock() + WAIT_S_MAX
    while True:
        figures = merge(ask(), sent_bytes)
        behind = any(figures.received_bytes.get(address, 0) < sent for address, sent in sent_bytes.items())
        if not behind or clock() >= deadline_s:
            return figures
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
