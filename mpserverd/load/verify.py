"""Compares what was sent, connection by connection, with what the spool holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Verification:
    """``mismatches`` are lines for people; ``stored_packets`` counts whole packets of ours in the spool."""

    connections: int = 0
    stored_packets: int = 0
    mismatches: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {
            "connections": self.connections,
            "stored_packets": self.stored_packets,
            "mismatches": self.mismatches,
            "notes": self.notes,
        }
