"""The commands of mpserverctl that talk to a running daemon, as rows of one table.

Reports are computed here, in this process, from the daemon's tables (arena/report.py); everything else is one request.
Each function prints to the text file it is given and returns the exit code; faults are raised as MpserverdError.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

from mpserverd.config.words import LogLevel
from mpserverd.control.client import request
from mpserverd.errors import UsageError

if TYPE_CHECKING:
    from mpserverd.arena.live import LiveState

EVENTS_INTERVAL_S = 0.5
WATCH_INTERVAL_S = 1.0
WATCH_INTERVAL_S_MIN = 0.05

Run = Callable[[argparse.Namespace, TextIO], int]


@dataclasses.dataclass(frozen=True, slots=True)
class Command:
    """One row. ``needs_daemon``: whether every form of it does. ``takes_spool``: whether it has --spool."""

    name: str
    run: Run
    help: str
    description: str
    needs_daemon: bool = True
    takes_spool: bool = False
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None


# -- reports


def stats_command(args: argparse.Namespace, out: TextIO) -> int:
    from mpserverd.arena.report import stats  # noqa: PLC0415
    from mpserverd.cli.views import stats_view  # noqa: PLC0415
    from mpserverd.control.host import HostSampler, sample_once  # noqa: PLC0415

    if not args.watch:
        report = stats(_live(args), sample_once())
        _print(args, out, report, lambda: stats_view(report, out))
        return 0
    sampler, next_s = HostSampler(), time.monotonic()
    while True:
        next_s = max(next_s + args.interval, time.monotonic())
        time.sleep(max(0.0, next_s - time.monotonic()))
        report = stats(_live(args), sampler.sample())
        if args.json:
            _print_line(out, report)
            continue
        if out.isatty():
            out.write("\x1b[H\x1b[2J")
        stats_view(report, out)
        out.flush()


def clients_command(args: argparse.Namespace, out: TextIO) -> int:
    from mpserverd.arena.clients import clients  # noqa: PLC0415
    from mpserverd.cli.views import clients_view  # noqa: PLC0415

    report = clients(_live(args))
    _print(args, out, report, lambda: clients_view(report, out, args.rows))
    return 0


def workers_command(args: argparse.Namespace, out: TextIO) -> int:
    from mpserverd.arena.report import workers  # noqa: PLC0415
    from mpserverd.cli.views import workers_view  # noqa: PLC0415

    report = workers(_live(args))
    _print(args, out, report, lambda: workers_view(report, out))
    return 0


def ledger_command(args: argparse.Namespace, out: TextIO) -> int:
    from mpserverd.arena.report import ledger  # noqa: PLC0415
    from mpserverd.cli.views import ledger_view  # noqa: PLC0415

    report = ledger(_live(args), every_stream=args.streams)
    _print(args, out, report, lambda: ledger_view(report, out, args.rows))
    return 0 if report["holds"] else 1


def check_command(args: argparse.Namespace, out: TextIO) -> int:
    from mpserverd.arena.health import health  # noqa: PLC0415
    from mpserverd.cli.views import health_view  # noqa: PLC0415

    report = health(_live(args))
    _print(args, out, report, lambda: health_view(report, out))
    return 0 if report["healthy"] else 1


# -- requests


def events_command(args: argparse.Namespace, out: TextIO) -> int:
    from mpserverd.cli.views import event_line  # noqa: PLC0415

    events = _events(args, since=0)
    shown = events[-args.rows :] if args.rows else events
    if args.json and not args.follow:
        _print_json(out, shown)
        return 0
    while True:
        for event in shown:
            print(_json_line(event) if args.json else event_line(event), file=out)
        out.flush()
        if not args.follow:
            return 0
        since = events[-1]["number"] if events else 0
        while not (shown := _events(args, since)):
            time.sleep(EVENTS_INTERVAL_S)
        events = shown


def _events(args: argparse.Namespace, since: int) -> list[dict[str, Any]]:
    """What happened after event ``since``, each with its time in words."""
    from mpserverd.cli.views import event_time  # noqa: PLC0415

    return [{"time": event_time(event["unix_ns"]), **event} for event in request(args.socket, "events", since=since)]


def config_command(args: argparse.Namespace, out: TextIO) -> int:
    from mpserverd.config import show  # noqa: PLC0415

    if args.default:
        from mpserverd.config.schema import Config  # noqa: PLC0415

        _print(args, out, show.as_dict(Config()), lambda: out.write(show.default_toml()))
        return 0
    report = request(args.socket, "config")
    _print(args, out, report, lambda: out.write(show.dict_as_toml(report)))
    return 0


def target_command(args: argparse.Namespace, out: TextIO) -> int:
    """kick, pause and resume."""
    from mpserverd.cli.views import target_view  # noqa: PLC0415

    report = request(args.socket, args.command, target=args.target)
    _print(args, out, report, lambda: target_view(args.command, report, out))
    return 0


def reload_command(args: argparse.Namespace, out: TextIO) -> int:
    from mpserverd.cli.views import reload_view  # noqa: PLC0415

    report = request(args.socket, "reload")
    _print(args, out, report, lambda: reload_view(report, out))
    return 0


def loglevel_command(args: argparse.Namespace, out: TextIO) -> int:
    report = request(args.socket, "loglevel", level=args.level)
    _print(args, out, report, lambda: print(f"log level {args.level}", file=out))
    return 0


def drain_command(args: argparse.Namespace, out: TextIO) -> int:
    """drain and undrain."""
    report = request(args.socket, args.command)
    what = "no new connections are let in" if report["draining"] else "new connections are let in"
    _print(args, out, report, lambda: print(f"{what}; {report['connections']} are there", file=out))
    return 0


def quarantine_command(args: argparse.Namespace, out: TextIO) -> int:
    from mpserverd.cli.views import quarantine_view  # noqa: PLC0415

    if args.action == "list":
        entries = request(args.socket, "quarantine")
        _print(args, out, entries, lambda: quarantine_view(entries, out))
        return 0
    if args.target is None:
        raise UsageError("name the client to release, as `quarantine list` shows it, or all")
    report = request(args.socket, "release", target=args.target)
    _print(args, out, report, lambda: print(f"released {', '.join(report['released']) or 'nobody'}", file=out))
    return 0


def leave_command(args: argparse.Namespace, out: TextIO) -> int:
    if args.if_restarting is not None:
        from mpserverd.supervisor.restarting import is_restarting  # noqa: PLC0415

        if not is_restarting(args.if_restarting):
            _print(args, out, {"left": False}, lambda: print(f"{args.if_restarting} is not being restarted", file=out))
            return 0
    report = request(args.socket, "leave")
    _print(args, out, report, lambda: print(f"left {report['connections']} connections to the next start", file=out))
    return 0


# -- shared


def _live(args: argparse.Namespace) -> LiveState:
    from mpserverd.arena.live import open_state  # noqa: PLC0415  (numpy)

    return open_state(args.socket)


def _print(args: argparse.Namespace, out: TextIO, report: Any, view: Callable[[], object]) -> None:
    if args.json:
        _print_json(out, report)
    else:
        view()


def _print_json(out: TextIO, report: Any) -> None:
    print(json.dumps(report, indent=2, allow_nan=False), file=out)


def _json_line(report: Any) -> str:
    return json.dumps(report, separators=(",", ":"), allow_nan=False)


def _print_line(out: TextIO, report: Any) -> None:
    print(_json_line(report), file=out, flush=True)


# -- arguments


def _rows(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=_count, default=50, metavar="N", help="lines of a table at most, 0: all (50)")


def _stats_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--watch", action="store_true", help="print again and again, until interrupted")
    parser.add_argument(
        "--interval", type=_interval, default=WATCH_INTERVAL_S, metavar="S", help="seconds between two (1)"
    )


def _ledger_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--streams", action="store_true", help="every stream in the table, not only those that are off")
    _rows(parser)


def _events_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--follow", "-f", action="store_true", help="go on with what comes, until interrupted")
    _rows(parser)


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--default", action="store_true", help="every option with its default, without a daemon")


def _target_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="CLIENT", help="an id, stream, peer or address as `clients` shows it, or all")


def _level_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("level", choices=[str(level) for level in LogLevel], metavar="LEVEL", help=", ".join(LogLevel))


def _quarantine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("list", "release"), metavar="ACTION", help="list, release")
    parser.add_argument("target", nargs="?", metavar="CLIENT", help="whom to release: an id, address or stream, or all")


def _leave_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--if-restarting", metavar="UNIT", help="do nothing unless systemd is restarting this unit")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number")
    return int(text)


def _interval(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds") from None
    if not WATCH_INTERVAL_S_MIN <= value <= 86400:
        raise argparse.ArgumentTypeError(f"{text} s must be from {WATCH_INTERVAL_S_MIN} to 86400")
    return value


_ROWS = (
    Command(
        "stats",
        stats_command,
        "totals, rates, errors, processes, spool and machine",
        "Print the state of the whole daemon.",
        add_arguments=_stats_arguments,
    ),
    Command(
        "clients",
        clients_command,
        "every connection: rates, gaps, latency, bytes at risk",
        "Print every connection.",
        add_arguments=_rows,
    ),
    Command("workers", workers_command, "every worker process", "Print every worker process."),
    Command(
        "ledger",
        ledger_command,
        "where every byte is; exit code 1 when it does not balance",
        "Print the accounts, and the equations between them.",
        add_arguments=_ledger_arguments,
    ),
    Command(
        "events",
        events_command,
        "what happened: starts, deaths, adoptions, reloads",
        "Print the latest events.",
        add_arguments=_events_arguments,
    ),
    Command(
        "check",
        check_command,
        "is the daemon healthy? exit code 1 when not",
        "Check that every process runs, the spool has room and the ledger holds.",
    ),
    Command(
        "config",
        config_command,
        "the settings in force, or the defaults",
        "Print the settings in force.",
        needs_daemon=False,
        add_arguments=_config_arguments,
    ),
    Command("kick", target_command, "end a connection", "End a connection.", add_arguments=_target_arguments),
    Command(
        "pause",
        target_command,
        "stop reading a connection; TCP pushes back",
        "Stop reading a connection for now.",
        add_arguments=_target_arguments,
    ),
    Command(
        "resume", target_command, "read it again", "Read a paused connection again.", add_arguments=_target_arguments
    ),
    Command("reload", reload_command, "take over the configuration file", "Read the configuration file again."),
    Command(
        "loglevel",
        loglevel_command,
        "what is logged from now on",
        "Change the level of what is logged, until the next reload.",
        add_arguments=_level_arguments,
    ),
    Command("drain", drain_command, "let no new connections in; the others go on", "Let no new connections in."),
    Command("undrain", drain_command, "let new connections in again", "Let new connections in again."),
    Command(
        "quarantine",
        quarantine_command,
        "clients that are refused because workers died on what they sent",
        "List the clients in quarantine, or let one in again.",
        add_arguments=_quarantine_arguments,
    ),
    Command(
        "leave",
        leave_command,
        "exit at once; everything waits in systemd's store for the next start",
        "Exit without a goodbye: connections, listeners and memory wait in systemd's descriptor store.",
        add_arguments=_leave_arguments,
    ),
)

COMMANDS: dict[str, Command] = {command.name: command for command in _ROWS}
