"""``mpserverctl doctor``, ``tune``, ``plan``, ``support-bundle`` and ``backup``: what keeps an installation well.

Rows as in cli/ctl_commands.py; the work is done in mpserverd/ops, which is imported only when it is needed. Where the
caller named no control socket, ``args.socket_named`` is None.
"""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from pathlib import Path
from typing import Any, TextIO

from mpserverd.cli.ctl_commands import Command, Run
from mpserverd.errors import MpserverdError

LEVEL_WIDTH = 8
TEXT_WIDTH_MIN = 30
LEVEL_WORDS = {"fault": "FAULT", "warning": "WARNING", "note": "note", "ok": "ok"}


# -- doctor


def doctor_command(args: argparse.Namespace, out: TextIO) -> int:
    from mpserverd.ops.doctor import diagnose  # noqa: PLC0415
    from mpserverd.ops.site import survey  # noqa: PLC0415

    report = diagnose(survey(args.config, args.socket_named, probe=args.probe))
    if args.json:
        _print_json(out, report)
    else:
        _print_findings(report, out)
    return 0 if report["fine"] else 1


def _print_findings(report: dict[str, Any], out: TextIO) -> None:
    """Worst first, each with what to type below it."""
    width = max(len(finding["check"]) for finding in report["findings"])
    indent = " " * (LEVEL_WIDTH + width + 3)
    columns = shutil.get_terminal_size().columns if out.isatty() else 0
    for finding in report["findings"]:
        head = f"{LEVEL_WORDS[finding['level']]:{LEVEL_WIDTH}} {finding['check']:{width}}  "
        print(_wrapped(head + finding["text"], columns, indent), file=out)
        if finding["command"]:
            print(_wrapped(f"{indent}-> {finding['command']}", columns, indent + "   "), file=out)
    counts = report["counts"]
    print(
        f"\n{_counted(counts['fault'], 'fault')}, {_counted(counts['warning'], 'warning')}, "
        f"{_counted(counts['note'], 'note')}, {counts['ok']} ok",
        file=out,
    )


def _wrapped(line: str, columns: int, indent: str) -> str:
    """On a terminal lines are broken between words; elsewhere they stay whole."""
    if columns <= len(indent) + TEXT_WIDTH_MIN:
        return line
    return textwrap.fill(
        line, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    )


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    _config_argument(parser)
    parser.add_argument(
        "--probe", action="store_true", help="write a file of 16 MiB into the spool and connect to each listener, too"
    )


def _config_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="default: the running daemon's, or the usual one")


# -- tune


def tune_command(args: argparse.Namespace, out: TextIO) -> int:
    from mpserverd.cli.tables import Column, Table, print_table  # noqa: PLC0415
    from mpserverd.ops import tune  # noqa: PLC0415
    from mpserverd.ops.site import survey  # noqa: PLC0415

    site = survey(args.config, args.socket_named)
    applied = tune.apply(site) if args.apply else []
    report = tune.report(tune.compare(site), applied)
    if args.json:
        _print_json(out, report)
        return 0 if report["fine"] else 1
    table = Table("", (Column("setting"), Column("wanted", True), Column("is", True), Column(""), Column("at boot")))
    for row in report["settings"]:
        actual = "not here" if row["actual"] is None else f"{row['actual']:,}"
        state = "ok" if row["fine"] else "LOW"
        table.add(row["name"], f"{row['wanted']:,}", actual, state, row["persistent"] or "not set")
    print_table(table, out, 0)
    for row in report["settings"]:
        print(f"{row['name']}: {row['reason']}", file=out)
    for step in applied:
        print(f"{'done' if step['done'] else 'FAILED'}: {step['what']}: {step['detail']}", file=out)
    if not args.apply and any(not row["fine"] or not row["persistent"] for row in report["settings"]):
        print("-> mpserverctl tune --apply", file=out)
    elif args.apply and not applied:
        print("nothing to do", file=out)
    return 0 if report["fine"] else 1


def _tune_arguments(parser: argparse.ArgumentParser) -> None:
    _config_argument(parser)
    parser.add_argument("--apply", action="store_true", help="write what falls short, now and for the next boot (root)")


# -- plan


def plan_command(args: argparse.Namespace, out: TextIO) -> int:
    from mpserverd.ops.plan import Demand, plan  # noqa: PLC0415

    report = plan(Demand(args.clients, args.rate, args.size, args.days, args.batch))
    if args.json:
        _print_json(out, report)
    else:
        _print_plan(report, out)
    return 0


def _print_plan(report: dict[str, Any], out: TextIO) -> None:
    from mpserverd.cli.tables import human_bytes, print_pairs  # noqa: PLC0415

    demand = report["demand"]
    print_pairs(
        "",
        (
            ("incoming", f"{report['packets_per_s']:,.0f} packets/s, {human_bytes(report['bytes_per_s'])}/s"),
            ("network", f"{report['network_bits_per_s'] / 1e6:,.1f} Mbit/s with TCP's headers"),
            ("disk a day", human_bytes(report["bytes_per_day"])),
            (f"disk for {demand['days']:g} days", human_bytes(report["stored_bytes"])),
            ("max_bytes", f"{human_bytes(report['max_bytes'])}: that, and two segments for each client"),
            ("disk to buy", f"{human_bytes(report['disk_bytes'])}: that, and min_free_bytes"),
            ("disk speed", f"{100 * report['disk_share']:.1f} % of the measured disk's 1 GB/s"),
            ("buffers", f"{human_bytes(report['buffers_bytes'])}: two chunks a client, and {report['burst_s']:g} s"),
            ("memory", human_bytes(report["memory_bytes"])),
            ("open files", f"{report['descriptors']:,}   (LimitNOFILE)"),
            ("workers", f"{report['workers']}, {report['worker_cores']:g} cores busy"),
            ("storer", f"{report['storer_cores']:g} cores busy, durable after about {report['durable_after_s']:g} s"),
            ("a batch", f"is sent every {report['batch_wait_s']:.3g} s by each client"),
        ),
        out,
    )
    for remark in report["remarks"]:
        print(f"note: {remark}", file=out)
    print(f"\n{report['toml']}", end="", file=out)


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clients", type=int, required=True, metavar="N", help="connections at one time")
    parser.add_argument("--rate", type=float, required=True, metavar="R", help="packets/s of each")
    parser.add_argument("--size", type=int, required=True, metavar="S", help="bytes of a packet")
    parser.add_argument("--days", type=float, required=True, metavar="D", help="how long packets are kept")
    parser.add_argument("--batch", type=int, default=804, metavar="B", help="packets in one write of a client (804)")


