"""``mpserverctl streams``, ``read``, ``tail``, ``export``, ``verify`` and ``repair``: all that works on a spool.

``add_parsers`` declares their arguments, ``COMMANDS[name](args, out)`` runs one, writes to the text file ``out`` and
returns the exit code. Errors are raised as MpserverdError, for the caller to print and to leave with. Of the caller's
own arguments these are used where they exist: ``args.json``, and ``args.daemon_spool``, a function that asks the
daemon for its spool (or gives None).

It formats; the work is done in ``mpserverd/streams``.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import re
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from rich.console import Console
from rich.progress import Progress

from mpserverd.cli import repair_command
from mpserverd.cli.spool_output import (
    check_lines,
    export_line,
    print_items,
    print_raw,
    stream_lines,
    verify_lines,
)
from mpserverd.errors import DamageError, SpoolError, UsageError
from mpserverd.streams.catalog_view import StreamSnapshot, all_streams, find_stream
from mpserverd.streams.export import FORMATS, export_file, export_packets
from mpserverd.streams.listing import list_streams
from mpserverd.streams.reader import DEFAULT_SPOOL, Stream, open_stream
from mpserverd.streams.times import TIME_HELP, parse_time
from mpserverd.streams.verify import StreamCheck, repair_step, verify_streams
from mpserverd.streams.verify_spool import check_catalog_pages, check_directories, list_directories

Command = Callable[[argparse.Namespace, TextIO], int]

READ_FORMATS = ("text", "raw", "csv", "json")
TAIL_PACKETS = 10
TEXT_BATCH_PACKETS = 4096
VERIFY_JOBS_MAX = 64
WRITE_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Faults that reading never has."""
PACKET_RANGE = re.compile(r"(-?\d*)(:)?(-?\d*)")
DASHED_VALUE = re.compile(r"-\d+(\.\d+)?(ms|s|m|h|d|w)?$|-\d+:-?\d*$")
"""Values that begin with a dash: ``--since -5m``, ``--packets -100:``. argparse takes them for options otherwise."""


# --- arguments


def add_parsers(subparsers: Any) -> None:
    """Add the commands to ``ArgumentParser.add_subparsers()``."""
    streams = _parser(subparsers, "streams", "list the streams of a spool")
    streams.add_argument("pattern", nargs="?", metavar="PATTERN", help="only names like this, with * and ?")
    streams.add_argument("--all-epochs", action="store_true", help="older epochs too")

    read = _parser(subparsers, "read", "print packets of a stream")
    read.add_argument("stream", metavar="STREAM", help="its name, or NAME@EPOCH for an older one")
    _add_range(read)
    _add_format(read)

    tail = _parser(subparsers, "tail", "print the newest packets of a stream")
    tail.add_argument("stream", metavar="STREAM", help="its name, or NAME@EPOCH for an older one")
    tail.add_argument(
        "-n", "--count", type=_count, default=TAIL_PACKETS, metavar="N", help=f"how many ({TAIL_PACKETS})"
    )
    tail.add_argument("-f", "--follow", action="store_true", help="go on with what comes, until interrupted")
    _add_format(tail)

    export = _parser(subparsers, "export", "write packets of a stream to a file")
    export.add_argument("stream", metavar="STREAM", help="its name, or NAME@EPOCH for an older one")
    export.add_argument("--format", required=True, choices=list(FORMATS), help="parquet needs pyarrow")
    export.add_argument("--output", required=True, metavar="FILE", help="- is standard output (raw and csv)")
    _add_range(export)

    verify = _parser(subparsers, "verify", "check the files of a spool against its catalog")
    verify.add_argument("streams", nargs="*", metavar="STREAM", help="only these (default: all, older epochs too)")
    jobs = min(4, os.cpu_count() or 1)
    verify.add_argument("--jobs", type=_jobs, default=jobs, metavar="N", help=f"files read at a time ({jobs})")

    text = "make the catalog of a spool anew from its segments"
    repair = _parser(
        subparsers, "repair", text, f"{text.capitalize()}. The daemon must be stopped. Nothing is deleted."
    )
    repair_command.add_arguments(repair)


