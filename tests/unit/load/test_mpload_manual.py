"""docs/mpload.md has each option, exit code and field, and no others."""

from __future__ import annotations

import pathlib
import re

import pytest

from mpserverd.cli.load import COMMANDS, EXIT_CODES, RUN_OPTIONS, main, make_parser, with_default_command
from mpserverd.cli.load_chaos import CHAOS_OPTIONS
from mpserverd.cli.load_options import Option
from mpserverd.load.chaos_plan import ChaosOptions
from mpserverd.load.chaos_report import ChaosReport
from mpserverd.load.crew import Outcome
from mpserverd.load.daemon_figures import LEDGER_FIELDS
from mpserverd.load.link import ClientResult, ConnectionRecord
from mpserverd.load.results import summarize
from mpserverd.load.scenario import Scenario

MANUAL = (pathlib.Path(__file__).resolve().parents[3] / "docs" / "mpload.md").read_text()


def section(title: str) -> str:
    return MANUAL.split(f"\n## {title}\n", maxsplit=1)[1].split("\n## ", maxsplit=1)[0]


def option_row(option: Option) -> str:
    unsaid = option.default is None or option.default is False or isinstance(option.default, tuple)
    shown = "" if unsaid else f"{option.default}"
    name = f"{option.name} {option.metavar}".strip()
    return f"| `{name}` | {shown} | {option.help} |"


def test_the_manual_has_each_option_with_its_default_and_meaning() -> None:
    rows = [line for line in section("Options of `run`").splitlines() if line.startswith("| `")]
    assert rows == [option_row(option) for option in RUN_OPTIONS]


def test_the_manual_has_each_option_of_chaos() -> None:
    rows = [line for line in section("Kill it and look: `chaos`").splitlines() if line.startswith("| `--")]
    assert rows == [option_row(option) for option in CHAOS_OPTIONS]


def test_the_manual_has_each_figure_of_chaos() -> None:
    named = set(re.findall(r"`([a-z_0-9]+)`", section("Figures of `chaos`")))
    assert set(ChaosReport(ChaosOptions()).as_json()) <= named


def test_the_manual_has_each_exit_code() -> None:
    rows = [line for line in section("Exit codes").splitlines() if re.match(r"\| \d", line)]
    assert rows == [f"| {code} | {text} |" for code, text in EXIT_CODES.items()]


def test_the_manual_has_each_field_of_the_report() -> None:
    text = section("Figures: `--json`")
    record = ConnectionRecord("127.0.0.1:1", 0, 0)
    client = ClientResult(0, 0, 0, 0, 1.0, 0, {}, 0, [record])
    report = summarize(Scenario(((2, ("127.0.0.1", 1)),)), Outcome([client]), 1) | {"misses": []}
    fields = {*report, *report["per_client"][0], *vars(record)}
    named = set(re.findall(r"`([a-z_0-9]+)`", text))
    assert fields <= named
    inner = {"p50", "p99", "p999", "max", *report["cpu"], *LEDGER_FIELDS, "stored_packets", "mismatches", "notes"}
    words = {"raw", "mps", "durable", "stored", "mixed"}
    assert named - fields - words <= inner and set(LEDGER_FIELDS) <= named


def test_the_manual_names_each_option_that_it_speaks_of() -> None:
    options = {option.name for option in (*RUN_OPTIONS, *CHAOS_OPTIONS)}
    assert set(re.findall(r"--[a-z][a-z-]+", MANUAL)) <= options


def test_the_parser_is_made_of_the_rows(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["run", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert all(option.name in text for option in RUN_OPTIONS)
    assert list(COMMANDS) == ["run", "chaos"]


def test_run_is_the_default_command() -> None:
    assert with_default_command(["--port", "1"]) == ["run", "--port", "1"]
    assert with_default_command([]) == ["run"]
    assert with_default_command(["run"]) == ["run"]
    assert with_default_command(["--version"]) == ["--version"]
    assert make_parser().parse_args(["run"]).clients == 10
