"""Each kind of damage is found, and nothing else is."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from spool_writer import CREATED_NS, SpoolWriter, noise

from mpserverd.streams.catalog_view import all_streams
from mpserverd.streams.verify import StreamCheck, verify_streams


def verify(spool: SpoolWriter, jobs: int = 2) -> list[StreamCheck]:
    return list(verify_streams(spool.path, all_streams(spool.path, all_epochs=True), jobs))


def findings(spool: SpoolWriter) -> list[str]:
    return [finding for check in verify(spool) for finding in check.findings]


@pytest.fixture
def cut(spool: SpoolWriter) -> list[Path]:
    """Segments of 48, 48 and 64 bytes; the last is open."""
    number = spool.add("a", noise(160), cuts=[48, 96])
    spool.add_index(number, 0, [(16, CREATED_NS), (48, CREATED_NS + 10**9)])
    return spool.segment_paths(number)


def test_a_sound_spool_has_no_findings_and_says_what_it_compared(spool: SpoolWriter, cut: list[Path]) -> None:
    (check,) = verify(spool)
    assert check.fine
    assert (check.segments, check.checked_bytes, check.unchecked_bytes) == (3, 96, 64)


@pytest.mark.parametrize("packet_size", [1, 7, 24, 1500])
def test_sound_streams_of_any_shape_have_no_findings(spool: SpoolWriter, packet_size: int) -> None:
    size = packet_size * 20
    holes = [(2 * packet_size, 3 * packet_size, "dropped"), (9 * packet_size, 11 * packet_size, "lost")]
    for number, epoch in enumerate("1234"):
        spool.add(
            "a", noise(size), packet_size=packet_size, cuts=[3, 7, size - 2], epoch=epoch * 16, holes=holes[number:]
        )
    spool.add("retired", noise(size), packet_size=packet_size, cuts=[size // 2], first_offset=size // 2)
    spool.add("closed", noise(size), packet_size=packet_size, last_open=False)
    spool.add("unsealed", noise(size), packet_size=packet_size, cuts=[3], sealed_sums=False)
    spool.add("empty", b"", packet_size=packet_size)
    assert findings(spool) == []


def test_a_missing_segment_is_found(spool: SpoolWriter, cut: list[Path]) -> None:
    cut[1].unlink()
    (finding,) = findings(spool)
    assert finding == f"{cut[1]} is missing; it holds offsets 48 to 96"


def test_a_short_segment_is_found(spool: SpoolWriter, cut: list[Path]) -> None:
    for path, size in ((cut[0], 47), (cut[2], 63)):
        os.truncate(path, size)
    assert [finding.split(" has ")[1] for finding in findings(spool)] == [
        "47 bytes, 48 are durable",
        "63 bytes, 64 are durable",
    ]


def test_swapped_segments_are_found(spool: SpoolWriter, cut: list[Path]) -> None:
    first, second = cut[0].read_bytes(), cut[1].read_bytes()
    cut[0].write_bytes(second)
    cut[1].write_bytes(first)
    found = findings(spool)
    assert [finding.split(" ")[0] for finding in found] == [str(cut[0]), str(cut[1])]
    assert all("other content than when it was sealed" in finding for finding in found)


@pytest.mark.parametrize("bit", [0, 100, 48 * 8 - 1])
def test_one_flipped_bit_is_found(spool: SpoolWriter, cut: list[Path], bit: int) -> None:
    content = bytearray(cut[1].read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    cut[1].write_bytes(content)
    (finding,) = findings(spool)
    assert finding.startswith(f"{cut[1]} has other content")


def test_what_lies_behind_the_content_of_a_file_is_not_looked_at(spool: SpoolWriter, cut: list[Path]) -> None:
    for path in cut:
        path.write_bytes(path.read_bytes() + b"preallocated")
    assert findings(spool) == []


def test_a_range_that_no_segment_holds_is_found_unless_a_hole_explains_it(spool: SpoolWriter, cut: list[Path]) -> None:
    spool.catalog.execute("DELETE FROM segment WHERE first = 48")
    cut[1].unlink()
    assert findings(spool) == ["no segment holds offsets 48 to 96, and no hole explains it"]
    spool.catalog.execute("INSERT INTO hole VALUES (1, 64, 96, 'lost')")
    assert findings(spool) == ["no segment holds offsets 48 to 64, and no hole explains it"]
    spool.catalog.execute("UPDATE hole SET first = 48")
    assert findings(spool) == []


def test_a_range_that_is_missing_at_either_end_is_found(spool: SpoolWriter, cut: list[Path]) -> None:
    spool.catalog.execute("DELETE FROM segment WHERE first <> 48")
    for path in (cut[0], cut[0].with_suffix(".idx"), cut[2]):
        path.unlink()
    assert findings(spool) == [
        "no segment holds offsets 0 to 48, and no hole explains it",
        "no segment holds offsets 96 to 160, and no hole explains it",
    ]


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ("UPDATE segment SET end = 100 WHERE first = 48", "segments 48 and 96 both hold offsets 96 to 100"),
        ("UPDATE segment SET state = 'lost' WHERE first = 0", "segment 0 has the unknown state 'lost'"),
        (
            "UPDATE segment SET end = NULL, state = 'open' WHERE first = 48",
            "segment 48 has no end, but others follow it",
        ),
        ("UPDATE segment SET end = 1 WHERE first = 48", "segment 48 ends at 1, before it begins"),
        ("UPDATE stream SET first_offset = 161", "first offset 161 is behind durable offset 160"),
        ("UPDATE stream SET packet_size = 0", "size is 0, it must be a number from 1 to 65536"),
        ("UPDATE stream SET layout = '{}'", "not a packet layout: {}"),
        ("INSERT INTO hole VALUES (1, 0, 32, 'lost'), (1, 16, 48, 'lost')", "holes at 0 and 16 overlap"),
    ],
)
def test_rows_that_contradict_each_other_are_found(
    spool: SpoolWriter, cut: list[Path], change: str, finding: str
) -> None:
    spool.catalog.execute(change)
    assert any(finding in found for found in findings(spool))


@pytest.mark.parametrize(
    ("entries", "finding"),
    [
        ([(32, 1), (16, 2)], "goes back"),
        ([(47, 1), (64, 2)], "begins at 47, before its segment"),
    ],
)
def test_a_time_index_that_makes_no_sense_is_found(
    spool: SpoolWriter, cut: list[Path], entries: list[tuple[int, int]], finding: str
) -> None:
    spool.add_index(1, 48, entries)
    assert any(found.endswith(finding) for found in findings(spool))


def test_a_time_index_that_is_ahead_of_the_catalog_is_no_damage(spool: SpoolWriter, cut: list[Path]) -> None:
    spool.add_index(1, 96, [(112, CREATED_NS), (176, CREATED_NS + 1)])
    assert findings(spool) == []


def test_a_torn_tail_of_the_time_index_is_no_damage(spool: SpoolWriter, cut: list[Path]) -> None:
    spool.add_index(1, 96, [(112, CREATED_NS)], tail=struct.pack("<Q", 99) + bytes(3))
    assert findings(spool) == []


def test_what_retention_takes_meanwhile_is_no_damage(spool: SpoolWriter, cut: list[Path]) -> None:
    before = all_streams(spool.path)
    spool.retire(1, 48)
    (check,) = verify_streams(spool.path, before, 1)
    assert (check.fine, check.retired_meanwhile) == (True, True)


def test_a_stream_deleted_meanwhile_is_no_damage(spool: SpoolWriter, cut: list[Path]) -> None:
    before = all_streams(spool.path)
    spool.catalog.execute("DELETE FROM stream")
    for path in cut:
        path.unlink()
    (check,) = verify_streams(spool.path, before, 1)
    assert check.fine


def test_a_file_that_cannot_be_read_is_found(spool: SpoolWriter, cut: list[Path]) -> None:
    cut[1].unlink()
    cut[1].mkdir()
    (finding,) = findings(spool)
    assert finding == f"{cut[1]} cannot be read: Is a directory"


def test_many_streams_come_back_in_order_with_any_number_of_jobs(spool: SpoolWriter) -> None:
    for number in range(30):
        spool.add(f"s{number:02d}", noise(160, seed=number), cuts=range(16, 160, 16))
    for jobs in (1, 5):
        checks = verify(spool, jobs)
        assert [check.name for check in checks] == [f"s{number:02d}" for number in range(30)]
        assert all(check.fine and check.segments == 10 for check in checks)
