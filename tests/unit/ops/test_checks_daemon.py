"""Configuration, processes, storer and ledger, each broken once in real tables."""

from __future__ import annotations

import numpy as np
import pytest

from mpserverd.arena.counters import Role, column
from mpserverd.arena.state import STORER_SLOT, Str
from mpserverd.cli import ctl
from mpserverd.cli import daemon as cli_daemon
from mpserverd.config.load import load
from mpserverd.config.schema import Config
from mpserverd.errors import ConfigError
from mpserverd.ops import checks_daemon
from mpserverd.ops.doctor import CHECKS, diagnose
from mpserverd.ops.findings import Check, Finding, Level, report
from mpserverd.ops.site import DEFAULT_CONFIG, Site
from tests.unit.arena.live_tables import Tables
from tests.unit.ops.fake_machine import Machine, levels, only


@pytest.fixture
def live(machine: Machine, tables: Tables) -> Site:
    tables.facts["workers"] = [{**worker, "restarts": 0} for worker in tables.facts["workers"]]
    machine.site.live = tables.live()
    return machine.site


# -- configuration


def test_every_fault_of_the_configuration_is_a_fault(machine: Machine) -> None:
    machine.config_path.write_text("[server]\nworkerz = 1\nmax_clients = 0\n")
    machine.site.config = None
    with pytest.raises(ConfigError) as caught:
        load(machine.config_path)
    machine.site.config_faults = caught.value.faults
    found = list(checks_daemon.configuration(machine.site))
    assert levels(found) == [Level.FAULT, Level.FAULT, Level.NOTE]
    assert "--check-config" in found[0].command


def test_a_file_that_differs_from_the_running_daemon_is_a_note_that_names_the_keys(machine: Machine) -> None:
    machine.site.config = Config()
    machine.site.running = Config()
    assert only(checks_daemon.configuration(machine.site)).level is Level.OK
    machine.configure("[server]\nworkers = 7\n")
    found = only(checks_daemon.configuration(machine.site))
    assert found.level is Level.NOTE
    assert "server.workers" in found.text
    assert "reload" in found.command


# -- processes


def test_a_daemon_that_is_well_is_fine(live: Site) -> None:
    assert only(checks_daemon.daemon(live)).level is Level.OK


@pytest.mark.parametrize("state", ["stuck", "given-up", "backoff", "dead"])
def test_a_child_that_does_not_run_is_a_fault(live: Site, tables: Tables, state: str) -> None:
    tables.facts["workers"][0]["state"] = state
    found = only(checks_daemon.daemon(live))
    assert found.level is Level.FAULT
    assert f"worker-0 is {state}" in found.text


def test_children_that_were_replaced_are_a_note_and_often_a_warning(live: Site, tables: Tables) -> None:
    tables.facts["workers"][1]["restarts"] = 1
    assert levels(checks_daemon.daemon(live)) == [Level.NOTE, Level.OK]
    tables.facts["workers"][1]["restarts"] = 9
    assert levels(checks_daemon.daemon(live)) == [Level.WARNING, Level.OK]


def test_no_daemon_is_a_note_and_a_failed_service_a_fault(machine: Machine) -> None:
    assert only(checks_daemon.daemon(machine.site)).level is Level.NOTE
    machine.site.unit = {"ActiveState": "failed", "Result": "exit-code"}
    found = only(checks_daemon.daemon(machine.site))
    assert found.level is Level.FAULT
    assert "journalctl" in found.command
    machine.site.unit = {"ActiveState": "active"}
    assert only(checks_daemon.daemon(machine.site)).level is Level.FAULT


# -- storer


def set_storer(tables: Tables, name: str, value: int) -> None:
    tables.state.slots[STORER_SLOT, column(Role.STORER, name)] = value


def test_a_storer_that_is_quick_is_fine(live: Site) -> None:
    assert only(checks_daemon.storer(live)).level is Level.OK


@pytest.mark.parametrize(
    ("counter", "value", "level"),
    [
        ("cycle_ns", 3_000_000_000, Level.WARNING),
        ("write_errors", 1, Level.WARNING),
        ("segments_aside", 1, Level.WARNING),
        ("full", 1, Level.FAULT),
    ],
)
def test_a_storer_in_trouble_is_named(live: Site, tables: Tables, counter: str, value: int, level: Level) -> None:
    set_storer(tables, counter, value)
    found = only(checks_daemon.storer(live))
    assert found.level is level
    assert found.command


# -- ledger


def test_a_ledger_that_balances_is_fine(live: Site, tables: Tables) -> None:
    tables.open(0).receive(160)
    assert only(checks_daemon.ledger(live)).level is Level.OK


def test_a_ledger_that_is_off_is_a_fault(live: Site, tables: Tables) -> None:
    tables.open(0).receive(160)
    tables.state.streams[0, Str.SOCKET] += np.uint64(1)
    found = only(checks_daemon.ledger(live))
    assert found.level is Level.FAULT
    assert found.command == "mpserverctl ledger"


def test_dropped_bytes_are_a_warning(live: Site, tables: Tables) -> None:
    stream = tables.open(0)
    stream.receive(4096 * 8)
    assert stream.drop()
    found = list(checks_daemon.ledger(live))
    assert levels(found) == [Level.WARNING, Level.OK]
    assert "dropped bytes" in found[0].text


# -- the report


def test_the_usual_files_are_those_of_the_programs() -> None:
    assert DEFAULT_CONFIG == cli_daemon.DEFAULT_CONFIG
    assert Site().socket_path == ctl.DEFAULT_SOCKET


def test_findings_come_worst_first() -> None:
    rows = [Check(level.value, "", lambda _, level=level: [Finding(level, "x")]) for level in reversed(Level)]  # type: ignore[misc]
    found = report(Site(), rows)
    assert [finding["level"] for finding in found["findings"]] == ["fault", "warning", "note", "ok"]
    assert found["fine"] is False
    assert found["counts"] == {"fault": 1, "warning": 1, "note": 1, "ok": 1}


def test_what_cannot_be_looked_at_is_a_note_and_ends_only_its_check() -> None:
    def refuse(_: Site) -> list[Finding]:
        raise PermissionError(13, "Permission denied", "/secret")

    found = report(Site(), [Check("a", "", refuse), Check("b", "", lambda _: [Finding(Level.OK, "fine")])])
    assert found["findings"][0]["text"] == "could not be looked at: /secret: Permission denied"
    assert found["fine"] is True


def test_every_check_finds_something_and_every_fault_says_what_to_type(machine: Machine) -> None:
    found = diagnose(machine.site)["findings"]
    assert {finding["check"] for finding in found} == {check.name for check in CHECKS}
    for finding in found:
        assert finding["command"] or finding["level"] in {"ok", "note"}, finding
