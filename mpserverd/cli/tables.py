"""How mpserverctl prints for people: tables and key-value lists, numbers with units.

On a terminal rich draws them, fitted to its width. In a pipe or a file they are plain columns with two spaces between
them, nothing cut off, no colour and no lines. Long tables end with a line that says how much was left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TextIO

ROWS_MAX = 50


@dataclasses.dataclass(frozen=True, slots=True)
class Column:
    """``number`` columns are set to the right."""

    title: str
    number: bool = False


@dataclasses.dataclass(slots=True)
class Table:
    """``title`` may be "". Every row has as many cells as there are columns."""

    title: str
    columns: Sequence[Column]
    rows: list[Sequence[str]] = dataclasses.field(default_factory=list)

    def add(self, *cells: str) -> None:
        self.rows.append(cells)


def print_table(table: Table, out: TextIO, rows_max: int = ROWS_MAX) -> None:
    """At most ``rows_max`` rows, all with 0."""
    shown = table.rows[:rows_max] if rows_max else table.rows
    if out.isatty():
        _print_rich(table, shown, out)
    else:
        _print_plain(table, shown, out)
    left = len(table.rows) - len(shown)
    if left:
        print(f"... and {left:,} more; --rows 0 shows all, --json too", file=out)


def print_pairs(title: str, pairs: Iterable[tuple[str, str]], out: TextIO) -> None:
    """A list of names and values."""
    table = Table(title, (Column(""), Column("")), [list(pair) for pair in pairs])
    print_table(table, out, 0)


def _print_plain(table: Table, rows: Sequence[Sequence[str]], out: TextIO) -> None:
    titles = [column.title for column in table.columns]
    lines = [*([titles] if any(titles) else []), *rows]
    widths = [max((len(line[i]) for line in lines), default=0) for i in range(len(titles))]
    if table.title:
        print(table.title, file=out)
    for line in lines:
        cells = (
            cell.rjust(width) if column.number else cell.ljust(width)
            for cell, width, column in zip(line, widths, table.columns, strict=True)
        )
        print("  ".join(cells).rstrip(), file=out)


def _print_rich(table: Table, rows: Sequence[Sequence[str]], out: TextIO) -> None:
    import rich.box  # noqa: PLC0415  (50 ms that a pipe need not wait for)
    import rich.console  # noqa: PLC0415
    import rich.table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    titled = any(column.title for column in table.columns)
    drawn = rich.table.Table(
        title=Text(table.title, style="bold") if table.title else None,
        title_justify="left",
        box=rich.box.SIMPLE_HEAD if titled else None,
        show_header=titled,
        pad_edge=False,
    )
    for column in table.columns:
        drawn.add_column(Text(column.title), justify="right" if column.number else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    rich.console.Console(file=out, highlight=False).print(drawn)


# -- numbers


def count_text(value: int) -> str:
    return f"{value:,}"


def human_bytes(count: int) -> str:
    """Three digits and a unit: 999 B, 1.46 KiB, 12.0 MiB."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while value >= 1000 and len(units) > 1:
        value /= 1024
        units.pop(0)
    if units[0] == "B":
        return f"{count} B"
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {units[0]}"


def rate_text(value: float, unit: str) -> str:
    return f"{value:,.0f} {unit}/s"


def percent_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"


def ms_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def duration_text(seconds: float | None) -> str:
    """Two units at most: ``3 d 4 h``, ``12 min 5 s``, ``1.5 s``."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = int(seconds)
    for name, size, small, small_size in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size:,} {name} {whole % size // small_size} {small}"
    return f"{whole} s"
