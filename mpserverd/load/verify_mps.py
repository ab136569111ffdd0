"""Compares what mps clients sent, each over all of its connections, with the stream of its id in the spool.

Rules: everything that was acknowledged must be there, from packet 0 on, in order and without a hole, and nothing that
was not sent. Packets are made again and compared byte by byte; flat out their times are not known, so there the hash
that was made while sending is compared too, when the client had one connection. It waits for the storer, bounded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from mpserverd.load.expected import ExpectedPackets
from mpserverd.load.link import ClientResult
from mpserverd.load.spool_view import SpoolView, StoredStream
from mpserverd.load.verify import POLL_S_MAX, POLL_S_MIN, Verification, has_other_packets, stream_sha256


def verify_mps(
    view: SpoolView,
    clients: Sequence[ClientResult],
    expected: ExpectedPackets,
    timeout_s: float,
    *,
    wait: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Verification:
    """Wait until the streams are complete, or for ``timeout_s``; then compare. Raises SpoolError."""
    sent = [client for client in clients if client.packets]
    deadline_s, pause_s = clock() + timeout_s, POLL_S_MIN
    while True:
        found = find_client_streams(sent, view.streams())
        if all(map(is_settled, found)) or clock() >= deadline_s:
            break
        wait(pause_s)
        pause_s = min(2 * pause_s, POLL_S_MAX)
    result = Verification(connections=sum(len(client.connections) for client in sent))
    for client, stream in zip(sent, found, strict=True):
        _compare(view, client, stream, expected, result)
    return result


def find_client_streams(clients: Sequence[ClientResult], streams: Iterable[StoredStream]) -> list[StoredStream | None]:
    """For each client the stream of its id and epoch; where the spool does not tell epochs, of its id."""
    by_name = {stream.name: stream for stream in streams}
    found: list[StoredStream | None] = []
    for client in clients:
        stream = by_name.get(client.client_id or "")
        other = stream is not None and stream.epoch is not None and stream.epoch != client.epoch
        found.append(None if other else stream)
    return found


def is_settled(stream: StoredStream | None) -> bool:
    """Nothing more is to be waited for."""
    return stream is not None and stream.complete


def _compare(
    view: SpoolView,
    client: ClientResult,
    stream: StoredStream | None,
    expected: ExpectedPackets,
    result: Verification,
) -> None:
    acked = client.packets_acked or 0
    who = f"client {client.client_id}"
    if stream is None:
        line = f"{who}: no stream of its id and epoch {client.epoch} in the spool"
        (result.mismatches if acked else result.notes).append(line)
        return
    stored = stream.stored_bytes // expected.size
    result.stored_packets += min(stored, client.packets)
    wrong = _what_is_wrong(view, client, stream, expected)
    text = f"{who}: {stored} packets are stored, {acked} of {client.packets} sent were acknowledged"
    if wrong is not None:
        result.mismatches.append(f"{text}; {wrong}")
    elif stored != client.packets:
        result.notes.append(text)


def _what_is_wrong(
    view: SpoolView, client: ClientResult, stream: StoredStream, expected: ExpectedPackets
) -> str | None:
    size, acked = expected.size, client.packets_acked or 0
    if has_other_packets(stream, size):
        return f"its packets have {stream.packet_size} bytes, those sent {size}"
    if stream.first_offset:
        return f"the first {stream.first_offset} bytes were retired, allow the spool more to verify"
    if stream.end_offset > stream.stored_bytes:
        return f"{stream.end_offset - stream.stored_bytes} bytes are holes"
    if stream.end_offset > client.packets * size:
        return f"the stream holds {stream.end_offset} bytes, {client.packets * size} were sent"
    if stream.end_offset < acked * size:
        return f"{acked - stream.end_offset // size} acknowledged packets are missing at its end"
    if stream.end_offset % size:
        return "it ends inside a packet"
    difference = expected.first_difference(client.client, 0, view.read(stream))
    if difference is not None:
        index, at = divmod(difference, size)
        return f"the first difference is at offset {difference}, byte {at} of packet {index}"
    sha256 = client.connections[0].sha256 if len(client.connections) == 1 else None
    whole = client.connections[0].sent_bytes == stream.end_offset
    if sha256 is not None and whole and stream_sha256(view, stream) != sha256:
        return "the hashes differ, in times only; these cannot be made again for a flat-out run"
    return None
