"""Tables and numbers as people read them."""

from __future__ import annotations

import io

import pytest

from mpserverd.cli.tables import (
    Column,
    Table,
    duration_text,
    human_bytes,
    ms_text,
    percent_text,
    print_table,
    rate_text,
)


def printed(table: Table, rows_max: int = 0) -> list[str]:
    out = io.StringIO()
    print_table(table, out, rows_max)
    return out.getvalue().splitlines()


def test_words_stand_left_and_numbers_right() -> None:
    table = Table("", (Column("name"), Column("packets", True)), [("a", "1"), ("pump-7", "10,050")])
    assert printed(table) == ["name    packets", "a             1", "pump-7   10,050"]


def test_nothing_is_cut_off_in_a_pipe() -> None:
    table = Table("title", (Column("name"),), [("x" * 500,)])
    assert printed(table) == ["title", "name", "x" * 500]


def test_an_empty_table_is_its_titles() -> None:
    assert printed(Table("", (Column("name"), Column("packets", True)))) == ["name  packets"]


def test_rows_left_out_are_counted() -> None:
    table = Table("", (Column("n", True),), [(str(n),) for n in range(1005)])
    assert printed(table, 5)[-1] == "... and 1,000 more; --rows 0 shows all, --json too"
    assert len(printed(table, 5)) == 7
    assert len(printed(table, 1005)) == 1006


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0, "0.0 s"),
        (59.94, "59.9 s"),
        (60, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (86399, "23 h 59 min"),
        (90000, "1 d 1 h"),
        (86400 * 4000, "4,000 d 0 h"),
    ],
)
def test_durations_have_two_units_at_most(seconds: float | None, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "0.98 KiB"), (1536, "1.50 KiB"), (12 << 20, "12.0 MiB")]
)
def test_sizes_have_three_digits(count: int, text: str) -> None:
    assert human_bytes(count) == text


def test_what_is_not_known_is_a_dash() -> None:
    assert (percent_text(None), ms_text(None)) == ("-", "-")
    assert (percent_text(12.34), ms_text(0.12345), ms_text(1234.5)) == ("12.3 %", "0.123", "1,234")
    assert rate_text(50_250.4, "packets") == "50,250 packets/s"
