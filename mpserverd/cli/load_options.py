"""Options of ``mpload``'s commands: rows of tables, which make the parser and which the manual is held to."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Option:
    """One option. ``parse`` None: a flag. A default that is a tuple is left to the help text."""

    name: str
    metavar: str
    parse: Callable[[str], Any] | None
    default: Any
    help: str


def number(kind: Callable[[str], Any], low: float, high: float) -> Callable[[str], Any]:
    """A parser of numbers within bounds, both included."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except (ValueError, ZeroDivisionError):
            raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of bounds, {low:,} to {high:,} are allowed")
        return value

    return parse


def add_options(parser: argparse.ArgumentParser, options: Iterable[Option]) -> None:
    """Each row as an option of ``parser``, its default in the help."""
    for option in options:
        text = option.help.replace("`", "").replace("%", "%%")
        if option.parse is None:
            parser.add_argument(option.name, action="store_true", help=text)
            continue
        shown = "" if option.default is None or isinstance(option.default, tuple) else f" (default {option.default})"
        parser.add_argument(
            option.name, metavar=option.metavar, type=option.parse, default=option.default, help=text + shown
        )
