"""``mpserverctl repair``: takes the spool's lock, has the catalog made anew, and prints what came of it.

It refuses while a daemon, or a storer that still hangs in the kernel, has the spool. The work is done in
``mpserverd/storer/repair.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from mpserverd.errors import SpoolError
from mpserverd.limits import PACKET_BYTES_MAX
from mpserverd.storer.repair import Report, StreamReport, Wishes, repair
from mpserverd.streams.text import counted
from mpserverd.supervisor.spool_lock import is_locked_now, lock_holders


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checksums", action="store_true", help="read sealed segments, and set aside those with other content"
    )
    parser.add_argument(
        "--packet-size", type=_packet_size, default=0, metavar="N", help="of streams that nothing else says it of"
    )


def _packet_size(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= PACKET_BYTES_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number from 1 to {PACKET_BYTES_MAX}")
    return int(text)


def run(spool: Path, args: argparse.Namespace, out: TextIO, *, as_json: bool) -> int:
    """Exit code 0 when everything is there, 1 when something is missing or was left out."""
    with _locked(spool):
        report = repair(str(spool), Wishes(checksums=args.checksums, packet_size=args.packet_size))
    if as_json:
        print(json.dumps(report.as_json(), indent=2), file=out)
    else:
        out.writelines(f"{line}\n" for line in lines(report))
    return 0 if report.fine else 1


@contextlib.contextmanager
def _locked(spool: Path) -> Iterator[None]:
    try:
        descriptor = os.open(spool, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise SpoolError(f"there is no spool at {spool}; name one with --spool PATH") from None
    try:
        if not is_locked_now(descriptor):
            holders = lock_holders(descriptor)
            by = f" by pid {', '.join(map(str, holders))}" if holders else ""
            raise SpoolError(f"the spool {spool} is in use{by}; stop the daemon first: systemctl stop mpserverd")
        yield
    finally:
        os.close(descriptor)


def lines(report: Report) -> Iterator[str]:
    """For people: what was wrong, stream by stream, and what became of it."""
    if not report.changed:
        yield f"nothing to repair: {len(report.streams)} streams, and the catalog fits their files"
    elif report.catalog_fault:
        yield f"the catalog could not be used: {report.catalog_fault}"
    for stream in report.streams:
        if stream.changed:
            yield from _stream_lines(stream)
    for text in report.left_out:
        yield f"left out: {text}"
    for path in report.set_aside:
        yield f"set aside: {path}"
    yield from report.notes
    if report.uncompared_segments:
        yield f"not compared with their checksums: {counted(report.uncompared_segments, 'segment')}; " \
              "mpserverctl repair --checksums does that"  # fmt: skip
    if report.changed:
        aside = f"; the old one is {report.catalog_aside}" if report.catalog_aside else ""
        yield f"catalog written: {len(report.streams)} streams, {report.lost_bytes} bytes are missing{aside}"
        yield "next: mpserverctl verify, then start the daemon"


def _stream_lines(stream: StreamReport) -> Iterator[str]:
    yield f"{stream.name} ({stream.epoch}): packets of {stream.packet_size} bytes, offsets {stream.first_offset} to " \
          f"{stream.durable_offset}"  # fmt: skip
    for note in stream.notes:
        yield f"    {note}"
