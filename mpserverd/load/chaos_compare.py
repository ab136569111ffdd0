"""Compares what the clients of ``mpload chaos`` sent with what a spool holds, byte for byte, twice.

Once through the reader that everybody uses, once with SQLite and plain reads of the segment files alone; both must give
the hash that was made while sending. Where they do not, the stored packets are looked up one by one by the number that
they carry: missing ones are lost, further copies are doubled, what was never sent is strange. What is stored and was
sent by nobody is doubled too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import pathlib
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from mpserverd.errors import MpserverdError
from mpserverd.load.chaos_client import SentStream
from mpserverd.load.chaos_content import Content
from mpserverd.streams.reader import open_stream

PIECE_BYTES = 1 << 18
LINES_MAX = 100


@dataclasses.dataclass(frozen=True)
class StoredStream:
    """A row of the catalog. ``flaws``: its accounts that should be 0 and are not."""

    name: str
    full_name: str
    directory: str
    packet_size: int
    first_offset: int
    durable: int
    flaws: dict[str, int]


@dataclasses.dataclass
class Comparison:
    """Sizes are bytes. ``lines`` say what is wrong, for people."""

    streams: int = 0
    stored_bytes: int = 0
    lost_bytes: int = 0
    doubled_bytes: int = 0
    strange_bytes: int = 0
    lines: list[str] = dataclasses.field(default_factory=list)

    @property
    def is_exact(self) -> bool:
        return not (self.lost_bytes or self.doubled_bytes or self.strange_bytes or self.lines)

    def say(self, text: str) -> None:
        if len(self.lines) < LINES_MAX:
            self.lines.append(text)


def compare(spool: pathlib.Path, sent: Sequence[SentStream], seed: int) -> Comparison:
    """Everything that was sent with everything that is stored. The daemon may run still, but must be idle."""
    result = Comparison()
    stored = stored_streams(spool)
    for one, found in match(sent, stored):
        if one is None:
            assert found is not None
            result.stored_bytes += found.durable
            result.doubled_bytes += found.durable
            result.say(f"stream {found.full_name} ({found.durable} bytes) was sent by nobody")
        elif found is None:
            if not one.broken:
                result.lost_bytes += one.whole_bytes
                result.say(f"{label(one)}: all {one.whole_bytes} bytes are lost, there is no such stream")
        else:
            result.streams += 1
            _compare_stream(spool, one, found, seed, result)
    return result


def label(one: SentStream) -> str:
    return f"client {one.client} stream {one.name or f'{one.address}:{one.port}'}"


def stored_streams(spool: pathlib.Path) -> list[StoredStream]:
    """From the catalog, in the order in which they were made."""
    flaws = ("gaps", "missing", "repeats", "reordered", "stored_holes", "dropped", "lost")
    query = (
        f"SELECT name, epoch, directory, packet_size, first_offset, durable, {', '.join(flaws)} FROM stream ORDER BY id"
    )
    with contextlib.closing(sqlite3.connect(f"file:{spool}/catalog.sqlite?mode=ro", uri=True)) as catalog:
        rows = catalog.execute(query).fetchall()
    return [
        StoredStream(
            name,
            f"{name}@{epoch}",
            directory,
            size,
            first,
            durable,
            {flaw: count for flaw, count in zip(flaws, counts, strict=True) if count},
        )
        for name, epoch, directory, size, first, durable, *counts in rows
    ]


def match(
    sent: Iterable[SentStream], stored: Iterable[StoredStream]
) -> Iterator[tuple[SentStream | None, StoredStream | None]]:
    """Pairs of sent and stored. A port that was used twice gave two streams, in the order of time."""
    by_key: dict[str, list[StoredStream]] = defaultdict(list)
    for stream in stored:
        by_key[stream.name].append(stream)
        peer, dash, _ = stream.name.rpartition("-")
        if dash:
            by_key[peer].append(stream)
    taken: set[str] = set()
    for one in sorted(sent, key=lambda one: (one.client, one.number)):
        key = one.name or f"{one.address}-{one.port}"
        found = next((stream for stream in by_key[key] if stream.full_name not in taken), None)
        if found is not None:
            taken.add(found.full_name)
        yield one, found
    for stream in {stream.full_name: stream for streams in by_key.values() for stream in streams}.values():
        if stream.full_name not in taken:
            yield None, stream


def through_reader(spool: pathlib.Path, stream: StoredStream) -> Iterator[bytes]:
    with open_stream(stream.full_name, spool=spool) as opened:
        for view in opened.read_bytes(chunk_bytes=PIECE_BYTES):
            yield bytes(view)


def through_files(spool: pathlib.Path, stream: StoredStream) -> Iterator[bytes]:
    """Segment files are named by the offset of their first byte; each holds the bytes up to the next one's."""
    at = stream.first_offset
    paths = sorted((spool / "streams" / stream.directory).glob("*.seg"))
    bases = [int(path.stem) for path in paths]
    for path, base, end in zip(paths, bases, [*bases[1:], stream.durable], strict=True):
        with path.open("rb") as segment:
            segment.seek(at - base)
            while at < min(end, stream.durable):
                piece = segment.read(min(PIECE_BYTES, min(end, stream.durable) - at))
                if not piece:
                    break
                at += len(piece)
                yield piece


