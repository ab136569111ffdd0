"""``mpload``: many load clients in few processes, paced or flat out, with figures to judge a server by.

Rules: each option is one row of RUN_OPTIONS, each exit code one row of EXIT_CODES; docs/mpload.md is held to both by a
test. Figures go to standard output, progress and errors to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

# one thread is all that filling packets needs, and a thread pool would be copied by every fork
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from rich.console import Console

from mpserverd.cli.load_chaos import chaos_parser, run_chaos
from mpserverd.cli.load_options import Option, add_options, number
from mpserverd.errors import MpserverdError, UsageError
from mpserverd.limits import PACKET_BYTES_MAX
from mpserverd.load.crew import Crew, Outcome
from mpserverd.load.daemon_figures import Ask, DaemonFigures, collect, control_client
from mpserverd.load.expected import ExpectedPackets
from mpserverd.load.progress import ProgressView
from mpserverd.load.results import Thresholds, misses, summarize
from mpserverd.load.scenario import PROTOCOLS, Scenario, parse_source_addresses
from mpserverd.load.spool_view import open_spool
from mpserverd.load.tables import print_summary
from mpserverd.load.verify import Verification, verify
from mpserverd.load.verify_mps import verify_mps
from mpserverd.version import VERSION

VERIFY_LINES_MAX = 50
FILE_COLUMNS = 140
PORTS = {"raw": 8888, "mps": 8889}

EXIT_CODES = {
    0: "everything was sent as asked (and acknowledged, with `mps`; and found again, with `--verify`)",
    1: "a threshold was missed, connections were lost, packets not acknowledged, or the spool holds something else",
    2: "bad usage: unknown option, impossible value, unknown host name",
    3: "not one client could connect",
}


def source_addresses(text: str) -> tuple[str, ...]:
    try:
        return parse_source_addresses(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def protocol(text: str) -> str:
    if text not in PROTOCOLS:
        raise argparse.ArgumentTypeError(f"{text!r} is not offered; {' and '.join(PROTOCOLS)} are")
    return text


RUN_OPTIONS: tuple[Option, ...] = (
    Option("--host", "HOST", str, "127.0.0.1", "Name or address of the server."),
    Option("--port", "PORT", number(int, 1, 65_535), None, "Its port (8888; for `mps` 8889)."),
    Option(
        "--protocol",
        "NAME",
        protocol,
        "raw",
        "`raw`: packets from the first byte on, nothing comes back. `mps`: acknowledged, and resumed after a break.",
    ),
    Option(
        "--client-prefix",
        "PREFIX",
        str,
        None,
        "`mps`: client N is called PREFIX-N (without it, `mpload-` and the seed).",
    ),
    Option("--clients", "N", number(int, 1, 100_000), 10, "Connections, each with packets of its own."),
    Option(
        "--rate",
        "PACKETS_PER_S",
        number(Fraction, 0, 10**9),
        Fraction(10_050),
        "Packets a second of each client; 0: flat out.",
    ),
    Option("--packet-size", "BYTES", number(int, 1, PACKET_BYTES_MAX), 16, "Size of a packet."),
    Option(
        "--batch", "PACKETS", number(int, 1, 1_000_000), None, "Packets that are sent together (804; flat out: 1 MiB)."
    ),
    Option("--duration", "S", number(float, 0.001, 10**7), None, "How long to send (30, unless `--packets` is given)."),
    Option("--packets", "N", number(int, 1, 10**15), None, "Packets of each client; whichever limit comes first ends."),
    Option(
        "--processes", "N", number(int, 1, 1024), None, "Sender processes (as many as cores; never more than clients)."
    ),
    Option(
        "--source-addresses",
        "LIST",
        source_addresses,
        (),
        "Local addresses that the clients take in turn: `127.0.0.1-127.0.0.9`, `10.0.0.1,10.0.0.7`.",
    ),
    Option("--seed", "N", number(int, 0, 2**63 - 1), 1, "Chooses the filler bytes and the pauses before reconnects."),
    Option("--send-buffer", "BYTES", number(int, 0, 2**30), 131_072, "Socket send buffer; 0: let the system choose."),
    Option("--connect-timeout", "S", number(float, 0.01, 3600), 5.0, "An attempt to connect fails after this long."),
    Option(
        "--drain-timeout",
        "S",
        number(float, 0.01, 3600),
        10.0,
        "After the end of the schedule: how long late packets may take. Without one: how long nothing may move.",
    ),
    Option(
        "--close-timeout",
        "S",
        number(float, 0.01, 3600),
        10.0,
        "How long to wait for the last acknowledgements (`mps`) and for the server's close.",
    ),
    Option("--min-rate-percent", "P", number(float, 0, 100), 99.0, "Below this share of the target rate: exit code 1."),
    Option("--max-reconnects", "N", number(int, 0, 10**9), 0, "With more lost connections than this: exit code 1."),
    Option(
        "--verify",
        "SPOOL",
        pathlib.Path,
        None,
        "Afterwards find each connection (`mps`: client) in this spool; compare.",
    ),
    Option("--verify-timeout", "S", number(float, 0, 86_400), 30.0, "How long to wait until the spool holds all."),
    Option("--control-socket", "PATH", str, None, "Ask the daemon for `latency_ms` and what it received and stored."),
    Option("--json", "FILE", str, None, "Write the figures as one JSON object; `-`: standard output, without tables."),
    Option("--quiet", "", None, False, "No progress, no tables."),
)


def run_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    summary = "send packets from many clients and report what came of it"
    parser: argparse.ArgumentParser = subparsers.add_parser("run", help=summary, description=summary.capitalize() + ".")
    add_options(parser, RUN_OPTIONS)
    return parser


def make_scenario(arguments: argparse.Namespace) -> Scenario:
    """Raises UsageError."""
    try:
        port = arguments.port or PORTS[arguments.protocol]
        found = socket.getaddrinfo(arguments.host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {arguments.host}: {error}") from None
    duration_s = arguments.duration
    if duration_s is None and arguments.packets is None:
        duration_s = 30.0
    return Scenario(
        targets=tuple((int(family), address) for family, _, _, _, address in found),
        protocol=arguments.protocol,
        client_prefix=arguments.client_prefix,
        clients=arguments.clients,
        rate=arguments.rate,
        packet_size=arguments.packet_size,
        batch=arguments.batch or 0,
        duration_s=duration_s,
        packets=arguments.packets,
        source_addresses=arguments.source_addresses,
        seed=arguments.seed,
        send_buffer_bytes=arguments.send_buffer,
        connect_timeout_s=arguments.connect_timeout,
        drain_timeout_s=arguments.drain_timeout,
        close_timeout_s=arguments.close_timeout,
        hashing=arguments.verify is not None,
    )


def run(arguments: argparse.Namespace) -> int:
    """The command ``run``; its exit code."""
    scenario = make_scenario(arguments)
    ask = None if arguments.control_socket is None else control_client(arguments.control_socket)
    before = {} if ask is None else ask().totals  # what cannot be had afterwards is said before
    if arguments.verify is not None:
        open_spool(arguments.verify)
    processes = min(arguments.processes or os.cpu_count() or 1, scenario.clients)
    outcome, figures = _send(scenario, processes, arguments, ask, before)
    verification = None if arguments.verify is None else _verify(scenario, outcome, arguments)
    report = summarize(scenario, outcome, processes, figures=figures, verification=verification)
    thresholds = Thresholds(arguments.min_rate_percent, arguments.max_reconnects)
    report["misses"] = misses(scenario, outcome, thresholds, verification)
    _publish(arguments, report, outcome)
    for line in report["misses"]:
        print(f"mpload: {line}", file=sys.stderr)
    return 1 if report["misses"] else 0


def _send(
    scenario: Scenario, processes: int, arguments: argparse.Namespace, ask: Ask | None, before: Mapping[str, int]
) -> tuple[Outcome, DaemonFigures | None]:
    figures: list[DaemonFigures] = []

    def before_close(sent_bytes: dict[str, int]) -> None:
        if ask is None:
            return
        try:
            figures.append(collect(ask, sent_bytes, before))
        except MpserverdError as error:
            print(f"mpload: --control-socket: {error}", file=sys.stderr)  # the run is done, its figures are good

    # senders first: a fork after the start of the live view would copy its thread's locks
    with (
        Crew(scenario, processes) as crew,
        _stopping(crew),
        ProgressView(Console(stderr=True), scenario, quiet=arguments.quiet) as view,
    ):
        return crew.run(view.show, before_close), figures[0] if figures else None


def _verify(scenario: Scenario, outcome: Outcome, arguments: argparse.Namespace) -> Verification:
    expected = ExpectedPackets(scenario, outcome.started_unix_ns)
    compare = verify_mps if scenario.protocol == "mps" else verify
    verification = compare(open_spool(arguments.verify), outcome.clients, expected, arguments.verify_timeout)
    for line in (*verification.mismatches, *verification.notes)[:VERIFY_LINES_MAX]:
        print(f"mpload: {line}", file=sys.stderr)
    hidden = len(verification.mismatches) + len(verification.notes) - VERIFY_LINES_MAX
    if hidden > 0:
        print(f"mpload: {hidden} more lines of this kind are in --json", file=sys.stderr)
    return verification


@contextlib.contextmanager
def _stopping(crew: Crew) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run in order; the second one at once."""

    def on_signal(number: int, _: object) -> None:
        crew.request_stop()
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _publish(arguments: argparse.Namespace, report: dict[str, Any], outcome: Outcome) -> None:
    text = json.dumps(report, indent=2) + "\n"
    if arguments.json == "-":
        sys.stdout.write(text)
    elif arguments.json is not None:
        pathlib.Path(arguments.json).write_text(text)
    if not arguments.quiet and arguments.json != "-":
        print_summary(_table_console(), report, outcome.clients)


def _table_console() -> Console:
    """A file or a pipe has no width; tables are cut to 80 columns there unless told otherwise."""
    return Console() if sys.stdout.isatty() else Console(width=FILE_COLUMNS)


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {"run": run, "chaos": run_chaos}
DEFAULT_COMMAND = "run"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mpload",
        description="Load clients for a packet server. Without a command it is `run`.",
        epilog="Exit codes: " + "; ".join(f"{code} {text.replace('`', '')}" for code, text in EXIT_CODES.items()) + ".",
    )
    parser.add_argument("--version", action="version", version=f"mpload {VERSION}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    run_parser(subparsers)
    chaos_parser(subparsers)
    return parser


def with_default_command(words: Sequence[str]) -> list[str]:
    """``mpload --port 1`` is ``mpload run --port 1``."""
    if words and (words[0] in COMMANDS or words[0] in ("-h", "--help", "--version")):
        return list(words)
    return [DEFAULT_COMMAND, *words]


def main(words: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    arguments = make_parser().parse_args(with_default_command(sys.argv[1:] if words is None else words))
    try:
        return COMMANDS[arguments.command](arguments)
    except MpserverdError as error:
        print(f"mpload: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"mpload: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
