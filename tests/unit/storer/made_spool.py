"""Spools as a daemon leaves them, made by hand: what the storer's own catalog and sidecars say, and plain files.

Content differs everywhere and for everyone, so that a byte in the wrong place is never the right one by chance.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import sqlite3
from collections.abc import Iterable, Sequence
from itertools import pairwise

from mpserverd.storer import sidecar
from mpserverd.storer.catalog import Catalog, StreamRecord
from mpserverd.storer.segment_file import INDEX_PAIR, index_name, segment_name
from tests.integration.oracle import StoredStream, stored_streams
from tests.unit.storer.rig import content

CREATED_NS = 1_700_000_000_000_000_000
BLOCK = 4096
AHEAD_BYTES = 8 * BLOCK
"""Place that is allocated behind the content of an open segment."""


@dataclasses.dataclass(frozen=True)
class Made:
    """A stream that was made: ``content`` from offset 0 on, segments that begin at ``firsts``."""

    record: StreamRecord
    directory: pathlib.Path
    content: bytes
    firsts: Sequence[int]

    def segment(self, first: int) -> pathlib.Path:
        return self.directory / segment_name(first)

    def index(self, first: int) -> pathlib.Path:
        return self.directory / index_name(first)


class MadeSpool:
    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.streams = path / "streams"
        self.streams.mkdir(parents=True)
        Catalog(str(path), durable=True).close()

    def add(
        self, name: str, length: int, cuts: Sequence[int] = (), *, seed: int = 1, packet: int = 16, named: bool = True
    ) -> Made:
        """Sealed segments between ``cuts``, with checksums; the last is open where the name is a client's own. Each
        has a time index that ends with it."""
        catalog = Catalog(str(self.path), durable=True)
        record = StreamRecord(**{field.name: 0 for field in dataclasses.fields(StreamRecord)})  # type: ignore[arg-type]
        record = dataclasses.replace(
            record,
            name=name,
            epoch=hashlib.sha256(name.encode()).hexdigest()[:16],
            directory=name,
            packet_size=packet,
            layout=None,
            created_unix_ns=CREATED_NS,
            durable=length,
            socket=length,
            named=int(named),
        )
        with catalog.transaction():
            record = dataclasses.replace(record, id=catalog.add_stream(record))
        directory = self.streams / name
        directory.mkdir()
        sidecar.put(str(directory), sidecar.identity_of(record))
        made = Made(record, directory, content(seed, 0, length), [0, *cuts])
        for first, end in pairwise([*made.firsts, length]):
            data = made.content[first:end]
            is_open = named and end == length
            made.segment(first).write_bytes(data)
            if is_open:
                os.truncate(made.segment(first), len(data) + AHEAD_BYTES)
            made.index(first).write_bytes(INDEX_PAIR.pack(end, CREATED_NS + end))
            row = (None, "open", None, None) if is_open else (end, "sealed", hashlib.sha256(data).hexdigest(), 1)
            with catalog.transaction():
                catalog.restore_segments([(record.id, first, *row)])
        catalog.close()
        return made

    def ask(self, question: str, *values: object) -> list[tuple[object, ...]]:
        with contextlib.closing(sqlite3.connect(self.path / "catalog.sqlite", isolation_level=None)) as connection:
            return connection.execute(question, values).fetchall()

    def lose_catalog(self) -> None:
        for path in self.path.glob("catalog.sqlite*"):
            path.unlink()

    def stored(self) -> dict[str, StoredStream]:
        """Read without the project's code and through the public reader; holes are left out."""
        return {stream.name: stream for stream in stored_streams(self.path)}

    def holes(self, made: Made) -> list[tuple[object, ...]]:
        question = "SELECT first, hole.end, kind FROM hole JOIN stream ON id = stream WHERE epoch = ? ORDER BY first"
        return self.ask(question, made.record.epoch)

    def assert_whole(self, *streams: Made) -> None:
        """These streams and no others, byte for byte."""
        found = self.stored()
        assert sorted(found) == sorted(made.record.name for made in streams)
        for made in streams:
            stream = found[made.record.name]
            assert (stream.epoch, stream.packet_size) == (made.record.epoch, made.record.packet_size)
            assert stream.content == made.content, f"{made.record.name} has other bytes than were written"
            assert not self.holes(made)


def without(data: bytes, *ranges: tuple[int, int]) -> bytes:
    """``data`` but for these ranges, which rise."""
    kept, at = [], 0
    for first, end in ranges:
        kept.append(data[at:first])
        at = end
    return b"".join([*kept, data[at:]])


def files_of(directory: pathlib.Path) -> Iterable[str]:
    return sorted(path.name for path in directory.iterdir())
