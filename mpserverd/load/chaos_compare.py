"""Compares what the clients of ``mpload chaos`` sent with what a spool holds, byte for byte, in both ways of reading.

The hash of what is stored must be that of what was sent. Where it is not, the stored packets are looked up one by one
by the number that they carry: missing ones are lost, further copies are doubled, what was never sent is strange. What
is stored and was sent by nobody is doubled too.

A named client's connections are one stream. When the daemon cannot go on with that stream soon, because the storer
stands still, it gives the next connection a stream of its own; then its packets are to be found there, and the main
stream may count a gap for them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import pathlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from mpserverd.errors import MpserverdError
from mpserverd.load.chaos_content import PIECE_BYTES_MAX, Content
from mpserverd.load.chaos_sent import SentStream
from mpserverd.load.chaos_stored import WAYS, StoredStream, stored_streams

LINES_MAX = 100

Range = tuple[int, int]


@dataclasses.dataclass
class Comparison:
    """Sizes are bytes. ``gaps`` and ``missing`` are what the catalog counts, rightly or not.
    ``lines`` say what is wrong, for people."""

    streams: int = 0
    stored_bytes: int = 0
    lost_bytes: int = 0
    doubled_bytes: int = 0
    strange_bytes: int = 0
    split_streams: int = 0
    gaps: int = 0
    missing: int = 0
    lines: list[str] = dataclasses.field(default_factory=list)

    @property
    def is_exact(self) -> bool:
        return not (self.lost_bytes or self.doubled_bytes or self.strange_bytes or self.lines)

    def say(self, text: str) -> None:
        if len(self.lines) < LINES_MAX:
            self.lines.append(text)


@dataclasses.dataclass(frozen=True)
class Part:
    """A stored stream, and the ranges of packets (first, end) of a sent one that it must hold, in this order."""

    stored: StoredStream
    ranges: tuple[Range, ...]

    @property
    def counted(self) -> dict[str, int]:
        """What the daemon may count because packets between the ranges went elsewhere."""
        jumps = [later[0] - before[1] for before, later in itertools.pairwise(self.ranges)]
        jumps = [jump for jump in jumps if jump]
        return {"gaps": len(jumps), "missing": sum(jumps)} if jumps else {}


def compare(spool: pathlib.Path, sent: Sequence[SentStream], seed: int) -> Comparison:
    """Everything that was sent with everything that is stored. The daemon may run still, but must be idle."""
    result = Comparison()
    stored = stored_streams(spool)
    taken: set[str] = set()
    for one, found in match(sent, stored):
        taken |= {stream.full_name for stream in found}
        result.streams += len(found)
        result.split_streams += max(0, len(found) - 1)
        result.stored_bytes += sum(stream.durable for stream in found)
        if found:
            _compare_stream(spool, one, found, seed, result)
        elif one.wanted_bytes and not one.broken:
            result.lost_bytes += one.wanted_bytes
            result.say(f"{label(one)}: all {one.wanted_bytes} bytes are lost, there is no such stream")
    for stream in stored:
        if stream.full_name not in taken:
            result.stored_bytes += stream.durable
            result.doubled_bytes += stream.durable
            result.say(f"stream {stream.full_name} ({stream.durable} bytes) was sent by nobody")
    return result


def label(one: SentStream) -> str:
    return f"client {one.client} stream {one.name or f'{one.address}:{one.port}'}"


def match(
    sent: Iterable[SentStream], stored: Iterable[StoredStream]
) -> Iterator[tuple[SentStream, list[StoredStream]]]:
    """The stored streams of each sent one. A port that was used twice gave two streams, in the order of time."""
    by_name: dict[str, list[StoredStream]] = defaultdict(list)
    by_peer: dict[str, list[StoredStream]] = defaultdict(list)
    for stream in stored:
        by_name[stream.name].append(stream)
        peer, _, _ = stream.name.rpartition("-")
        by_peer[peer].append(stream)
        by_peer[peer.rpartition("-")[0]].append(stream)
    for one in sorted(sent, key=lambda one: (one.client, one.number)):
        if not one.name:
            own = by_peer[f"{one.address}-{one.port}" if one.port else one.address]
            yield one, [own.pop(0)] if own else []
            continue
        split = [stream for name in sorted(by_name) if name.startswith(f"{one.name}.") for stream in by_name[name]]
        yield one, [*by_name[one.name], *split]


def _compare_stream(
    spool: pathlib.Path, one: SentStream, found: list[StoredStream], seed: int, result: Comparison
) -> None:
    content = Content(seed, one.client, one.number, one.packet_size)
    parts = _parts(spool, one, found, content, result)
    covered = sum(end - first for part in parts for first, end in part.ranges) * one.packet_size
    fine = covered == one.wanted_bytes or bool(one.broken)
    for part in parts:
        _compare_counts(one, part, result)
        whole = len(parts) == 1 and not one.broken
        wanted = one.sha256 if whole else _expected_hash(content, part.ranges)
        for way, read in WAYS.items():
            digest, error = _hash(read(spool, part.stored))
            if error:
                result.say(f"{label(one)}: the {way} cannot read {part.stored.full_name}: {error}")
            if digest != wanted:
                fine = False
                first = _first_difference(read(spool, part.stored), content, part.ranges)
                if one.broken and first == part.stored.durable:
                    fine = True  # a beginning of what was sent
                    continue
                size_bytes = sum(end - first for first, end in part.ranges) * one.packet_size
                result.say(
                    f"{label(one)}, by the {way}: {part.stored.durable} bytes stored, {size_bytes} sent, sha256 "
                    f"{digest[:16]} for {wanted[:16]}, the first difference at offset {first}"
                )
    if not fine:
        _count_packets(spool, one, parts, content, result)


def _parts(
    spool: pathlib.Path, one: SentStream, found: list[StoredStream], content: Content, result: Comparison
) -> list[Part]:
    """Which connections each stored stream holds: that of a split one is told by the number of its first packet."""
    size = one.packet_size
    left = {first // size: (first // size, end // size) for first, end in one.ranges}
    parts = []
    for stream in found:
        if stream.packet_size != size or stream.first_offset:
            result.say(f"{label(one)}: packets of {stream.packet_size} bytes from offset {stream.first_offset}")
        elif stream.name.startswith(f"{one.name}.") and one.name:
            parts.append(Part(stream, (left.pop(_first_number(spool, stream, content), (0, 0)),)))
    mains = [stream for stream in found if stream.name == one.name or not one.name]
    # a second epoch of the main stream should not be; it then holds nothing that was sent
    return [*(Part(main, tuple(left.values()) if main is mains[0] else ()) for main in mains), *parts]


def _first_number(spool: pathlib.Path, stream: StoredStream, content: Content) -> int:
    with contextlib.suppress(MpserverdError, OSError):
        head = next(WAYS["files"](spool, stream), b"")[: content.packet_size]
        if len(head) == content.packet_size:
            return int(content.numbers_of(np.frombuffer(head, np.uint8).reshape(1, -1))[0])
    return -1


def _compare_counts(one: SentStream, part: Part, result: Comparison) -> None:
    """A gap is seen only by who knows the packet before it: not after the stream was put away meanwhile."""
    counted, most = part.stored.counted, part.counted
    result.gaps += counted.get("gaps", 0)
    result.missing += counted.get("missing", 0)
    if any(count > most.get(name, 0) for name, count in counted.items()):
        result.say(f"{label(one)}: the catalog counts {counted}, at most {most} would be right")


def _hash(pieces: Iterator[bytes]) -> tuple[str, str]:
    """Hash of what could be read, and the error that ended it."""
    digest = hashlib.sha256()
    try:
        for piece in pieces:
            digest.update(piece)
    except (MpserverdError, OSError) as error:
        return digest.hexdigest(), str(error)
    return digest.hexdigest(), ""


def _expected(content: Content, ranges: Iterable[Range]) -> Iterator[bytes]:
    size = content.packet_size
    step = PIECE_BYTES_MAX // size * size
    for first, end in ranges:
        for at in range(first * size, end * size, step):
            yield content.piece(at, min(at + step, end * size)).tobytes()


def _expected_hash(content: Content, ranges: Iterable[Range]) -> str:
    return _hash(_expected(content, ranges))[0]


def _first_difference(stored: Iterator[bytes], content: Content, ranges: Iterable[Range]) -> int:
    """Offset of the first byte that differs, or is there on one side only."""
    expected, at = _expected(content, ranges), 0
    here = there = b""
    with contextlib.suppress(MpserverdError, OSError):
        while True:
            here, there = here or next(stored, b""), there or next(expected, b"")
            length = min(len(here), len(there))
            if not length:
                return at
            differ = np.flatnonzero(np.frombuffer(here, np.uint8, length) != np.frombuffer(there, np.uint8, length))
            if len(differ):
                return at + int(differ[0])
            at, here, there = at + length, here[length:], there[length:]
    return at


def _count_packets(
    spool: pathlib.Path, one: SentStream, parts: Iterable[Part], content: Content, result: Comparison
) -> None:
    """Look at every stored packet: which one is it? By the worse of the two ways of reading."""
    worst, size = (0, 0, 0), one.packet_size
    wanted = np.zeros(one.whole_bytes // size, np.bool_)
    for first, end in one.ranges:
        wanted[first // size : end // size] = True
    for read in WAYS.values():
        seen = np.zeros(len(wanted), np.int64)
        strange = 0
        for part in parts:
            strange += _see(read(spool, part.stored), content, seen)
        lost = 0 if one.broken else int((wanted & (seen == 0)).sum()) * size
        doubled = int(np.maximum(seen[wanted] - 1, 0).sum()) * size
        strange += int(seen[~wanted].sum()) * size
        worst = max(worst, (lost, doubled, strange), key=sum)
    result.lost_bytes += worst[0]
    result.doubled_bytes += worst[1]
    result.strange_bytes += worst[2]
    result.say(f"{label(one)}: {worst[0]} bytes lost, {worst[1]} doubled, {worst[2]} strange, {one.broken or 'whole'}")


def _see(pieces: Iterator[bytes], content: Content, seen: npt.NDArray[np.int64]) -> int:
    """Add each packet to ``seen`` at its index; returns the bytes that are no packet of this stream."""
    size, strange, rest = content.packet_size, 0, b""
    with contextlib.suppress(MpserverdError, OSError):  # said before; what could be read counts
        for piece in pieces:
            joined = rest + piece
            whole = len(joined) // size
            rows = np.frombuffer(joined, np.uint8, whole * size).reshape(-1, size)
            rest = joined[whole * size :]
            numbers = content.numbers_of(rows)
            own = (numbers < len(seen)) & (content.packets(numbers) == rows).all(axis=1)
            strange += int((~own).sum()) * size
            np.add.at(seen, numbers[own], 1)
    return strange + len(rest)