def _compare_stream(spool: pathlib.Path, one: SentStream, found: StoredStream, seed: int, result: Comparison) -> None:
    result.stored_bytes += found.durable
    name = label(one)
    for flaw, count in found.flaws.items():
        result.say(f"{name}: the catalog counts {count} {flaw}")
    if found.packet_size != one.packet_size or found.first_offset:
        result.say(f"{name}: packets of {found.packet_size} bytes from offset {found.first_offset}")
        return
    hashes = {}
    for way, read in (("reader", through_reader), ("files", through_files)):
        digest = hashlib.sha256()
        try:
            for piece in read(spool, found):
                digest.update(piece)
        except (MpserverdError, OSError) as error:
            result.say(f"{name}: the {way} cannot be read: {error}")
        hashes[way] = digest.hexdigest()
    if set(hashes.values()) == {one.sha256}:
        return
    for way, read in (("reader", through_reader), ("files", through_files)):
        if hashes[way] != one.sha256:
            counts = _count(read(spool, found), one, seed)
            lost = 0 if one.broken else counts.lost
            if counts.is_prefix and one.broken:
                continue
            result.say(
                f"{name}, by the {way}: {found.durable} bytes stored, {one.whole_bytes} sent, the first difference at "
                f"offset {counts.first_difference}; lost {lost}, doubled {counts.doubled}, strange {counts.strange}"
            )
            if way == "reader" or hashes["reader"] == one.sha256:
                result.lost_bytes += lost
                result.doubled_bytes += counts.doubled
                result.strange_bytes += counts.strange


@dataclasses.dataclass(frozen=True)
class Counts:
    """In bytes of whole packets."""

    lost: int
    doubled: int
    strange: int
    first_difference: int
    is_prefix: bool


def _count(pieces: Iterator[bytes], one: SentStream, seed: int) -> Counts:
    """Look at every stored packet: which one is it?"""
    size = one.packet_size
    content = Content(seed, one.client, one.number, size)
    sent_packets = one.whole_bytes // size
    seen = np.zeros(sent_packets, np.int64)
    strange = at = 0
    first_difference: int | None = None
    rest = b""
    with contextlib.suppress(MpserverdError, OSError):  # said before; what could be read counts
        for piece in pieces:
            joined = rest + piece
            whole = len(joined) // size
            rows = np.frombuffer(joined, np.uint8, whole * size).reshape(-1, size)
            rest = joined[whole * size :]
            numbers = content.numbers_of(rows)
            own = (numbers < sent_packets) & (content.packets(numbers) == rows).all(axis=1)
            strange += int((~own).sum()) * size
            np.add.at(seen, numbers[own], 1)
            expected = content.packets(np.arange(at, at + whole, dtype=np.int64))
            wrong = np.flatnonzero((expected != rows).reshape(-1))
            if first_difference is None and len(wrong):
                first_difference = at * size + int(wrong[0])
            at += whole
    stored_whole = min(at, sent_packets)
    return Counts(
        lost=int((seen == 0).sum()) * size,
        doubled=int(np.maximum(seen - 1, 0).sum()) * size,
        strange=strange + len(rest),
        first_difference=stored_whole * size if first_difference is None else first_difference,
        is_prefix=first_difference is None and at <= sent_packets,
    )
