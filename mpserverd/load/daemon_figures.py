"""What the daemon itself says about our connections: latency, and how much it has received.

It asks over the control socket while the connections are still open, because the daemon's list has open ones only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mpserverd.errors import MpserverdError

PERCENTILES = ("p50", "p99", "p999", "max")
WAIT_S_MAX, POLL_S = 10.0, 0.1

Ask = Callable[[], Any]


@dataclass(frozen=True)
class DaemonFigures:
    """Bytes are by local address of ours; ``latency_ms`` is the worst client's, percentile by percentile."""

    latency_ms: dict[str, float] | None
    sent_bytes: dict[str, int]
    received_bytes: dict[str, int]


def control_client(path: str) -> Ask:
    """A function that returns the daemon's clients. Raises MpserverdError when there is no control client."""
    try:
        from mpserverd.control.client import request  # noqa: PLC0415 - only needed with --control-socket
    except ImportError as error:
        raise MpserverdError(f"--control-socket: the control client cannot be imported ({error})") from None
    return lambda: request(path, "clients")


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


def merge(reply: Any, sent_bytes: Mapping[str, int]) -> DaemonFigures:
    """Rows of the reply that are ours; a row has at least ``peer``, ``bytes`` and ``latency_ms``."""
    listed = reply.get("clients", []) if isinstance(reply, dict) else reply
    rows = [row for row in listed if row.get("peer") in sent_bytes]
    latencies = [row["latency_ms"] for row in rows if row.get("latency_ms")]
    worst = {
        name: max(latency[name] for latency in latencies if latency.get(name) is not None)
        for name in PERCENTILES
        if any(latency.get(name) is not None for latency in latencies)
    }
    return DaemonFigures(worst or None, dict(sent_bytes), {row["peer"]: int(row["bytes"]) for row in rows})
