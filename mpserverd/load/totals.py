"""What mps clients' acknowledgements add up to. Pure; everything is None or 0 for clients that speak raw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpserverd.load.link import ClientResult


def ack_totals(clients: Sequence[ClientResult]) -> dict[str, Any]:
    """Fields of the report. ``acked_rate`` is over the time from the start to the last acknowledgement of all."""
    known = [client for client in clients if client.packets_acked is not None]
    acked = sum(client.packets_acked or 0 for client in known)
    acked_s = max((client.acked_s for client in known if client.acked_s is not None), default=None)
    levels = {client.level for client in known if client.level is not None}
    return {
        "packets_acked": acked if known else None,
        "packets_resent": sum(client.packets_resent for client in known),
        "packets_withdrawn": sum(client.packets_withdrawn for client in known),
        "level": levels.pop() if len(levels) == 1 else "mixed" if levels else None,
        "acked_s": None if acked_s is None else round(acked_s, 6),
        "acked_rate": round(acked / acked_s, 3) if acked_s else None,
    }