# -- support-bundle


def support_bundle_command(args: argparse.Namespace, out: TextIO) -> int:
    from mpserverd.ops.bundle import collect  # noqa: PLC0415
    from mpserverd.ops.site import survey  # noqa: PLC0415

    report = collect(survey(args.config, args.socket_named), Path(args.output), names=args.names)
    if args.json:
        _print_json(out, report)
        return 0
    for name, size_bytes in report["members"].items():
        print(f"{name:22} {size_bytes:>11,} bytes", file=out)
    for name, reason in report["left_out"].items():
        print(f"{name:22} left out: {reason}", file=out)
    print(f"{args.output}: no packets, settings masked; look through it before you send it", file=out)
    return 0


def _support_bundle_arguments(parser: argparse.ArgumentParser) -> None:
    _config_argument(parser)
    parser.add_argument("--output", required=True, metavar="FILE", help="a .tar.gz, for you alone to read")
    parser.add_argument("--names", action="store_true", help="names of streams too, not only how many")


# -- backup


def backup_command(args: argparse.Namespace, out: TextIO) -> int:
    from mpserverd.cli.tables import human_bytes  # noqa: PLC0415
    from mpserverd.ops.backup import backup  # noqa: PLC0415
    from mpserverd.streams.reader import DEFAULT_SPOOL  # noqa: PLC0415

    spool = Path(args.spool or args.daemon_spool() or DEFAULT_SPOOL)
    report = backup(spool, Path(args.output), args.streams, args.jobs)
    if args.json:
        _print_json(out, report)
        return 0 if report["fine"] else 1
    print(
        f"{_counted(report['streams'], 'stream')} of {spool} as of {report['taken']}: "
        f"{_counted(report['segments'], 'file')} copied "
        f"({human_bytes(report['copied_bytes'])}), {report['kept_segments']:,} kept "
        f"({human_bytes(report['kept_bytes'])}), {report['removed_files']:,} old removed",
        file=out,
    )
    for finding in report["findings"]:
        print(f"DAMAGED: {finding}", file=out)
    print("the copy is verified" if report["fine"] else "the copy is DAMAGED", file=out)
    return 0 if report["fine"] else 1


def _backup_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("streams", nargs="*", metavar="STREAM", help="only these (default: all, older epochs too)")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="empty, or an earlier backup to bring up to date"
    )
    text = "spool directory (default: the daemon's, or the usual one)"
    parser.add_argument("--spool", metavar="PATH", default=argparse.SUPPRESS, help=text)  # may stand before it, too
    parser.add_argument(
        "--jobs", type=int, choices=range(1, 65), default=1, metavar="N", help="files verified at a time"
    )


def _guarded(command: Run) -> Run:
    """An operating fault is one line."""

    def run(args: argparse.Namespace, out: TextIO) -> int:
        try:
            return command(args, out)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise MpserverdError(f"{error.filename or args.output}: {error.strerror or error}") from error

    return run


def _print_json(out: TextIO, report: Any) -> None:
    print(json.dumps(report, indent=2, allow_nan=False), file=out)


_ROWS = (
    Command(
        "doctor",
        doctor_command,
        "what is wrong with this machine and configuration, and what to type",
        "Look at limits, kernel settings, disk, clock, ports, permissions, network and daemon. Works without one too.",
        needs_daemon=False,
        add_arguments=_doctor_arguments,
    ),
    Command(
        "tune",
        tune_command,
        "settings of the system: wanted against actual",
        "Compare the kernel's settings and limits with what mpserverd wants. Exit code 1 when one is low.",
        needs_daemon=False,
        add_arguments=_tune_arguments,
    ),
    Command(
        "plan",
        plan_command,
        "disk, memory and descriptors for so many clients",
        "Work out what a machine needs, and the settings to paste. Looks at nothing.",
        needs_daemon=False,
        add_arguments=_plan_arguments,
    ),
    Command(
        "support-bundle",
        _guarded(support_bundle_command),
        "what a bug report needs, in one file without secrets",
        "Collect settings, reports, facts of the system and the end of the log. Works without a daemon too.",
        needs_daemon=False,
        add_arguments=_support_bundle_arguments,
    ),
    Command(
        "backup",
        _guarded(backup_command),
        "a consistent copy of a spool, also of a live one",
        "Copy a spool to another directory and verify the copy; again, and only what is new is copied.",
        needs_daemon=False,
        takes_spool=True,
        add_arguments=_backup_arguments,
    ),
)

COMMANDS: dict[str, Command] = {command.name: command for command in _ROWS}
