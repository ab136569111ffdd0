"""The three programs as their own argument parsers describe them: what manual pages and completions are made from.

Nothing is described here: a new option or command of a program is in the manual and completed after the next build.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from mpserverd.cli import ctl, daemon, load  # noqa: E402

PATH_METAVARS = ("FILE", "PATH", "SPOOL")
DIRECTORY_METAVARS = ("SPOOL",)


@dataclasses.dataclass(frozen=True)
class Argument:
    """An option, or an operand when ``names`` is empty. ``metavar`` is "" for a flag."""

    names: tuple[str, ...]
    metavar: str
    help: str
    choices: tuple[str, ...]
    many: bool

    @property
    def takes_path(self) -> bool:
        return self.metavar in PATH_METAVARS


@dataclasses.dataclass(frozen=True)
class Command:
    """``name`` is "" for what a program does without a command."""

    name: str
    help: str
    description: str
    arguments: tuple[Argument, ...]

    @property
    def options(self) -> tuple[Argument, ...]:
        return tuple(argument for argument in self.arguments if argument.names)

    @property
    def operands(self) -> tuple[Argument, ...]:
        return tuple(argument for argument in self.arguments if not argument.names)


@dataclasses.dataclass(frozen=True)
class Program:
    """``default`` names the command that is meant when none is given, "" where there is none."""

    name: str
    description: str
    own: Command
    commands: tuple[Command, ...]
    default: str = ""


def programs() -> dict[str, Program]:
    found = [
        _program(daemon._parser()),
        _program(ctl.build_parser()),
        _program(load.make_parser(), load.DEFAULT_COMMAND),
    ]
    return {program.name: program for program in found}


def _program(parser: argparse.ArgumentParser, default: str = "") -> Program:
    commands = [
        _command(name, help_text, sub)
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for (name, sub), help_text in zip(action.choices.items(), _helps(action), strict=True)
    ]
    return Program(parser.prog, parser.description or "", _command("", "", parser), tuple(commands), default)


def _helps(action: argparse._SubParsersAction[argparse.ArgumentParser]) -> list[str]:
    return [pseudo.help or "" for pseudo in action._choices_actions]


def _command(name: str, help_text: str, parser: argparse.ArgumentParser) -> Command:
    arguments = [_argument(a) for a in parser._actions if not isinstance(a, argparse._SubParsersAction)]
    return Command(name, help_text, parser.description or "", tuple(arguments))


def _argument(action: argparse.Action) -> Argument:
    flag = action.nargs == 0
    choices = tuple(str(getattr(choice, "value", choice)) for choice in action.choices or ())
    metavar = "" if flag else str(action.metavar or "|".join(choices) or action.dest.upper())
    text = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
    if isinstance(action, argparse._HelpAction):
        text = "Show help, and leave."
    elif isinstance(action, argparse._VersionAction):
        text = "Show the version, and leave."
    names = tuple(sorted(action.option_strings, key=len))
    return Argument(names, metavar, text, choices, action.nargs in ("*", "+"))
