"""docs/mpserverctl.md is held to the parser, the reports and the table of counters: nothing more, nothing less."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mpserverd.arena.clients import clients
from mpserverd.arena.counters import COUNTERS, Role
from mpserverd.arena.health import health
from mpserverd.arena.ledger import EQUATIONS
from mpserverd.arena.report import ledger, stats, workers
from mpserverd.cli import ctl
from mpserverd.ops import tune
from mpserverd.ops.backup import Count
from mpserverd.ops.doctor import CHECKS
from mpserverd.ops.findings import report
from mpserverd.ops.plan import Demand, plan
from mpserverd.ops.site import Site
from mpserverd.streams.export import ExportCount
from mpserverd.streams.listing import StreamInfo
from mpserverd.streams.verify import StreamCheck
from tests.unit.arena.live_tables import Tables

MANUAL = Path(__file__).resolve().parents[3] / "docs" / "mpserverctl.md"
TEXT = MANUAL.read_text()
PARSER = ctl.build_parser()
COMMON = {"--socket", "--json", "-h", "--help"}


def sections(level: int) -> dict[str, str]:
    """Headings of that level, and everything up to the next one of that level or above."""
    mark = "#" * level
    found = re.split(rf"^{mark} (.+)$", re.sub(rf"^#{{1,{level - 1}}} .*$", f"{mark} -", TEXT, flags=re.M), flags=re.M)
    return {title: body for title, body in zip(found[1::2], found[2::2], strict=True) if title != "-"}


def first_cells(text: str, header: str) -> list[str]:
    """What stands in backticks in the first column of the tables with that header."""
    found = []
    for table in re.findall(rf"^\| {header} \|.*\n\|[-|]+\|\n((?:\|.*\n)*)", text + "\n", flags=re.M):
        for line in table.splitlines():
            found += re.findall(r"`([^`]+)`", line.split(" | ")[0])
    return found


def subparsers() -> dict[str, argparse.ArgumentParser]:
    action = next(one for one in PARSER._actions if isinstance(one, argparse._SubParsersAction))
    return dict(action.choices)


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


COMMAND_SECTIONS = {title.strip("`"): body for title, body in sections(3).items() if title.startswith("`")}


def test_every_command_has_its_section_and_no_other_has_one() -> None:
    assert set(COMMAND_SECTIONS) == set(subparsers())


@pytest.mark.parametrize("command", sorted(subparsers()))
def test_the_options_of_a_command_are_those_of_the_parser(command: str) -> None:
    documented = {cell.split()[0] for cell in first_cells(COMMAND_SECTIONS[command].split("#### ")[0], "option")}
    assert documented == options_of(subparsers()[command]) - COMMON


@pytest.mark.parametrize("command", sorted(subparsers()))
def test_every_argument_of_a_command_is_named(command: str) -> None:
    for action in subparsers()[command]._actions:
        if not action.option_strings:
            assert f"{action.metavar}" in COMMAND_SECTIONS[command]


def test_the_options_of_the_program_are_those_of_the_parser() -> None:
    head = TEXT.split("## Commands that ask")[0]
    assert {cell.split()[0] for cell in first_cells(head, "option")} == options_of(PARSER)


def test_exit_codes_are_those_of_the_program() -> None:
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", TEXT, flags=re.M)
    assert {int(code): text for code, text in rows} == ctl.EXIT_CODES


def test_counters_are_those_of_the_table() -> None:
    rows = re.findall(r"^\| (\w+) \| `(\w+)` \| ([^|]+) \| (.+) \|$", TEXT, flags=re.M)
    assert rows == [(c.role.value, c.name, c.unit + (", gauge" if c.gauge else ""), c.help) for c in COUNTERS]


def test_equations_are_those_of_the_ledger() -> None:
    for equation in EQUATIONS:
        assert re.search(re.escape(equation.text).replace(r"\ ", " +"), TEXT), equation.text


def test_checks_are_those_of_the_doctor() -> None:
    section = COMMAND_SECTIONS["doctor"].split("#### ")[0].split("| check |")[1]
    rows = re.findall(r"^\| ([^|`]+) \| (.+) \|$", section, flags=re.M)
    assert rows == [(check.name, check.looks_at) for check in CHECKS]


# -- JSON

JSON_TITLE = "JSON of "
JSON_SECTIONS = {title.removeprefix(JSON_TITLE): body for title, body in sections(4).items()}


@pytest.fixture(scope="module")
def tables() -> Iterator[Tables]:
    with Tables() as made:
        made.connect(0, made.open(0))
        made.connect(1, None)
        yield made


def named(role: Role) -> set[str]:
    return {counter.name for counter in COUNTERS if counter.role is role}


def reports(tables: Tables) -> dict[str, set[str]]:
    """The fields of every object that is printed, by the title of its section."""
    live = tables.live()
    whole = stats(live)
    accounts = ledger(live, every_stream=True)
    checked = dataclasses.fields(StreamCheck)
    return {
        "`stats`": set(whole),
        **{
            f"`{name}`": set(whole[name])
            for name in ("errors_by_reason", "closed_by_reason", "buffers", "spool", "host")
        },
        "`listeners`": set(whole["listeners"][0]),
        "`storer`": set(whole["storer"]) - named(Role.STORER),
        "`workers`": set(workers(live)[0]) - named(Role.WORKER),
        "`clients`": set().union(*clients(live)),
        "`ledger`": set(accounts),
        "an account": set(accounts["streams"][0]),
        "`check`": set(health(live)),
        "`events`": {"time", "unix_ns", "number", "source", "kind"},
        "`kick`, `pause` and `resume`": {"connections"},
        "`reload`": {"changed", "needs_restart"},
        "`streams`": {field.name for field in dataclasses.fields(StreamInfo)},
        "`export`": {"output", "format", *(field.name for field in dataclasses.fields(ExportCount))},
        "`verify`": {"fine", "totals", "findings", "next_step", "streams"},
        "`doctor`": set(report(Site(), ())),
        "`tune`": set(tune.report([], [])),
        "`plan`": set(plan(Demand(10, 10_050, 16, 1))),
        "`support-bundle`": {"schema_version", "output", "made", "version", "members", "left_out"},
        "`backup`": {
            *("schema_version", "fine", "output", "spool", "taken", "checked_bytes", "unchecked_bytes", "findings"),
            *(field.name for field in dataclasses.fields(Count)),
        },
        "an entry of `verify`": {"fine", *(field.name for field in checked)},
    }


def test_every_object_of_json_has_its_section_and_no_other_has_one(tables: Tables) -> None:
    assert set(JSON_SECTIONS) == set(reports(tables))


@pytest.mark.parametrize("title", sorted(JSON_SECTIONS))
def test_the_fields_of_an_object_are_those_that_are_printed(title: str, tables: Tables) -> None:
    fields = first_cells(JSON_SECTIONS[title], "field")
    assert len(fields) == len(set(fields))
    assert set(fields) == reports(tables)[title]


def test_every_client_has_the_same_fields(tables: Tables) -> None:
    assert len({frozenset(client) for client in clients(tables.live())}) == 1


def test_nested_fields_are_named_in_the_text(tables: Tables) -> None:
    def nested(value: Any) -> Iterator[str]:
        if isinstance(value, list):
            for item in value:
                yield from nested(item)
        elif isinstance(value, dict):
            yield from value
            for item in value.values():
                yield from nested(item)

    live = tables.live()
    listeners = {"1", *(role.value for role in Role)}
    printed = json.loads(json.dumps([stats(live), clients(live), ledger(live, every_stream=True), health(live)]))
    for name in set(nested(printed)) - listeners:
        assert f"`{name}`" in TEXT, name
