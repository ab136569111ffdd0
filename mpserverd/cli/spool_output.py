"""How the spool commands of mpserverctl print: packets as they come, tables of streams, findings of verify.

Text goes to the file that is given, line by line, so that a pipe sees packets as soon as they are there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import BinaryIO, TextIO

from mpserverd.cli.tables import human_bytes
from mpserverd.streams.catalog_view import Hole
from mpserverd.streams.export import ExportCount
from mpserverd.streams.listing import StreamInfo
from mpserverd.streams.reader import Batch, Stream
from mpserverd.streams.text import Texts, counted, hole_text
from mpserverd.streams.verify import StreamCheck


def print_items(stream: Stream, items: Iterator[Batch | Hole], kind: str, out: TextIO) -> None:
    texts = Texts(stream.layout)
    if kind != "json":
        out.write(texts.csv_header() if kind == "csv" else f"{texts.header()}\n")
    for item in items:
        if isinstance(item, Hole):
            _print_hole(item, stream.packet_size, kind, out)
        elif kind == "csv":
            out.write(texts.csv(item))
        else:
            lines = texts.json_lines(item) if kind == "json" else texts.lines(item)
            out.writelines(f"{line}\n" for line in lines)
        out.flush()


def print_raw(items: Iterator[Batch | Hole], out: BinaryIO) -> None:
    for item in items:
        if isinstance(item, Batch):
            out.write(item.packets.tobytes())
            out.flush()


def _print_hole(hole: Hole, packet_size: int, kind: str, out: TextIO) -> None:
    packets = hole.indexes(packet_size)
    if kind == "text":
        print(hole_text(hole, packet_size), file=out)
    elif kind == "json":
        print(json.dumps({"hole": hole.kind, "index": packets.start, "packets": len(packets)}), file=out)
    else:
        print(hole_text(hole, packet_size), file=sys.stderr)


def stream_lines(found: Sequence[StreamInfo]) -> Iterator[str]:
    titles = ("NAME", "EPOCH", "PACKET", "PACKETS", "HELD", "DURABLE", "HOLES", "STATE", "CREATED")
    rows = [
        (
            info.name if info.current else f"{info.name}@{info.epoch}",
            info.epoch,
            str(info.packet_size),
            str(info.held_bytes // max(1, info.packet_size)),
            human_bytes(info.held_bytes),
            human_bytes(info.durable_bytes),
            str(info.holes),
            "connected" if info.connected else "ended",
            info.created[:19] + "Z",
        )
        for info in found
    ]
    yield from _aligned([titles, *rows], left={0, 1, 7, 8})
    yield f"{counted(len(found), 'stream')}, {human_bytes(sum(info.held_bytes for info in found))} held"


def _aligned(rows: Sequence[Sequence[str]], left: set[int]) -> Iterator[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.ljust(width) if at in left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()


def export_line(output: str, count: ExportCount) -> str:
    line = f"{output}: {counted(count.packets, 'packet')}, {human_bytes(count.bytes)}"
    if count.holes:
        line += f"; not there: {counted(count.hole_packets, 'packet')} in {counted(count.holes, 'hole')}"
    return line


def check_lines(check: StreamCheck) -> Iterator[str]:
    line = f"{check.name}: {'ok' if check.fine else 'DAMAGED'}, {counted(check.segments, 'segment')}, "
    line += f"{human_bytes(check.checked_bytes)} match their checksums"
    if check.unchecked_bytes:
        line += f", {human_bytes(check.unchecked_bytes)} have none yet"
    if check.holes:
        line += f", {counted(check.holes, 'hole')} of {human_bytes(check.hole_bytes)}"
    if check.retired_meanwhile:
        line += ", the oldest was retired meanwhile"
    yield line
    yield from (f"  {finding}" for finding in check.findings)


def verify_lines(around: Sequence[str], totals: dict[str, int], next_step: str) -> Iterator[str]:
    """What comes after the streams: findings that are of none of them, the sum, and what to do."""
    if around:
        yield "the spool itself: DAMAGED"
        yield from (f"  {finding}" for finding in around)
    line = f"{counted(totals['streams'], 'stream')}: {human_bytes(totals['checked_bytes'])} match their checksums, "
    line += f"{human_bytes(totals['unchecked_bytes'])} could not be compared (no checksum yet); "
    if not totals["findings"]:
        yield line + "nothing is wrong"
        return
    where = [counted(totals["streams_damaged"], "stream")] if totals["streams_damaged"] else []
    where += ["the spool itself"] if around else []
    yield line + f"{counted(totals['findings'], 'finding')} in {' and '.join(where)}"
    yield f"next: {next_step}"
