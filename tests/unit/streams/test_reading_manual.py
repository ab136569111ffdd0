"""The manual of the reader says what is true."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
from pathlib import Path

import pytest
from spool_writer import SAMPLE16, SpoolWriter, samples

from mpserverd.cli.spool_commands import COMMANDS, READ_FORMATS, add_parsers
from mpserverd.streams.export import FORMATS
from mpserverd.streams.listing import StreamInfo
from mpserverd.streams.times import UNITS_S

MANUAL = (Path(__file__).parents[3] / "docs" / "reading.md").read_text()


@pytest.mark.parametrize("words", [*FORMATS, *READ_FORMATS, *UNITS_S, *StreamInfo.__dataclass_fields__])
def test_every_format_unit_and_field_is_in_the_manual(words: str) -> None:
    assert f"`{words}`" in MANUAL


def test_every_command_and_option_is_in_the_manual() -> None:
    subparsers = argparse.ArgumentParser().add_subparsers()
    add_parsers(subparsers)
    assert set(subparsers.choices) == set(COMMANDS)
    for name, parser in subparsers.choices.items():
        assert f"**`{name} " in MANUAL
        options = re.findall(r"--?[a-z][a-z-]*", parser.format_usage())
        assert not [option for option in options if option != "-h" and option not in MANUAL]


def test_the_example_in_python_runs(spool: SpoolWriter) -> None:
    spool.add("press-7", samples(1100), layout=SAMPLE16, holes=[(16160, 16320, "dropped")])
    (code,) = re.findall(r"```python\n(.*?)```", MANUAL, re.DOTALL)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code.replace("/var/lib/mpserverd", str(spool.path)), {})
    assert "missing: dropped range(1010, 1020)" in out.getvalue()
    assert out.getvalue().endswith("1020 1059.5\n")
