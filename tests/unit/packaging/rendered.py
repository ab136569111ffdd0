"""What packaging/generate makes of the code: once for all tests of a module."""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys

from mpserverd.cli import ctl, daemon, load

ROOT = pathlib.Path(__file__).resolve().parents[3]
PARSERS = {"mpserverd": daemon._parser(), "mpserverctl": ctl.build_parser(), "mpload": load.make_parser()}


def render(what: str, directory: pathlib.Path) -> pathlib.Path:
    """``what`` is ``manual`` or ``completion``."""
    script = ROOT / "packaging" / "generate" / f"{what}.py"
    subprocess.run([sys.executable, script, directory], check=True, cwd="/", timeout=60)
    return directory


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """By name; "" is what stands before any command."""
    found = {"": parser}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= action.choices
    return found


def option_names(parser: argparse.ArgumentParser) -> set[str]:
    return {name for action in parser._actions for name in action.option_strings}
