"""A running daemon as its tools see it: its facts, and its tables mapped read-only.

The daemon hands out two descriptors and is done; whatever is computed is computed here, and costs it nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from typing import Any

from mpserverd.arena.chunks import ChunkTable
from mpserverd.arena.ledger import Ledger, settle
from mpserverd.arena.state import StateTable
from mpserverd.control.client import request_state

_SHORT_TRIES = 3
_PAUSE_S = 0.06


@dataclasses.dataclass(frozen=True)
class LiveState:
    """``facts`` are the supervisor's own words; both tables go on changing while they are read."""

    facts: dict[str, Any]
    state: StateTable
    chunks: ChunkTable

    @functools.cached_property
    def ledger(self) -> Ledger:
        """Read once, so that all of one report agrees. Takes up to about a second when something is off."""
        return settle(self.state, self.chunks, pause)


def open_state(socket_path: str) -> LiveState:
    """Ask the daemon for its tables and map them. Raises UnreachableError, and LayoutError for another version."""
    facts, state_fd, chunks_fd = request_state(socket_path)
    try:
        return LiveState(facts, StateTable(state_fd, read_only=True), ChunkTable(chunks_fd, read_only=True))
    finally:  # the mappings keep the memory
        os.close(state_fd)
        os.close(chunks_fd)


def pause(number: int) -> None:
    """Between two tries of the ledger: hardly at first, then long enough for a commit."""
    time.sleep(0.001 if number <= _SHORT_TRIES else _PAUSE_S)
