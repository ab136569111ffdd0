"""The mpserverctl program: parses a command line, runs one command, and leaves with its exit code.

Rules: commands are rows of a table (cli/ctl_commands.py, cli/ops_commands.py; cli/spool_commands.py for those that work
on a spool); every MpserverdError becomes one line ``mpserverctl: text`` and its exit code; Ctrl-C and a reader that
went away end it quietly. Nothing heavy is imported before it is known to be needed: a kick must not wait for numpy.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn, TextIO

from mpserverd.cli import ctl_commands, ops_commands
from mpserverd.errors import MpserverdError, UsageError
from mpserverd.version import VERSION

COMMANDS = {**ctl_commands.COMMANDS, **ops_commands.COMMANDS}
DEFAULT_SOCKET = "/run/mpserverd/control.sock"
EXIT_INTERRUPTED = 130
EXIT_READER_GONE = 141

EXIT_CODES = {
    0: "fine",
    1: 'the answer is "no": the ledger is off, the daemon is unhealthy or refused',
    2: "bad usage or configuration",
    3: "cannot reach the daemon",
    EXIT_INTERRUPTED: "interrupted by Ctrl-C",
    EXIT_READER_GONE: "whoever read the output went away",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``argv`` (default: the process's own); returns the exit code."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy would start threads that nobody needs
    words = list(sys.argv[1:] if argv is None else argv)
    out = sys.stdout
    try:
        code = run(words, out)
        out.flush()
        return code
    except MpserverdError as error:
        print(f"mpserverctl: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return EXIT_READER_GONE
    except OSError as error:
        print(f"mpserverctl: {error.filename or 'standard output'}: {error.strerror or error}", file=sys.stderr)
        return MpserverdError.exit_code
    finally:
        _flush_or_forget(out)


def _flush_or_forget(out: TextIO) -> None:
    """What cannot be written was complained of already; else the flush at exit does so once more, and sets the code."""
    try:
        out.flush()
    except OSError:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, out.fileno())
        os.close(devnull)


def run(words: Sequence[str], out: TextIO) -> int:
    """Parse and run one command. Raises MpserverdError; SystemExit for --help and usage errors."""
    parser = build_parser(spool=_first_word(words) not in COMMANDS)
    args = parser.parse_args(words)
    if args.command is None:
        parser.print_help(out)
        return UsageError.exit_code
    if args.spool is not None and args.command in COMMANDS and not COMMANDS[args.command].takes_spool:
        raise UsageError(f"--spool is for commands that read a spool; {args.command} asks the daemon")
    args.socket_named, args.socket = args.socket, args.socket or DEFAULT_SOCKET
    args.daemon_spool = lambda: _daemon_spool(args.socket, required=args.socket_named is not None)
    if args.command in COMMANDS:
        return COMMANDS[args.command].run(args, out)
    from mpserverd.cli import spool_commands  # noqa: PLC0415  (numpy and rich)

    return spool_commands.COMMANDS[args.command](args, out)


def build_parser(*, spool: bool = True) -> argparse.ArgumentParser:
    """``spool`` False leaves out the commands that work on files: importing them takes as long as a kick."""
    parser = _Parser(
        prog="mpserverctl",
        allow_abbrev=False,
        description="Ask and steer a running mpserverd, and read the streams that it stored.",
        epilog="exit codes: " + "; ".join(f"{code} {text}" for code, text in EXIT_CODES.items()),
    )
    parser.add_argument("--version", action="version", version=f"mpserverctl {VERSION}")
    _add_common(parser, socket_default=None, json_default=False)
    parser.add_argument("--spool", metavar="PATH", help="for commands that read a spool: its directory")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for command in COMMANDS.values():
        added = subparsers.add_parser(command.name, help=command.help, description=command.description)
        command.add_arguments(added)
    if spool:
        from mpserverd.cli import spool_commands  # noqa: PLC0415

        spool_commands.add_parsers(subparsers)
    for added in subparsers.choices.values():
        added.allow_abbrev = False  # a script must not break when an option is added
        _add_common(added, socket_default=argparse.SUPPRESS, json_default=argparse.SUPPRESS)
    return parser


class _Parser(argparse.ArgumentParser):
    """Usage errors are raised, so that they end like all others."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; try {self.prog} --help")


def _add_common(parser: argparse.ArgumentParser, socket_default: object, json_default: object) -> None:
    parser.add_argument(
        "--socket", metavar="PATH", default=socket_default, help=f"the daemon's control socket ({DEFAULT_SOCKET})"
    )
    parser.add_argument("--json", action="store_true", default=json_default, help="print JSON")


def _first_word(words: Sequence[str]) -> str | None:
    """The command, before anything is parsed; None where there is none."""
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word in ("--socket", "--spool"):
            skip = True
        elif not word.startswith("-"):
            return word
    return None


def _daemon_spool(socket_path: str, *, required: bool) -> str | None:
    """Where the running daemon keeps its streams. None when no daemon answers, unless the user named this one."""
    from mpserverd.control.client import request_state  # noqa: PLC0415

    try:
        facts, *fds = request_state(socket_path)
    except MpserverdError:
        if required:
            raise
        return None
    for fd in fds:
        os.close(fd)
    spool = facts.get("spool")
    return str(spool) if spool else None


if __name__ == "__main__":
    sys.exit(main())
