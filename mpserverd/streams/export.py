"""Writes packets of a stream to one file in a format that other programs read.

Rules: memory stays bounded however long the stream is. The file appears under its name when it is whole: it is
written beside it, synced, then renamed. What is no regular file (a pipe, a device) is written to directly. Holes are
left out and counted; the packet's index, where the format has room for it, shows where they were.

It does not choose the range; that is the caller, with ``Stream.index_at``.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.lib import format as npy_format

from mpserverd.errors import MpserverdError, UsageError
from mpserverd.protocol.layout import PacketLayout
from mpserverd.streams.catalog_view import Hole
from mpserverd.streams.reader import Batch, Stream
from mpserverd.streams.text import Texts

BATCH_BYTES = 4 << 20
NPY_HEADER_ALIGNMENT = 64
COUNT_DIGITS = 20
"""Room for the largest count, so that the header of an .npy file can be written again once the count is known."""

Progress = Callable[[int], object]


@dataclass
class ExportCount:
    """What went into the file, and what could not."""

    packets: int = 0
    bytes: int = 0
    first_index: int | None = None
    end_index: int | None = None
    holes: int = 0
    hole_packets: int = 0

    def add(self, batch: Batch) -> None:
        self.packets += len(batch)
        self.bytes += batch.packets.nbytes
        self.first_index = batch.index if self.first_index is None else self.first_index
        self.end_index = batch.end_index

    def add_hole(self, hole: Hole, packet_size: int) -> None:
        self.holes += 1
        self.hole_packets += len(hole.indexes(packet_size))


class FileWriter(Protocol):
    """One format. ``begin``, then ``add`` for each batch, then ``end`` with the totals."""

    def begin(self) -> None: ...
    def add(self, batch: Batch) -> None: ...
    def end(self, count: ExportCount) -> None: ...


class RawWriter:
    """The packets and nothing else."""

    def __init__(self, file: BinaryIO, layout: PacketLayout) -> None:
        self._file = file

    def begin(self) -> None:
        pass

    def add(self, batch: Batch) -> None:
        self._file.write(batch.packets.view(np.uint8).data)

    def end(self, count: ExportCount) -> None:
        pass


class CsvWriter:
    """A header, then one line a packet that begins with its index."""

    def __init__(self, file: BinaryIO, layout: PacketLayout) -> None:
        self._file = file
        self._texts = Texts(layout)

    def begin(self) -> None:
        self._file.write(self._texts.csv_header().encode())

    def add(self, batch: Batch) -> None:
        self._file.write(self._texts.csv(batch).encode())

    def end(self, count: ExportCount) -> None:
        pass


class NpyWriter:
    """One array for ``numpy.load``, ``mmap_mode`` included. The header is written twice: its length stays, its count
    comes."""

    def __init__(self, file: BinaryIO, layout: PacketLayout) -> None:
        self._file = file
        self._dtype = layout.dtype
        if not file.seekable():
            raise UsageError(
                "npy begins with the number of packets, so it needs a file, not a pipe; use raw or csv there"
            )

    def begin(self) -> None:
        self._file.write(npy_header(self._dtype, 0))

    def add(self, batch: Batch) -> None:
        self._file.write(batch.packets.view(np.uint8).data)

    def end(self, count: ExportCount) -> None:
        self._file.seek(0)
        self._file.write(npy_header(self._dtype, count.packets))
        self._file.seek(0, os.SEEK_END)


def npy_header(dtype: np.dtype[Any], count: int) -> bytes:
    """Magic and header of an .npy file (numpy's format 1.0, or 2.0 for a long one), as long for any count."""
    shape = f"({count},)".ljust(COUNT_DIGITS + 3)
    text = f"{{'descr': {npy_format.dtype_to_descr(dtype)!r}, 'fortran_order': False, 'shape': {shape}}}"
    body = text.encode("latin1" if text.isascii() else "utf8")
    version, length_bytes = ((1, 0), 2) if len(body) < 65_000 else ((2, 0), 4)
    if not text.isascii():
        version, length_bytes = (3, 0), 4
    start = len(npy_format.MAGIC_PREFIX) + 2 + length_bytes
    padding = -(start + len(body) + 1) % NPY_HEADER_ALIGNMENT
    body += b" " * padding + b"\n"
    return npy_format.magic(*version) + len(body).to_bytes(length_bytes, "little") + body


def make_parquet_writer(file: BinaryIO, layout: PacketLayout) -> FileWriter:
    if find_spec("pyarrow") is None:
        raise MpserverdError(
            "Parquet needs pyarrow, which is not installed; type: pip install pyarrow (or use npy or csv)"
        )
    from mpserverd.streams.export_parquet import ParquetWriter  # noqa: PLC0415 - optional, and slow to import

    return ParquetWriter(file, layout)


FORMATS: dict[str, Callable[[BinaryIO, PacketLayout], FileWriter]] = {
    "raw": RawWriter,
    "csv": CsvWriter,
    "npy": NpyWriter,
    "parquet": make_parquet_writer,
}


def export_packets(
    stream: Stream,
    file: BinaryIO,
    kind: str,
    start: int | None = None,
    stop: int | None = None,
    *,
    progress: Progress | None = None,
) -> ExportCount:
    """Write packets [start, stop) to an open binary file. ``progress`` gets the packets written so far."""
    writer = FORMATS[kind](file, stream.layout)
    count = ExportCount()
    writer.begin()
    batch_packets = max(1, BATCH_BYTES // stream.packet_size)
    for item in stream.packets(start, stop, batch_packets=batch_packets):
        if isinstance(item, Hole):
            count.add_hole(item, stream.packet_size)
            continue
        writer.add(item)
        count.add(item)
        if progress is not None:
            progress(count.packets)
    writer.end(count)
    return count


def export_file(
    stream: Stream,
    output: Path,
    kind: str,
    start: int | None = None,
    stop: int | None = None,
    *,
    progress: Progress | None = None,
) -> ExportCount:
    """Write packets [start, stop) to ``output``, which is replaced only by a whole file.

    Raises UsageError when the file cannot be made, MpserverdError when it cannot be filled (a full disk).
    """
    with _whole_file(output) as file:
        return export_packets(stream, file, kind, start, stop, progress=progress)


@contextmanager
def _whole_file(output: Path) -> Iterator[BinaryIO]:
    """A binary file that becomes ``output`` at the end of the block, and vanishes when the block fails."""
    direct = _is_special(output)
    target = output if direct else output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        file = target.open("wb" if direct else "xb")
    except OSError as error:
        raise UsageError(f"cannot write {output}: {error.strerror}") from error
    try:
        with file:
            yield file
            file.flush()
            if not direct:
                os.fsync(file.fileno())
        if not direct:
            target.replace(output)
    except BaseException as error:
        if not direct:
            with contextlib.suppress(OSError):
                target.unlink()
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise MpserverdError(f"cannot write {output}: {error.strerror}; nothing was left behind") from error
        raise


def _is_special(output: Path) -> bool:
    try:
        return not stat.S_ISREG(output.stat().st_mode)
    except OSError:
        return False
