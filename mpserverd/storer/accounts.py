"""Totals of streams: of rows, of the catalog, and the header's GONE block, which holds those that left the table.

GONE and the rows are one sum for whoever reads both, so a stream moves between them inside one odd period of
GONE_VERSION. A storer that is killed inside leaves the version odd; its successor computes the block anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterable, Iterator, Sequence

from mpserverd.arena.state import Check, Gone, Head, StateTable, Str, StreamFlag
from mpserverd.storer.catalog import Catalog, StreamRecord

GONE_NAMES = tuple(
    name.lower() for name, _ in sorted(
        ((name, value) for name, value in vars(Gone).items() if name.isupper() and name != "COUNT"),
        key=lambda pair: pair[1],
    )
)  # fmt: skip
"""Names of the words in order; also the names in the catalog's table ``total``."""

_TOTAL = {name: index for index, name in enumerate(GONE_NAMES)}


def totals_of_record(record: StreamRecord) -> list[int]:
    """GONE words of a stream that is only in the catalog."""
    received = record.durable - record.lost
    durable = record.durable - record.stored_holes
    packet_size = max(1, record.packet_size)
    return _words(
        received_bytes=received,
        received_packets=received // packet_size,
        stored_bytes=durable,
        durable_bytes=durable,
        acked_bytes=record.acked,
        truncated_bytes=record.truncated,
        dropped_bytes=record.dropped,
        dropped_packets=record.dropped // packet_size,
        lost_bytes=record.lost,
        lost_packets=record.lost // packet_size,
        retired_bytes=record.retired,
        handshake_bytes=record.handshake,
        socket_bytes=record.socket,
        gaps=record.gaps,
        missing_packets=record.missing,
        repeats=record.repeats,
        reordered=record.reordered,
        streams=1,
    )


def totals_of_row(words: Sequence[int]) -> list[int]:
    """GONE words of a row that is over and has no row in the catalog: not stored, or without a packet."""
    received = words[Str.POSITION] - words[Str.LOST]
    check = checks_of_row(words)
    stored = bool(words[Str.FLAGS] & StreamFlag.STORE)
    return _words(
        received_bytes=received,
        received_packets=received // max(1, words[Str.PACKET_SIZE]),
        truncated_bytes=words[Str.TRUNCATED],
        handshake_bytes=words[Str.HANDSHAKE],
        unstored_bytes=0 if stored else words[Str.OFFERED],
        socket_bytes=words[Str.SOCKET],
        gaps=check[0],
        missing_packets=check[1],
        repeats=check[2],
        reordered=check[3],
        streams=int(received > 0),
    )


def checks_of_row(words: Sequence[int]) -> tuple[int, int, int, int]:
    """gaps, missing, repeats, reordered of the valid check record."""
    record = Str.CHECK1 if words[Str.CHECK_SELECT] & 1 else Str.CHECK0
    return (
        words[record + Check.GAPS],
        words[record + Check.MISSING],
        words[record + Check.REPEATS],
        words[record + Check.REORDERED],
    )


def _words(**totals: int) -> list[int]:
    words = [0] * Gone.COUNT
    for name, value in totals.items():
        words[_TOTAL[name]] = value
    return words


def named_totals(words: Sequence[int]) -> list[tuple[str, int]]:
    """Pairs for the catalog's table ``total``, zeros left out."""
    return [(name, value) for name, value in zip(GONE_NAMES, words, strict=True) if value]


class GoneBlock:
    """The header's GONE words. Values wrap like u64, but never do."""

    def __init__(self, state: StateTable) -> None:
        self._words = state.words

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Rows and GONE may be changed together inside."""
        words = self._words
        words[Head.GONE_VERSION] |= 1
        yield
        words[Head.GONE_VERSION] += 1

    def add(self, totals: Sequence[int]) -> None:
        """Inside ``changing``."""
        for index, value in enumerate(totals):
            if value:
                self._words[Head.GONE + index] += value

    def add_one(self, word: int, value: int) -> None:
        """Inside ``changing``."""
        self._words[Head.GONE + word] += value

    def subtract(self, totals: Sequence[int]) -> None:
        """Inside ``changing``."""
        for index, value in enumerate(totals):
            if value:
                self._words[Head.GONE + index] -= value

    def compute(self, catalog: Catalog, live_ids: Container[int], released_rows: Iterable[Sequence[int]]) -> None:
        """Assign the block: all streams of the catalog but those in the table, and ``total``, but for the rows whose
        totals are already in it though they are still in the table."""
        sums = [0] * Gone.COUNT
        for record in catalog.streams():
            if record.id not in live_ids:
                sums = [a + b for a, b in zip(sums, totals_of_record(record), strict=True)]
        for name, value in catalog.totals().items():
            if name in _TOTAL:
                sums[_TOTAL[name]] += value
        for words in released_rows:
            sums = [a - b for a, b in zip(sums, totals_of_row(words), strict=True)]
        with self.changing():
            for index, value in enumerate(sums):
                self._words[Head.GONE + index] = value
