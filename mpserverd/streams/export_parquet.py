"""Writes packets as Parquet, one column a field, by pyarrow; imported only when somebody asks for it.

Rules: a row group holds a bounded number of rows and bytes, and no more is in memory. The layout's time becomes a
timestamp in UTC with nanoseconds; a number too large for one becomes null. Runs of bytes and opaque packets are
binary of fixed size.
"""

from __future__ import annotations

from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mpserverd.protocol.layout import PacketLayout
from mpserverd.streams.export import ExportCount
from mpserverd.streams.reader import Batch
from mpserverd.streams.text import OPAQUE_COLUMN, index_column
from mpserverd.streams.times import UNIX_NS_MAX

ROW_GROUP_PACKETS = 262_144
ROW_GROUP_BYTES = 32 << 20


class ParquetWriter:
    """Gathers batches until a row group is full."""

    def __init__(self, file: BinaryIO, layout: PacketLayout) -> None:
        self._layout = layout
        self._group_packets = max(1, min(ROW_GROUP_PACKETS, ROW_GROUP_BYTES // layout.size))
        self._batches: list[Batch] = []
        self._gathered = 0
        self._schema = self._table([]).schema
        self._writer = pq.ParquetWriter(file, self._schema)

    def begin(self) -> None:
        pass

    def add(self, batch: Batch) -> None:
        at = 0
        while at < len(batch):
            take = min(len(batch) - at, self._group_packets - self._gathered)
            self._batches.append(Batch(batch.index + at, batch.packets[at : at + take]))
            self._gathered += take
            at += take
            if self._gathered == self._group_packets:
                self._write()

    def end(self, count: ExportCount) -> None:
        if self._gathered:
            self._write()
        self._writer.close()

    def _write(self) -> None:
        self._writer.write_table(self._table(self._batches), row_group_size=self._group_packets)
        self._batches, self._gathered = [], 0

    def _table(self, batches: list[Batch]) -> Any:
        layout = self._layout
        packets = np.concatenate([np.empty(0, layout.dtype), *(batch.packets for batch in batches)])
        ranges = (np.arange(batch.index, batch.end_index, dtype=np.uint64) for batch in batches)
        columns: dict[str, Any] = {index_column(layout): pa.array(np.concatenate([np.empty(0, np.uint64), *ranges]))}
        if layout.is_opaque:
            columns[OPAQUE_COLUMN] = _fixed_binary(packets)
        for name, _ in layout.fields:
            columns[name] = _times(packets[name]) if name == layout.time else _column(packets[name])
        return pa.table(columns)


def _column(values: npt.NDArray[Any]) -> Any:
    kind: np.dtype[Any] = values.dtype
    if kind.kind in "SV":
        return _fixed_binary(values)
    native = np.ascontiguousarray(values, kind.newbyteorder("="))
    if kind.kind == "f" and kind.itemsize == 2:
        native = native.astype(np.float32)  # older versions of pyarrow cannot write half floats
    return pa.array(native)


def _times(values: npt.NDArray[Any]) -> Any:
    native = np.ascontiguousarray(values, values.dtype.newbyteorder("="))
    no_time = (native < 0) | (native > UNIX_NS_MAX)
    unix_ns = np.where(no_time, 0, native).astype(np.int64)
    return pa.array(unix_ns, pa.timestamp("ns", tz="UTC"), mask=no_time)


def _fixed_binary(values: npt.NDArray[Any]) -> Any:
    content = pa.py_buffer(values.tobytes())
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(values.dtype.itemsize), len(values), [None, content])
