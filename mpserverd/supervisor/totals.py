"""What the last line of a run says: totals, and what was at risk. Read from the shared tables when nobody writes."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from mpserverd.arena.state import Gone, Head, StateTable, Str, StreamFlag, StreamState


@dataclasses.dataclass(frozen=True, slots=True)
class Totals:
    """``at_risk_bytes`` were taken from clients and are not durable; they die with the arena."""

    connections: int
    received_bytes: int
    durable_bytes: int
    dropped_bytes: int
    at_risk_bytes: int


def read_totals(state: StateTable) -> Totals:
    """Streams in the table, and those that have left it."""
    streams = _present(state)
    stored = streams[(streams[:, Str.FLAGS] & StreamFlag.STORE) != 0]

    def gone(word: int) -> int:
        return int(state.words[Head.GONE + word])

    return Totals(
        connections=int(state.words[Head.TOTAL_CONNECTIONS]),
        received_bytes=gone(Gone.RECEIVED_BYTES) + int((streams[:, Str.POSITION] - streams[:, Str.LOST]).sum()),
        durable_bytes=gone(Gone.DURABLE_BYTES) + int((stored[:, Str.DURABLE] - stored[:, Str.DURABLE_HOLES]).sum()),
        dropped_bytes=gone(Gone.DROPPED_BYTES) + int(streams[:, Str.DROPPED].sum()),
        at_risk_bytes=at_risk_bytes(state),
    )


def at_risk_bytes(state: StateTable) -> int:
    """Bytes of stored streams that were taken from a socket and are not durable."""
    streams = _present(state)
    stored = streams[(streams[:, Str.FLAGS] & StreamFlag.STORE) != 0]
    return int(np.maximum(stored[:, Str.POSITION] - stored[:, Str.DURABLE], 0).sum())


def _present(state: StateTable) -> npt.NDArray[np.int64]:
    rows = np.flatnonzero(
        (state.streams[:, Str.STATE] == StreamState.OPEN) | (state.streams[:, Str.STATE] == StreamState.DRAINING)
    )
    return state.streams[rows].astype(np.int64)
