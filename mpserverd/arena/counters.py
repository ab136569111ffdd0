"""Every counter that a process keeps for itself, as rows: which slot, which word, its name, unit and one line of help.

The ledger's totals are not here: those come from the streams' rows (arena/ledger.py).
"""

from __future__ import annotations

import dataclasses
import enum

from mpserverd.arena.state import Slot


class Role(enum.Enum):
    SUPERVISOR = "supervisor"
    WORKER = "worker"
    STORER = "storer"


@dataclasses.dataclass(frozen=True, slots=True)
class Counter:
    """``word`` is relative to Slot.COUNTER; ``gauge`` values go down too."""

    role: Role
    word: int
    name: str
    unit: str
    help: str
    gauge: bool = False

    @property
    def column(self) -> int:
        return Slot.COUNTER + self.word


_S, _W, _D = Role.SUPERVISOR, Role.WORKER, Role.STORER

NEVER_S = 2**32 - 1
"""A gauge of seconds with this value means: not at all."""

COUNTERS: tuple[Counter, ...] = (
    Counter(_S, 0, "accepted", "connections", "Connections accepted and admitted."),
    Counter(_S, 1, "adopted", "connections", "Connections given to another worker after theirs died."),
    Counter(_S, 2, "handed_over", "connections", "Connections moved between live workers on purpose."),
    Counter(_S, 3, "chunks_leased", "chunks", "Chunks leased to workers."),
    Counter(_S, 4, "starved", "requests", "Requests for chunks that found none free."),
    Counter(_S, 5, "reloads", "reloads", "Configurations taken over without a restart."),
    Counter(_S, 6, "reloads_refused", "reloads", "Reloads refused because the configuration was wrong."),
    Counter(_S, 7, "truncated_packets", "packets", "Packets that the end of their connection cut off."),
    Counter(_S, 8, "superseded", "connections", "Live mps connections ended because the same client came again."),
    Counter(_S, 9, "hello_syntax", "connections", "Hellos answered with ERR syntax: the line was not understood."),
    Counter(
        _S, 10, "hello_version", "connections", "Hellos answered with ERR version: another version of the protocol."
    ),
    Counter(
        _S,
        11,
        "hello_line_too_long",
        "connections",
        "Hellos answered with ERR line-too-long: no line end within 512 bytes.",
    ),
    Counter(
        _S, 12, "hello_client_id", "connections", "Hellos answered with ERR client-id: a client id that may not be."
    ),
    Counter(
        _S,
        13,
        "hello_packet_size",
        "connections",
        "Hellos answered with ERR packet-size: a packet size that the listener or the stream does not have.",
    ),
    Counter(_S, 14, "hello_epoch", "connections", "Hellos answered with ERR epoch: another epoch than the stream's."),
    Counter(_S, 15, "hello_first", "connections", "Hellos answered with ERR first: first= is no number, or too large."),
    Counter(_S, 16, "hello_token", "connections", "Hellos answered with ERR token: no valid token."),
    Counter(_S, 17, "hello_timeout", "connections", "Hellos answered with ERR timeout: handshake_timeout_s went by."),
    Counter(_S, 18, "hello_in_use", "connections", "Hellos answered with ERR in-use: another client has that id now."),
    Counter(
        _S, 19, "hello_busy", "connections", "Hellos answered with ERR busy: limits, or a daemon that lets nobody in."
    ),
    Counter(
        _S,
        20,
        "hello_unavailable",
        "connections",
        "Hellos answered with ERR unavailable: the stream could not be opened in time.",
    ),
    Counter(
        _S, 21, "hello_quarantined", "connections", "Hellos answered with ERR quarantined: workers died on its stream."
    ),
    Counter(_S, 22, "child_deaths", "deaths", "Workers and storers that ended without being told to."),
    Counter(
        _S,
        23,
        "rebalanced",
        "connections",
        "Connections moved because their worker did much more than the others; in handed_over too.",
    ),
    Counter(_W, 0, "blocked", "times", "Times that a stream was not read because the arena had no place for it."),
    Counter(
        _W, 1, "dropped_packets", "packets", "Packets dropped because on_full = drop-oldest and the arena was full."
    ),
    Counter(_W, 2, "checks", "calls", "Runs of the packet check."),
    Counter(_W, 3, "chunks_taken", "chunks", "Chunks given to streams."),
    Counter(_W, 4, "chunks_leased", "chunks", "Chunks that this worker holds ahead.", gauge=True),
    Counter(_W, 5, "attached", "connections", "Connections taken up."),
    Counter(_D, 0, "cycles", "cycles", "Write, sync and commit cycles."),
    Counter(_D, 1, "written_bytes", "bytes", "Bytes written to segments, rewritten blocks included."),
    Counter(_D, 2, "cycle_ns", "ns", "Duration of the last cycle.", gauge=True),
    Counter(_D, 3, "cycle_ns_max", "ns", "Longest cycle so far.", gauge=True),
    Counter(_D, 4, "write_errors", "errors", "Writes and syncs that failed."),
    Counter(_D, 5, "segments_retired", "segments", "Segments removed by retention."),
    Counter(_D, 6, "spool_bytes", "bytes", "Bytes of all segments.", gauge=True),
    Counter(_D, 7, "free_bytes", "bytes", "Free space of the spool's file system.", gauge=True),
    Counter(_D, 8, "direct", "flag", "1 when segments are written past the page cache.", gauge=True),
    Counter(_D, 9, "full", "flag", "1 while the spool is full.", gauge=True),
    Counter(_D, 10, "segments_created", "segments", "Segments made."),
    Counter(_D, 11, "segments_aside", "segments", "Segments set aside after a failed write or sync."),
    Counter(_D, 12, "syncs", "calls", "fdatasync and syncfs calls."),
    Counter(
        _D,
        13,
        "cut_bytes",
        "bytes",
        "At most so many bytes were written, not durable, and cut after crashes of everything.",
    ),
    Counter(
        _D,
        14,
        "time_to_full_s",
        "s",
        f"Until the disk is full at the rate of the last minutes; {NEVER_S} for not at all.",
        gauge=True,
    ),
    Counter(_D, 15, "full_begun", "times", "Times that the spool became full."),
    Counter(_D, 16, "full_over", "times", "Times that it had room again."),
)


def column(role: Role, name: str) -> int:
    """The slot column of a counter. Raises KeyError."""
    for counter in COUNTERS:
        if counter.role is role and counter.name == name:
            return counter.column
    raise KeyError(f"{role.value}.{name}")