def _parser(subparsers: Any, name: str, text: str, description: str = "") -> argparse.ArgumentParser:
    description = description or f"{text.capitalize()}. Works without the daemon too."
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=text, description=description, allow_abbrev=False
    )
    parser._negative_number_matcher = DASHED_VALUE
    where = f"spool directory (default: the daemon's, or {DEFAULT_SPOOL})"
    parser.add_argument("--spool", metavar="PATH", default=argparse.SUPPRESS, help=where)  # may stand before it, too
    return parser


def _add_range(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--packets", type=_packet_range, metavar="A:B", help="from index A up to B; -N: the last N")
    parser.add_argument("--since", metavar="T", help=f"became durable after {TIME_HELP}")
    parser.add_argument("--until", metavar="T", help="became durable up to then")


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=READ_FORMATS, help="default: text, or json with --json")


def _packet_range(text: str) -> tuple[int | None, int | None]:
    found = PACKET_RANGE.fullmatch(text)
    try:
        if found is None or text in {"", "-"}:
            raise ValueError
        start = int(found[1]) if found[1] else None
        if found[2] is None:
            return start, None if start is None or start == -1 else start + 1
        return start, int(found[3]) if found[3] else None
    except ValueError:
        fault = f"{text!r} is no range of packets; write A:B, A:, :B, -N: or one index"
        raise argparse.ArgumentTypeError(fault) from None


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of packets")
    return int(text)


