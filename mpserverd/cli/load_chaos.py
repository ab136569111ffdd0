"""``mpload chaos``: the command line of load/chaos.py. Events and figures go to standard output."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Callable
from enum import Enum
from typing import Any, TypeVar

from mpserverd.cli.load_options import Option, add_options, number
from mpserverd.load.chaos_plan import ChaosOptions, FaultKind, Habit

ALL_KINDS = ",".join(kind.value for kind in FaultKind)
ALL_HABITS = ",".join(habit.value for habit in Habit)

Word = TypeVar("Word", bound=Enum)


def words_of(kind: type[Word]) -> Callable[[str], tuple[Word, ...]]:
    """A parser of lists of an enum's words."""

    def parse(text: str) -> tuple[Word, ...]:
        words = [word.strip() for word in text.split(",") if word.strip()]
        try:
            return tuple(dict.fromkeys(kind(word) for word in words))
        except ValueError:
            choice = ",".join(each.value for each in kind)
            raise argparse.ArgumentTypeError(f"{text!r}: choose from {choice}") from None

    return parse


def some(parse: Callable[[str], tuple[Word, ...]]) -> Callable[[str], tuple[Word, ...]]:
    """The same, and at least one."""

    def parse_some(text: str) -> tuple[Word, ...]:
        words = parse(text)
        if not words:
            raise argparse.ArgumentTypeError("name at least one")
        return words

    return parse_some


CHAOS_OPTIONS: tuple[Option, ...] = (
    Option("--duration", "S", number(float, 1, 86_400), 30.0, "How long clients send and faults happen."),
    Option("--seed", "N", number(int, 0, 2**63 - 1), 1, "Chooses everything that is left to chance."),
    Option("--clients", "N", number(int, 1, 1_000), 8, "Connections at one time; packets of 16, 7, 24, 1500 bytes."),
    Option(
        "--rate",
        "PACKETS_PER_S",
        number(float, 0, 10**8),
        10_050.0,
        "Packets a second of each client, but at most 1 MiB a second; 0: flat out.",
    ),
    Option("--kill", "LIST", words_of(FaultKind), tuple(FaultKind), f"What is done: `{ALL_KINDS}`; all by default."),
    Option(
        "--habits", "LIST", some(words_of(Habit)), tuple(Habit), f"How clients behave: `{ALL_HABITS}`; all by default."
    ),
    Option("--kills", "N", number(int, 0, 10**6), None, "How many such faults; two a second by default."),
    Option("--directory", "DIR", pathlib.Path, None, "Where the daemon's directory is made, instead of TMPDIR."),
    Option("--keep", "", None, False, "Leave the daemon's directory where it is: spool, log, configuration."),
    Option("--json", "FILE", str, None, "Write the figures as one JSON object; `-`: standard output, without lines."),
    Option("--quiet", "", None, False, "No line for each event."),
)


def chaos_parser(subparsers: Any) -> argparse.ArgumentParser:
    summary = "torment a daemon of its own, then compare every byte that was sent with every byte that is stored"
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "chaos", help=summary, description=summary.capitalize() + "."
    )
    add_options(parser, CHAOS_OPTIONS)
    return parser


def run_chaos(arguments: argparse.Namespace) -> int:
    """The command ``chaos``; its exit code."""
    from mpserverd.load.chaos import Chaos  # noqa: PLC0415 - `run` must not wait for what only this needs

    options = ChaosOptions(
        duration_s=arguments.duration,
        seed=arguments.seed,
        clients=arguments.clients,
        rate=arguments.rate,
        kinds=arguments.kill,
        habits=arguments.habits,
        faults=arguments.kills,
    )
    silent = arguments.quiet or arguments.json == "-"
    say = _silence if silent else _say
    with Chaos(options, say=say, directory=arguments.directory, keep=arguments.keep) as chaos:
        report = chaos.run()
    text = json.dumps(report.as_json(), indent=2)
    if arguments.json == "-":
        print(text)
        return 1 if report.failures else 0
    if arguments.json is not None:
        pathlib.Path(arguments.json).write_text(text + "\n")
    for line in report.lines():
        print(line)
    return 1 if report.failures else 0


def _say(text: str) -> None:
    print(text)
    sys.stdout.flush()  # one line an event is worth nothing when it comes at the end


def _silence(_: str) -> None:
    pass
