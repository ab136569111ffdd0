"""Whether a connection that was just accepted may stay. Pure: the caller counts, closes and logs.

Limits of 0 mean "no limit of its own"; ``max_clients`` always holds.
"""

from __future__ import annotations

import dataclasses

from mpserverd.arena.state import RefuseReason


@dataclasses.dataclass(frozen=True, slots=True)
class Standing:
    """What is so at the moment of the accept; counts do not include the new connection."""

    permitted: bool
    stopping: bool
    active_count: int
    listener_count: int
    address_count: int
    free_row_count: int


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    max_clients: int
    max_connections: int = 0
    max_connections_per_address: int = 0


def refuse_reason(limits: Limits, standing: Standing) -> RefuseReason:
    """NONE when the connection may stay, else the first rule that forbids it."""
    if standing.stopping:
        return RefuseReason.STOPPING
    if not standing.permitted:
        return RefuseReason.DENIED
    if standing.active_count >= limits.max_clients:
        return RefuseReason.MAX_CLIENTS
    if 0 < limits.max_connections <= standing.listener_count:
        return RefuseReason.LISTENER_LIMIT
    if 0 < limits.max_connections_per_address <= standing.address_count:
        return RefuseReason.ADDRESS_LIMIT
    if standing.free_row_count <= 0:
        return RefuseReason.NO_ROWS
    return RefuseReason.NONE
