"""Times of packets: what ``--since`` and ``--until`` accept, the time index beside the segments, and how times are
printed.

The index holds pairs (offset, unix ns), at most one a second: everything below the offset was durable at that time.
So a time means the packets that became durable after it, to about a second; ``[a, b)`` and ``[b, c)`` share no packet
and leave none out.

A wall clock that steps back is read as one that stood still. Torn or empty entries at the end of an index are ignored.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mpserverd.errors import UsageError
from mpserverd.streams.catalog_view import StreamSnapshot

NS = 1_000_000_000
UNIX_NS_MAX = 2**63 - 1
INDEX_ENTRY = np.dtype([("offset", "<u8"), ("unix_ns", "<u8")])
UNITS_S = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
AGO = re.compile(r"(?:now)?\s*-\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|w)")
UNIX = re.compile(r"\d{1,10}(\.\d{1,9})?")
TIME_HELP = "2026-01-31T12:00:00Z, now-10s, -5m (ms, s, m, h, d, w) or unix seconds"


def parse_time(text: str, now_unix_ns: int) -> int:
    """Unix nanoseconds of what a person wrote; a time without a zone is UTC. Raises UsageError, which says what is
    accepted."""
    text = text.strip()
    if text == "now":
        return now_unix_ns
    if ago := AGO.fullmatch(text):
        return max(0, now_unix_ns - round(float(ago[1]) * UNITS_S[ago[2]] * NS))
    if UNIX.fullmatch(text):
        seconds, _, fraction = text.partition(".")
        return int(seconds) * NS + int(fraction.ljust(9, "0")[:9])
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"{text!r} is no time; write {TIME_HELP}") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    since_epoch = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return max(0, (since_epoch.days * 86400 + since_epoch.seconds) * NS + since_epoch.microseconds * 1000)


def iso_utc(unix_ns: int) -> str:
    """ISO 8601 in UTC, to the nanosecond where it has any; a number that is no time stays a number."""
    if not 0 <= unix_ns <= UNIX_NS_MAX:
        return str(unix_ns)
    text = str(np.datetime_as_string(np.datetime64(unix_ns, "ns")))
    return text.rstrip("0").rstrip(".") + "Z"


def index_at(snapshot: StreamSnapshot, directory: Path, unix_ns: int) -> int:
    """Index of the first packet that was not yet known to be durable at that time, within what retention has left."""
    row = snapshot.row
    offset = row.first_offset
    if row.updated_unix_ns <= unix_ns:
        offset = row.durable
    else:
        for segment in reversed(snapshot.segments):
            found = _newest_before(read_index(directory / segment.index_name, row.durable), unix_ns)
            if found is not None:
                offset = max(offset, found)
                break
    return -(-offset // row.packet_size)


def _newest_before(entries: npt.NDArray[np.void], unix_ns: int) -> int | None:
    """Offset of the last entry at or before that time."""
    never_back = np.maximum.accumulate(entries["unix_ns"])
    count = int(np.searchsorted(never_back, np.uint64(min(unix_ns, UNIX_NS_MAX)), side="right"))
    return int(entries["offset"][count - 1]) if count else None


def read_index(path: Path, durable: int | None) -> npt.NDArray[np.void]:
    """The entries of one index file, up to ``durable`` if given; none when there is no such file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        content = b""
    entries = np.frombuffer(content, INDEX_ENTRY, len(content) // INDEX_ENTRY.itemsize)
    entries = entries[entries["unix_ns"] > 0]
    return entries if durable is None else entries[entries["offset"] <= durable]


def index_bytes(path: Path, durable: int) -> int:
    """Length of the part of an index file that says nothing of what is behind ``durable``. Raises OSError."""
    content = path.read_bytes()
    entries = np.frombuffer(content, INDEX_ENTRY, len(content) // INDEX_ENTRY.itemsize)
    behind = np.flatnonzero(entries["offset"] > durable)
    return INDEX_ENTRY.itemsize * int(behind[0] if len(behind) else len(entries))
