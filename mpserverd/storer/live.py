"""What the storer remembers of the streams in the table, and what all of its parts share.

The truth is in the shared table and in the catalog; everything here can be rebuilt from both, and is, by a successor.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from mpserverd import log
from mpserverd.arena.chunks import Arena
from mpserverd.arena.counters import COUNTERS, Role
from mpserverd.arena.state import StateTable, Str, StreamFlag, StreamState
from mpserverd.config.schema import Config, ListenerConfig, SpoolConfig
from mpserverd.net.channel import Kind, Message
from mpserverd.storer import plan
from mpserverd.storer.catalog import Catalog
from mpserverd.storer.filesystem import FileSystem
from mpserverd.storer.segment_file import SegmentFile
from mpserverd.storer.space import Space

STREAMS_DIRECTORY = "streams"
EVENT_CHARACTERS_MAX = 600
"""A message holds 8 KiB, and a character of a path takes up to 12 bytes in it. The journal has the whole text."""


@dataclasses.dataclass(eq=False, slots=True)
class LiveStream:
    """A stream that has a row. ``directory`` is "" until something was offered."""

    row: int
    base: int
    number: int
    packet_size: int
    named: bool
    name: str
    catalog_id: int = 0
    directory: str = ""
    directory_synced: bool = False
    identity: bytes = b""
    """What its directory shall say about it, as long as that may have to be written."""
    segment: SegmentFile | None = None
    early: SegmentFile | None = None
    """The next segment, made before it is needed."""
    begun_limits: dict[int, int] = dataclasses.field(default_factory=dict)
    """First and limit of the files that a cycle began and did not commit: the next one goes on in these."""
    zeros_below: int = 0
    """End of the last hole that is committed."""
    failures: int = 0
    full: bool = False
    """Waits for space on the disk."""
    index_due_s: float = 0.0
    in_the_way: str = ""
    """A failed file that could not be renamed; nothing is written before it is."""


class Counters:
    """The storer's counters in its slot."""

    def __init__(self, state: StateTable, slot: int) -> None:
        self._words = state.words
        base = state.slot_base(slot)
        self._at = {counter.name: base + counter.column for counter in COUNTERS if counter.role is Role.STORER}

    def add(self, name: str, amount: int = 1) -> None:
        self._words[self._at[name]] += amount

    def set(self, name: str, value: int) -> None:
        """A gauge that would be below 0 is a mistake in our books: no reason to store nothing any more."""
        self._words[self._at[name]] = max(0, value)

    def get(self, name: str) -> int:
        return int(self._words[self._at[name]])


class OpenFiles:
    """Open segment files, least recently used first; ``trim`` keeps them within the limit of descriptors."""

    def __init__(self, count_max: int) -> None:
        self.count_max = count_max
        self._files: collections.OrderedDict[SegmentFile, None] = collections.OrderedDict()

    def used(self, file: SegmentFile) -> None:
        self._files[file] = None
        self._files.move_to_end(file)

    def trim(self) -> None:
        while len(self._files) > self.count_max:
            self._files.popitem(last=False)[0].close()

    def close(self, file: SegmentFile) -> None:
        self._files.pop(file, None)
        file.close()


@dataclasses.dataclass(eq=False, slots=True)
class Desk:
    """What the parts of the storer work on. ``outbox`` are messages that the main loop sends."""

    state: StateTable
    arena: Arena
    config: Config
    listeners: dict[int, ListenerConfig]
    catalog: Catalog
    filesystem: FileSystem
    space: Space
    counters: Counters
    files: OpenFiles
    root: int
    """Descriptor of the directory that holds all streams."""
    streams: dict[int, LiveStream] = dataclasses.field(default_factory=dict)
    outbox: collections.deque[Message] = dataclasses.field(default_factory=collections.deque)
    to_unlink: collections.deque[tuple[str, int]] = dataclasses.field(default_factory=collections.deque)
    """(path, bytes of the segment whose file it is)."""
    resting_bytes: int = 0
    """Content of all segments but those that streams in the table are writing."""
    unsummed: bool = True
    """Some sealed segment may have no checksum yet."""

    @property
    def spool(self) -> SpoolConfig:
        return self.config.spool

    @property
    def streams_path(self) -> str:
        return os.path.join(self.config.spool.path, STREAMS_DIRECTORY)

    def path_of(self, directory: str) -> str:
        return os.path.join(self.streams_path, directory)

    def note(
        self, logger: logging.Logger, level: int, text: str, message_id: log.MessageId | None = None, **fields: Any
    ) -> None:
        """Log an event, and tell the supervisor for ``mpserverctl events``."""
        log.event(logger, level, text, message_id=message_id, **fields)
        words = " ".join(f"{key}={value}" for key, value in fields.items())
        whole = f"{text}: {words}" if words else text
        self.outbox.append(Message(Kind.EVENT, payload={"event": text, "text": whole[:EVENT_CHARACTERS_MAX]}))

    def wake(self, stream: LiveStream, durable: int) -> None:
        """The stream's segment rests no more."""
        if stream.segment is not None:
            self.resting_bytes -= durable - stream.segment.first

    def fitting_segment_bytes(self, streams: int = 0) -> int:
        """How long segments are, with so many streams, or as many as there are in the table."""
        streams = streams or int(np.count_nonzero(self.state.streams[:, Str.STATE] != StreamState.FREE))
        spool = self.spool
        return plan.fitting_segment_bytes(spool.segment_bytes, self.arena.chunk_bytes, spool.max_bytes, streams)

    # -- rows

    def live_rows(self) -> npt.NDArray[np.intp]:
        """Rows that are OPEN or DRAINING, ascending."""
        states = self.state.streams[:, Str.STATE]
        return np.flatnonzero((states == StreamState.OPEN) | (states == StreamState.DRAINING))

    def learn(self, row: int) -> LiveStream:
        """A row that is new to this process."""
        words = self.state.streams[row]
        stream = LiveStream(
            row=row,
            base=self.state.stream_base(row),
            number=int(words[Str.NUMBER]),
            packet_size=max(1, int(words[Str.PACKET_SIZE])),
            named=bool(int(words[Str.FLAGS]) & StreamFlag.NAMED),
            name=self.state.stream_name(row),
            catalog_id=int(words[Str.CATALOG_ID]),
        )
        self.streams[row] = stream
        return stream

    def word(self, stream: LiveStream, column: int) -> int:
        return int(self.state.words[stream.base + column])