def _jobs(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= VERIFY_JOBS_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number from 1 to {VERIFY_JOBS_MAX}")
    return int(text)


# --- commands


def streams_command(args: argparse.Namespace, out: TextIO) -> int:
    found = list_streams(_spool(args), pattern=args.pattern, all_epochs=args.all_epochs)
    if _wants_json(args):
        print(json.dumps([info.as_json() for info in found], indent=2), file=out)
    else:
        out.writelines(f"{line}\n" for line in stream_lines(found))
    return 0


def read_command(args: argparse.Namespace, out: TextIO) -> int:
    with open_stream(args.stream, spool=_spool(args)) as stream:
        start, stop = _range(args, stream)
        if _format(args) == "raw":
            export_packets(stream, _binary(out), "raw", start, stop)
            return 0
        items = stream.packets(start, stop, batch_packets=TEXT_BATCH_PACKETS)
        print_items(stream, items, _format(args), out)
    return 0


def tail_command(args: argparse.Namespace, out: TextIO) -> int:
    with open_stream(args.stream, spool=_spool(args)) as stream:
        start = max(stream.first_index, stream.end_index - args.count)
        if args.follow:
            items = stream.follow(start, batch_packets=TEXT_BATCH_PACKETS)
        else:
            items = stream.packets(start, batch_packets=TEXT_BATCH_PACKETS)
        with contextlib.suppress(KeyboardInterrupt):
            if _format(args) == "raw":
                print_raw(items, _binary(out))
            else:
                print_items(stream, items, _format(args), out)
    return 0


def export_command(args: argparse.Namespace, out: TextIO) -> int:
    with open_stream(args.stream, spool=_spool(args)) as stream:
        start, stop = _range(args, stream)
        if args.output == "-":
            export_packets(stream, _binary(out), args.format, start, stop)
            return 0
        with _progress(max(0, stop - start)) as progress:
            count = export_file(stream, Path(args.output), args.format, start, stop, progress=progress)
    if _wants_json(args):
        print(json.dumps({"output": args.output, "format": args.format, **count.__dict__}), file=out)
    else:
        print(export_line(args.output, count), file=out)
    return 0


def verify_command(args: argparse.Namespace, out: TextIO) -> int:
    spool = _spool(args)
    directories = list_directories(spool)
    around: list[str] = []
    checks: list[StreamCheck] = []
    try:
        around += check_catalog_pages(spool)
        wanted: Sequence[StreamSnapshot] = [find_stream(spool, name) for name in args.streams]
        for check in verify_streams(spool, wanted if args.streams else all_streams(spool, all_epochs=True), args.jobs):
            checks.append(check)
            if not _wants_json(args):
                out.writelines(f"{line}\n" for line in check_lines(check))
        if not args.streams:
            around += check_directories(spool, directories)
    except DamageError as error:  # the catalog is in no state to be asked
        around = around or [str(error)]
    totals = {
        "streams": len(checks),
        "streams_damaged": sum(not check.fine for check in checks),
        "findings": len(around) + sum(len(check.findings) for check in checks),
        "checked_bytes": sum(check.checked_bytes for check in checks),
        "unchecked_bytes": sum(check.unchecked_bytes for check in checks),
    }
    fine = totals["findings"] == 0
    next_step = "" if fine else repair_step(checks)
    if _wants_json(args):
        report = {"fine": fine, "totals": totals, "findings": around, "next_step": next_step}
        print(json.dumps({**report, "streams": [check.as_json() for check in checks]}, indent=2), file=out)
    else:
        out.writelines(f"{line}\n" for line in verify_lines(around, totals, next_step))
    return 0 if fine else 1


def repair_spool_command(args: argparse.Namespace, out: TextIO) -> int:
    return repair_command.run(_spool(args), args, out, as_json=_wants_json(args))


def _guarded(command: Command) -> Command:
    """An operating fault is one line. A reader that went away (``| head``) is the caller's to pass over."""

    def run(args: argparse.Namespace, out: TextIO) -> int:
        try:
            code = command(args, out)
            out.flush()
            return code
        except BrokenPipeError:
            raise
        except OSError as error:
            raise SpoolError(f"{error.filename or _place(error, args, out)}: {error.strerror}") from error
        except sqlite3.Error as error:
            raise SpoolError(f"the catalog cannot be read or written: {error}") from error

    return run


def _place(error: OSError, args: argparse.Namespace, out: TextIO) -> str:
    """Where a fault without a file name happened: what we write to, or the spool, which is only read."""
    output = getattr(args, "output", "-")
    if error.errno in WRITE_FAULTS:
        return "standard output" if output == "-" else str(output)
    try:
        out.flush()  # what could not be written is still there, and fails again
    except OSError:
        return "standard output"
    return "the spool"


COMMANDS: dict[str, Command] = {
    "streams": _guarded(streams_command),
    "read": _guarded(read_command),
    "tail": _guarded(tail_command),
    "export": _guarded(export_command),
    "verify": _guarded(verify_command),
    "repair": _guarded(repair_spool_command),
}


# --- what the commands share


def _spool(args: argparse.Namespace) -> Path:
    if getattr(args, "spool", None):
        return Path(args.spool)
    ask: Callable[[], str | None] = getattr(args, "daemon_spool", lambda: None)
    return Path(ask() or DEFAULT_SPOOL)


def _wants_json(args: argparse.Namespace) -> bool:
    return bool(getattr(args, "json", False))


def _format(args: argparse.Namespace) -> str:
    return args.format or ("json" if _wants_json(args) else "text")


def _range(args: argparse.Namespace, stream: Stream) -> tuple[int, int]:
    """Packets asked for by index and by time: those that are in both."""
    start, stop = stream.first_index, stream.end_index
    if args.packets is not None:
        low, high = (None if n is None else n + stop if n < 0 else n for n in args.packets)
        start, stop = max(0, start if low is None else low), stop if high is None else min(stop, high)
    now = time.time_ns()
    if args.since is not None:
        start = max(start, stream.index_at(parse_time(args.since, now)))
    if args.until is not None:
        stop = min(stop, stream.index_at(parse_time(args.until, now)))
    return start, stop


def _binary(out: TextIO) -> BinaryIO:
    if out.isatty():
        raise UsageError("raw bytes would garble the terminal; redirect them, or name a file with export --output")
    out.flush()
    return out.buffer


@contextlib.contextmanager
def _progress(packets: int) -> Iterator[Callable[[int], object] | None]:
    """A bar on the terminal, if standard error is one."""
    if not sys.stderr.isatty():
        yield None
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("packets", total=packets)
        yield lambda done: bar.update(task, completed=done)
