"""Times: what people may write, what the index answers, what is printed."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spool_writer import CREATED_NS, SpoolWriter, noise

from mpserverd.errors import UsageError
from mpserverd.streams import open_stream
from mpserverd.streams.times import iso_utc, parse_time

S = 10**9
NOW = 1_800_000_000 * S


@pytest.mark.parametrize(
    ("text", "unix_ns"),
    [
        ("now", NOW),
        ("now-10s", NOW - 10 * S),
        ("-5m", NOW - 300 * S),
        ("now - 1.5h", NOW - 5400 * S),
        ("-250ms", NOW - S // 4),
        ("-2d", NOW - 172_800 * S),
        ("-1w", NOW - 604_800 * S),
        ("-9999w", 0),
        ("0", 0),
        ("1700000000", CREATED_NS),
        ("1700000000.000000001", CREATED_NS + 1),
        ("1700000000.5", CREATED_NS + S // 2),
        ("2023-11-14T22:13:20Z", CREATED_NS),
        ("2023-11-14 22:13:20", CREATED_NS),
        ("2023-11-14T23:13:20.25+01:00", CREATED_NS + S // 4),
        ("2023-11-14", 1_699_920_000 * S),
        ("1960-01-01", 0),
    ],
)
def test_times_that_people_write(text: str, unix_ns: int) -> None:
    assert parse_time(text, NOW) == unix_ns


@pytest.mark.parametrize("text", ["", "yesterday", "-5", "5m", "now-", "2023-13-01", "-5y", "1e9", "17000000000"])
def test_what_is_no_time_says_what_one_looks_like(text: str) -> None:
    with pytest.raises(UsageError, match="write 2026"):
        parse_time(text, NOW)


@given(st.integers(0, 2**63 - 1))
def test_a_printed_time_has_all_its_digits(unix_ns: int) -> None:
    text = iso_utc(unix_ns)
    if unix_ns < 250_000_000_000 * S and len(text) <= 27:
        assert abs(parse_time(text, 0) - unix_ns) < 1000
    assert text.endswith("Z")


def test_a_number_that_is_no_time_stays_a_number() -> None:
    assert (iso_utc(2**63), iso_utc(-1)) == (str(2**63), "-1")


@pytest.fixture
def indexed(spool: SpoolWriter) -> SpoolWriter:
    """100 packets in two segments; 10 more become durable each second, the last at 10 s."""
    number = spool.add("a", noise(1600), cuts=[800])
    spool.add_index(number, 0, [(160 * at, CREATED_NS + at * S) for at in range(1, 6)])
    spool.add_index(number, 800, [(160 * at, CREATED_NS + at * S) for at in range(6, 10)])
    spool.set_row(number, updated_unix_ns=CREATED_NS + 10 * S)
    return spool


@pytest.mark.parametrize(
    ("seconds", "index"),
    [(-1, 0), (0, 0), (0.5, 0), (1, 10), (1.5, 10), (5, 50), (5.5, 50), (6, 60), (9.9, 90), (10, 100), (99, 100)],
)
def test_a_time_means_the_first_packet_not_durable_by_then(indexed: SpoolWriter, seconds: float, index: int) -> None:
    with open_stream("a", spool=indexed.path) as stream:
        assert stream.index_at(CREATED_NS + round(seconds * S)) == index


def test_a_time_before_what_retention_left_means_the_oldest_packet(indexed: SpoolWriter) -> None:
    indexed.retire(1, 800)
    with open_stream("a", spool=indexed.path) as stream:
        assert stream.index_at(CREATED_NS + 2 * S) == 50


def test_a_clock_that_steps_back_stands_still(spool: SpoolWriter) -> None:
    number = spool.add("a", noise(1600))
    entries = [(160, CREATED_NS + 5 * S), (320, CREATED_NS + 2 * S), (480, CREATED_NS + 6 * S)]
    spool.add_index(number, 0, entries)
    with open_stream("a", spool=spool.path) as stream:
        found = [stream.index_at(CREATED_NS + at * S) for at in (1, 3, 5, 6)]
    assert found == [0, 0, 20, 30]


def test_torn_empty_and_early_entries_are_ignored(spool: SpoolWriter) -> None:
    number = spool.add("a", noise(1600))
    tail = struct.pack("<QQ", 99_999, CREATED_NS + 2 * S) + bytes(16) + b"torn"
    spool.add_index(number, 0, [(160, CREATED_NS + S)], tail=tail)
    with open_stream("a", spool=spool.path) as stream:
        assert stream.index_at(CREATED_NS + 3 * S) == 10


def test_without_an_index_a_time_in_the_past_means_everything(spool: SpoolWriter) -> None:
    spool.add("a", noise(1600))
    with open_stream("a", spool=spool.path) as stream:
        assert stream.index_at(CREATED_NS) == 0
        assert stream.index_at(CREATED_NS + 61 * S) == 100
