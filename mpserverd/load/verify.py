"""Compares what was sent, connection by connection, with what the spool holds.

Rules: the stream of a connection is found by its address and port, and by the time in the stream's name. A connection
that ended in order must be stored to the last byte, and its hash must be the one made while sending. Of a connection
that broke, what is stored must be a beginning of what was sent. It waits for the storer, bounded.
"""

from __future__ import annotations

import datetime
import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mpserverd.load.expected import ExpectedPackets
from mpserverd.load.link import ClientResult, ConnectionRecord
from mpserverd.load.spool_view import SpoolView, StoredStream

POLL_S_MIN, POLL_S_MAX = 0.05, 1.0
ACCEPTED_BEFORE_NS_MAX = 1_000_000
"""A stream's name may say this much less than when the attempt began: it has microseconds, and clocks differ a bit."""


@dataclass
class Verification:
    """``mismatches`` and ``notes`` are lines for people; ``stored_packets`` counts packets of ours in the spool."""

    connections: int = 0
    stored_packets: int = 0
    mismatches: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Sent:
    """One connection, and how many bytes of whole packets it took."""

    client: int
    record: ConnectionRecord
    whole_bytes: int

    def __str__(self) -> str:
        return f"client {self.client} from {self.record.local_address}"


def verify(
    view: SpoolView,
    clients: Sequence[ClientResult],
    expected: ExpectedPackets,
    timeout_s: float,
    *,
    wait: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Verification:
    """Wait until the spool holds everything, or for ``timeout_s``; then compare. Raises SpoolError."""
    sent = connections_sent(clients, expected.size)
    deadline_s, pause_s = clock() + timeout_s, POLL_S_MIN
    while True:
        found = find_streams(sent, view.streams())
        if (
            all(is_settled(one, stream, expected.size) for one, stream in zip(sent, found, strict=True))
            or clock() >= deadline_s
        ):
            break
        wait(pause_s)
        pause_s = min(2 * pause_s, POLL_S_MAX)
    result = Verification(connections=len(sent))
    for one, stream in zip(sent, found, strict=True):
        _compare(view, one, stream, expected, result)
    return result


def connections_sent(clients: Iterable[ClientResult], size: int) -> list[Sent]:
    """Those that carried at least one whole packet; the others leave no stream."""
    return [
        Sent(client.client, record, record.sent_bytes // size * size)
        for client in clients
        for record in client.connections
        if record.sent_bytes >= size
    ]


def find_streams(sent: Sequence[Sent], streams: Iterable[StoredStream]) -> list[StoredStream | None]:
    """For each connection its stream: same peer, accepted first after the attempt began."""
    by_peer: dict[str, list[tuple[int, StoredStream]]] = defaultdict(list)
    for stream in streams:
        peer, _, moment = stream.name.rpartition("-")
        accepted_ns = maybe_accept_time_ns(moment)
        if accepted_ns is not None:
            by_peer[peer].append((accepted_ns, stream))
    found: list[StoredStream | None] = []
    for one in sent:
        earliest_ns = one.record.attempt_unix_ns - ACCEPTED_BEFORE_NS_MAX
        later = [pair for pair in by_peer[peer_of(one.record.local_address)] if pair[0] >= earliest_ns]
        found.append(min(later, key=lambda pair: pair[0])[1] if later else None)
    return found


def peer_of(local_address: str) -> str:
    """``127.0.0.1:4711`` as the beginning of a stream's name: ``127.0.0.1-4711``."""
    host, _, port = local_address.rpartition(":")
    return f"{host.strip('[]').replace(':', '-')}-{port}"


def maybe_accept_time_ns(text: str) -> int | None:
    """The unix time in a stream's name, to the microsecond."""
    try:
        moment = datetime.datetime.strptime(text, "%Y%m%dT%H%M%S.%fZ").replace(tzinfo=datetime.UTC)
    except ValueError:
        return None
    since = moment - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    return (since // datetime.timedelta(microseconds=1)) * 1000


def is_settled(one: Sent, stream: StoredStream | None, size: int) -> bool:
    """Nothing more is to be waited for."""
    if stream is None:
        return False
    if one.record.broken is not None or has_other_packets(stream, size):
        return stream.complete
    return stream.end_offset == one.whole_bytes or (stream.complete and stream.end_offset > one.whole_bytes)


def has_other_packets(stream: StoredStream, size: int) -> bool:
    """The listener cuts what we send into packets of another size, and leaves out what is less than one at the end."""
    return stream.packet_size is not None and stream.packet_size != size


def _compare(
    view: SpoolView, one: Sent, stream: StoredStream | None, expected: ExpectedPackets, result: Verification
) -> None:
    broken = one.record.broken is not None
    if stream is None:
        line = f"{one}: no stream for it in the spool"
        (result.notes if broken else result.mismatches).append(line)
        return
    result.stored_packets += min(stream.stored_bytes, one.whole_bytes) // expected.size
    if not broken and stream.stored_bytes == one.whole_bytes and stream_sha256(view, stream) == one.record.sha256:
        return
    if broken and stream.stored_bytes <= one.whole_bytes:
        difference = expected.first_difference(one.client, one.record.first_index, view.read(stream))
        if difference is None:
            if stream.stored_bytes < one.whole_bytes:
                result.notes.append(
                    f"{one}: the connection broke, {stream.stored_bytes} of {one.whole_bytes} bytes are stored"
                )
            return
    result.mismatches.append(f"{one}: {_explain(view, one, stream, expected)}")


def _explain(view: SpoolView, one: Sent, stream: StoredStream, expected: ExpectedPackets) -> str:
    """What is different, as exactly as it can be known."""
    text = f"stream {stream.name} holds {stream.stored_bytes} bytes, {one.whole_bytes} were sent"
    if has_other_packets(stream, expected.size):
        return f"{text}; the listener's packets have {stream.packet_size} bytes, those sent {expected.size}"
    if stream.first_offset:
        return f"{text}; the first {stream.first_offset} bytes were retired, allow the spool more to verify"
    difference = expected.first_difference(one.client, one.record.first_index, view.read(stream))
    if stream.end_offset > stream.stored_bytes:
        text += f", {stream.end_offset - stream.stored_bytes} bytes are holes"
    if difference is not None:
        index, at = divmod(difference, expected.size)
        return f"{text}; the first difference is at offset {difference}, byte {at} of packet {index}"
    if stream.stored_bytes != one.whole_bytes:
        return f"{text}; what both have is the same"
    return f"{text}, and the hashes differ in times only; these cannot be made again for a flat-out run"


def stream_sha256(view: SpoolView, stream: StoredStream) -> str:
    """Hex digest of its stored bytes."""
    digest = hashlib.sha256()
    for piece in view.read(stream):
        digest.update(piece)
    return digest.hexdigest()
