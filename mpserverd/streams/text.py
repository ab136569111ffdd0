"""Packets as text: aligned columns for people, CSV and JSON lines for programs.

Opaque packets are hexadecimal; packets with a layout are one column a field, its time in ISO 8601 UTC. A batch is
formatted column by column, because one numpy call costs as much as a hundred values.

It reads nothing and writes to nobody.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mpserverd.protocol.layout import PacketLayout
from mpserverd.streams.catalog_view import Hole
from mpserverd.streams.reader import Batch
from mpserverd.streams.times import UNIX_NS_MAX, iso_utc

OPAQUE_COLUMN = "packet"
INDEX_COLUMNS = ("index", "packet_index", "_packet_index")
"""The packet's index comes first, by the first of these names that no field has."""
WIDTHS: dict[str, dict[int, int]] = {
    "u": {1: 3, 2: 5, 4: 10, 8: 20},
    "i": {1: 4, 2: 6, 4: 11, 8: 20},
    "f": {2: 10, 4: 15, 8: 24},
    "b": {1: 1},
}
"""Characters that the widest value takes, by numpy kind and size in bytes."""
TIME_WIDTH = 30
INDEX_WIDTH = 12


def index_column(layout: PacketLayout) -> str:
    taken = {name for name, _ in layout.fields}
    return next(name for name in INDEX_COLUMNS if name not in taken)


def column_names(layout: PacketLayout) -> list[str]:
    fields = [name for name, _ in layout.fields] or [OPAQUE_COLUMN]
    return [index_column(layout), *fields]


def counted(count: int, word: str) -> str:
    """``1 hole``, ``2 holes``."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def hole_text(hole: Hole, packet_size: int) -> str:
    """One line that says which packets are not there."""
    packets = hole.indexes(packet_size)
    return f"-- {counted(len(packets), 'packet')} {hole.kind}: {packets.start} to {packets.stop - 1}"


class Texts:
    """Formats the batches of one stream."""

    def __init__(self, layout: PacketLayout) -> None:
        self._layout = layout
        self._names = column_names(layout)
        self._widths = [INDEX_WIDTH, *(self._width(name) for name in self._names[1:])]

    def header(self) -> str:
        """Names of the columns, aligned as in ``lines``."""
        return self._line(self._names)

    def lines(self, batch: Batch) -> Iterator[str]:
        """One aligned line a packet."""
        return map(self._line, zip(*self._columns(batch), strict=True))

    def csv_header(self) -> str:
        return _csv([self._names])

    def csv(self, batch: Batch) -> str:
        """Lines of CSV, each with its line end."""
        return _csv(zip(*self._columns(batch), strict=True))

    def json_lines(self, batch: Batch) -> Iterator[str]:
        """One JSON object a packet; numbers are numbers, all else is text."""
        columns: list[list[Any]] = [list(range(batch.index, batch.end_index))]
        for name, texts in zip(self._names[1:], self._columns(batch)[1:], strict=True):
            columns.append(self._json_values(batch.packets, name, texts))
        for values in zip(*columns, strict=True):
            yield json.dumps(dict(zip(self._names, values, strict=True)), allow_nan=False)

    def _line(self, values: Sequence[str]) -> str:
        cells = (value.rjust(width) for value, width in zip(values, self._widths, strict=True))
        return "  ".join(cells).rstrip()

    def _width(self, name: str) -> int:
        if self._layout.is_opaque:
            return 0
        kind: np.dtype[Any] = self._layout.dtype[name]
        if name == self._layout.time:
            return max(len(name), TIME_WIDTH)
        return max(len(name), WIDTHS.get(kind.kind, {}).get(kind.itemsize, 2 * kind.itemsize))

    def _columns(self, batch: Batch) -> list[list[str]]:
        packets = batch.packets
        columns = [[str(index) for index in range(batch.index, batch.end_index)]]
        if self._layout.is_opaque:
            return [*columns, _hexadecimal(packets)]
        columns.extend(self._texts(packets[name], name) for name in self._names[1:])
        return columns

    def _texts(self, values: npt.NDArray[Any], name: str) -> list[str]:
        if name == self._layout.time:
            return _times(values)
        kind = values.dtype.kind
        if kind == "V":
            return _hexadecimal(values)
        if kind == "S":
            return [value.decode("ascii", "backslashreplace") for value in values.tolist()]
        if kind == "f":
            return [str(value) for value in values.astype(values.dtype.newbyteorder("="))]
        if kind == "b":
            values = values.view(np.uint8)
        return [str(value) for value in values.tolist()]

    def _json_values(self, packets: npt.NDArray[Any], name: str, texts: list[str]) -> list[Any]:
        if self._layout.is_opaque or name == self._layout.time or packets.dtype[name].kind in "SV":
            return texts
        values: list[Any] = packets[name].tolist()
        if packets.dtype[name].kind == "f":
            return [value if np.isfinite(value) else None for value in values]
        return values


def _csv(rows: Any) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def _hexadecimal(values: npt.NDArray[Any]) -> list[str]:
    width = 2 * values.dtype.itemsize
    text = values.tobytes().hex()
    return [text[at : at + width] for at in range(0, len(text), width)]


def _times(values: npt.NDArray[Any]) -> list[str]:
    """All with nine decimals, so that they align and sort; numbers that are no time stay numbers."""
    native = values.astype(values.dtype.newbyteorder("="))
    if len(native) and (int(native.min()) < 0 or int(native.max()) > UNIX_NS_MAX):
        return [iso_utc(value) for value in native.tolist()]
    texts = np.datetime_as_string(native.astype(np.int64).view("M8[ns]"), unit="ns")
    return [f"{text}Z" for text in texts.tolist()]
