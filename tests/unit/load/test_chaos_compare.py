"""The comparison finds what was lost, doubled, changed or made up, and where; the spool is written by hand."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from spool_writer import SpoolWriter

from mpserverd.load.chaos_compare import Comparison, compare
from mpserverd.load.chaos_content import Content
from mpserverd.load.chaos_sent import ENDED, SentConnection, SentStream

SEED = 3
SIZE = 24
PACKETS = 20_000
ADDRESS, PORT = "127.1.0.1", 4711
NAME = f"{ADDRESS}-{PORT}-20261123T000000.000000Z"


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[SpoolWriter]:
    with SpoolWriter(tmp_path / "spool") as writer:
        yield writer


def content(first: int = 0, end: int = PACKETS, client: int = 0, number: int = 0) -> bytes:
    """Packets [first, end)."""
    return Content(SEED, client, number, SIZE).piece(first * SIZE, end * SIZE).tobytes()


def sent(
    packets: int = PACKETS,
    *,
    name: str = "",
    ends: tuple[int, ...] = (),
    number: int = 0,
    broken: str = "",
) -> SentStream:
    """``ends`` are in packets; ``broken`` says how the last connection ended."""
    bounds = [0, *(ends or (packets,))]
    return SentStream(
        client=0,
        number=number,
        name=name,
        address=ADDRESS,
        packet_size=SIZE,
        whole_bytes=packets * SIZE,
        sha256=hashlib.sha256(content(0, packets, number=number)).hexdigest(),
        connections=tuple(
            SentConnection(PORT, first * SIZE, end * SIZE, 0, 0, 0, broken if end == bounds[-1] and broken else ENDED)
            for first, end in itertools.pairwise(bounds)
        ),
    )


def add(spool: SpoolWriter, stored: bytes, name: str = NAME, *, epoch: int = 1, gaps: int = 0, missing: int = 0) -> int:
    stream: int = spool.add(name, stored, packet_size=SIZE, cuts=[65_536, 200_000], epoch=f"{epoch:016x}")
    spool.catalog.execute(
        "UPDATE stream SET gaps = ?, missing = ?, repeats = 0, reordered = 0 WHERE id = ?", (gaps, missing, stream)
    )
    return stream


def result(spool: SpoolWriter, *streams: SentStream) -> Comparison:
    return compare(spool.path, streams, SEED)


def test_the_same_bytes_are_exact(spool: SpoolWriter) -> None:
    add(spool, content())
    found = result(spool, sent())
    assert found.is_exact and found.lines == [] and found.stored_bytes == PACKETS * SIZE


@pytest.mark.parametrize("offset", [0, 1, 65_535, 65_536, 199_999, 200_000, PACKETS * SIZE - 1])
def test_a_byte_that_was_flipped_is_found_at_its_offset(spool: SpoolWriter, offset: int) -> None:
    stored = bytearray(content())
    stored[offset] ^= 1
    add(spool, bytes(stored))
    found = result(spool, sent())
    assert (found.lost_bytes, found.doubled_bytes, found.strange_bytes) == (SIZE, 0, SIZE)
    assert f"the first difference at offset {offset}" in found.lines[0]
    assert not found.is_exact


def test_packets_that_are_not_there_are_lost(spool: SpoolWriter) -> None:
    add(spool, content(0, 100) + content(103))
    found = result(spool, sent())
    assert (found.lost_bytes, found.doubled_bytes, found.strange_bytes) == (3 * SIZE, 0, 0)
    assert f"the first difference at offset {100 * SIZE}" in found.lines[0]


def test_a_tail_that_is_not_there_is_lost(spool: SpoolWriter) -> None:
    add(spool, content(0, PACKETS - 5))
    found = result(spool, sent())
    assert (found.lost_bytes, found.doubled_bytes, found.strange_bytes) == (5 * SIZE, 0, 0)
    assert f"the first difference at offset {(PACKETS - 5) * SIZE}" in found.lines[0]


def test_packets_that_are_there_twice_are_doubled(spool: SpoolWriter) -> None:
    add(spool, content(0, 100) + content(90))
    found = result(spool, sent())
    assert (found.lost_bytes, found.doubled_bytes, found.strange_bytes) == (0, 10 * SIZE, 0)


def test_packets_in_another_order_are_no_loss_and_not_exact(spool: SpoolWriter) -> None:
    add(spool, content(100) + content(0, 100))
    found = result(spool, sent())
    assert (found.lost_bytes, found.doubled_bytes, found.strange_bytes) == (0, 0, 0) and not found.is_exact


def test_a_shift_by_a_byte_is_strange_from_there_on(spool: SpoolWriter) -> None:
    add(spool, content(0, 100) + b"x" + content(100)[:-1])
    found = result(spool, sent())
    assert found.strange_bytes == (PACKETS - 100) * SIZE == found.lost_bytes


def test_a_stream_that_is_not_there_is_lost_and_one_of_nobody_is_doubled(spool: SpoolWriter) -> None:
    add(spool, content(), "127.1.0.1-4712-20261123T000000.000000Z")
    found = result(spool, sent(10))
    assert (found.lost_bytes, found.doubled_bytes) == (10 * SIZE, PACKETS * SIZE)


def test_two_connections_from_one_port_are_two_streams_in_their_order(spool: SpoolWriter) -> None:
    add(spool, content(0, 10), NAME)
    add(spool, content(0, 20, number=1), NAME.replace("T00", "T01"))
    assert result(spool, sent(20, number=1), sent(10)).is_exact


def test_what_the_catalog_counts_must_be_nothing(spool: SpoolWriter) -> None:
    add(spool, content(), gaps=1, missing=7)
    assert "the catalog counts {'gaps': 1, 'missing': 7}" in result(spool, sent()).lines[0]


def test_a_segment_that_is_missing_does_not_end_the_comparison(spool: SpoolWriter) -> None:
    stream = add(spool, content())
    spool.segment_paths(stream)[1].unlink()
    found = result(spool, sent())
    assert not found.is_exact and found.lost_bytes > 0
    assert any("the reader cannot read" in line for line in found.lines)


def test_a_reader_that_shows_something_else_than_the_files_is_found(
    spool: SpoolWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpserverd.load.chaos_compare.WAYS", {"reader": lambda *_: iter([content(0, 9)])})
    add(spool, content())
    assert result(spool, sent()).lost_bytes == (PACKETS - 9) * SIZE


def test_of_a_broken_connection_a_beginning_is_enough(spool: SpoolWriter) -> None:
    add(spool, content(0, 50))
    assert result(spool, sent(broken="ECONNRESET")).is_exact


def test_of_a_broken_connection_something_else_is_not_enough(spool: SpoolWriter) -> None:
    add(spool, content(0, 50) + content(60, 70))
    found = result(spool, sent(broken="ECONNRESET"))
    assert not found.is_exact and found.lost_bytes == 0


# -- named clients


def test_the_connections_of_a_named_client_are_one_stream(spool: SpoolWriter) -> None:
    add(spool, content(), "chaos-0")
    assert result(spool, sent(name="chaos-0", ends=(500, 9000, PACKETS))).is_exact


def test_a_connection_that_was_given_a_stream_of_its_own_leaves_one_gap_at_most(spool: SpoolWriter) -> None:
    add(spool, content(0, 500) + content(9000), "chaos-0", gaps=1, missing=8500)
    add(spool, content(500, 9000), f"chaos-0.{NAME}")
    found = result(spool, sent(name="chaos-0", ends=(500, 9000, PACKETS)))
    assert found.is_exact, found.lines
    assert (found.gaps, found.missing, found.split_streams) == (1, 8500, 1)


@pytest.mark.parametrize(("gaps", "missing"), [(2, 8500), (1, 8501)])
def test_more_than_that_gap_is_too_much(spool: SpoolWriter, gaps: int, missing: int) -> None:
    add(spool, content(0, 500) + content(9000), "chaos-0", gaps=gaps, missing=missing)
    add(spool, content(500, 9000), f"chaos-0.{NAME}")
    assert not result(spool, sent(name="chaos-0", ends=(500, 9000, PACKETS))).is_exact


def test_a_first_or_last_connection_with_a_stream_of_its_own_leaves_no_gap(spool: SpoolWriter) -> None:
    add(spool, content(500, 9000), "chaos-0")
    add(spool, content(9000), f"chaos-0.{NAME}")
    add(spool, content(0, 500), f"chaos-0.{NAME}", epoch=2)
    found = result(spool, sent(name="chaos-0", ends=(500, 9000, PACKETS)))
    assert found.is_exact, found.lines
    assert (found.gaps, found.missing) == (0, 0)


def test_a_connection_that_is_stored_in_both_places_is_doubled(spool: SpoolWriter) -> None:
    add(spool, content(), "chaos-0")
    add(spool, content(500, 9000), f"chaos-0.{NAME}")
    found = result(spool, sent(name="chaos-0", ends=(500, 9000, PACKETS)))
    assert (found.lost_bytes, found.doubled_bytes) == (0, 8500 * SIZE)


def test_a_stream_of_its_own_that_begins_within_a_connection_is_found(spool: SpoolWriter) -> None:
    add(spool, content(0, 500), "chaos-0")
    add(spool, content(510), f"chaos-0.{NAME}")
    found = result(spool, sent(name="chaos-0", ends=(500, PACKETS)))
    assert found.lost_bytes == 10 * SIZE and not found.is_exact


def test_clients_whose_names_begin_alike_are_told_apart(spool: SpoolWriter) -> None:
    add(spool, content(0, 10), "chaos-1")
    add(spool, content(0, 10), "chaos-10")
    found = result(spool, sent(10, name="chaos-1"))
    assert found.lines == [f"stream chaos-10@{1:016x} ({10 * SIZE} bytes) was sent by nobody"]
