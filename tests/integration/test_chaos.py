"""``mpload chaos`` itself: many deaths in a short time lose nothing, and it says so when something was lost."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from mpserverd.load.chaos import Chaos
from mpserverd.load.chaos_plan import ChaosOptions, FaultKind
from mpserverd.load.chaos_report import ChaosReport

MPLOAD = pathlib.Path(sys.executable).parent / "mpload"
SLOWNESS = float(os.environ.get("MPSERVERD_TEST_SLOWNESS", "1"))
DEADLINE_S = 180 * SLOWNESS
SEED = 20_261_123
KILLS, KILLS_S = 200, 60
"""Deaths in the run that every change has to survive."""
CHILD_KILLS, CHILD_KILLS_S = 60, 25
MIXED_FAULTS, MIXED_S = 24, 12


def mpload_chaos(directory: pathlib.Path, *options: str) -> dict[str, Any]:
    command = [str(MPLOAD), "chaos", "--directory", str(directory), "--json", "-", *options]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert answer.stdout, answer.stderr
    report: dict[str, Any] = json.loads(answer.stdout)
    assert (answer.returncode, report["failures"]) == (0, []), f"seed {report['seed']}: {answer.stdout}{answer.stderr}"
    assert not list(directory.iterdir()), "something was left behind"
    return report


def assert_exact(report: dict[str, Any]) -> None:
    """The figures that nobody may explain away."""
    names = ("lost_bytes", "doubled_bytes", "strange_bytes", "disconnects", "refusals")
    assert {name: report[name] for name in names} == dict.fromkeys(names, 0)
    assert report["sent_bytes"] == report["stored_bytes"] > 1_000_000
    assert report["looks"] > 3 and report["ledger_checks"] > 0


@pytest.mark.slow
def test_two_hundred_kills_of_workers_storer_and_supervisor_lose_nothing(tmp_path: pathlib.Path) -> None:
    """At any instant, and whatever clients do."""
    faults = ("--kill", "worker,storer,supervisor", "--kills", str(KILLS))
    report = mpload_chaos(tmp_path, "--duration", str(KILLS_S), "--seed", str(SEED), *faults)
    assert_exact(report)
    assert report["kills"] >= KILLS and report["keeps_descriptors"]
    assert min(report["kills_by_kind"].values()) > KILLS // 4 and len(report["kills_by_kind"]) == 3


@pytest.mark.slow
def test_kills_of_workers_and_storer_lose_nothing_of_clients_that_come_and_go(tmp_path: pathlib.Path) -> None:
    faults = ("--kill", "worker,storer", "--kills", str(CHILD_KILLS))
    report = mpload_chaos(tmp_path, "--duration", str(CHILD_KILLS_S), "--seed", str(SEED + 2), *faults)
    assert_exact(report)
    assert report["kills"] >= CHILD_KILLS and report["connections"] > 2 * report["clients"]


@pytest.mark.slow
def test_stops_reloads_and_kills_together_lose_nothing(tmp_path: pathlib.Path) -> None:
    faults = ("--kills", str(MIXED_FAULTS))
    report = mpload_chaos(tmp_path, "--duration", str(MIXED_S), "--seed", str(SEED + 1), "--clients", "15", *faults)
    assert_exact(report)
    assert min(report["faults"].values()) > 0 and len(report["faults"]) == len(FaultKind)


def test_flat_out_without_any_fault_everything_is_there(tmp_path: pathlib.Path) -> None:
    options = ("--duration", "1", "--clients", "4", "--rate", "0", "--kills", "0")
    report = mpload_chaos(tmp_path, *options)
    assert_exact(report)
    assert report["kills"] == 0


# -- it notices


def run_with(directory: pathlib.Path, before_compare: Callable[[pathlib.Path], None]) -> ChaosReport:
    options = ChaosOptions(duration_s=1.0, seed=SEED, clients=5, kinds=(FaultKind.WORKER,), faults=1)
    with Chaos(options, say=lambda text: None, directory=directory, before_compare=before_compare) as chaos:
        return chaos.run()


def longest_segment(spool: pathlib.Path) -> pathlib.Path:
    return max((spool / "streams").rglob("*.seg"), key=lambda path: path.stat().st_size)


def flip_a_bit(spool: pathlib.Path) -> None:
    with longest_segment(spool).open("r+b") as segment:
        segment.seek(5000)
        byte = segment.read(1)[0]
        segment.seek(5000)
        segment.write(bytes([byte ^ 0x10]))


def remove_a_segment(spool: pathlib.Path) -> None:
    longest_segment(spool).unlink()


def forget_a_stream(spool: pathlib.Path) -> None:
    with sqlite3.connect(spool / "catalog.sqlite") as catalog:
        catalog.execute("DELETE FROM stream WHERE id = (SELECT min(id) FROM stream)")
    catalog.close()


def cut_a_stream(spool: pathlib.Path) -> None:
    """By one packet, in the catalog."""
    with sqlite3.connect(spool / "catalog.sqlite") as catalog:
        catalog.execute("UPDATE stream SET durable = durable - packet_size WHERE id = (SELECT min(id) FROM stream)")
    catalog.close()


@pytest.mark.parametrize("tamper", [flip_a_bit, remove_a_segment, forget_a_stream, cut_a_stream])
def test_it_fails_when_what_is_stored_is_not_what_was_sent(
    tamper: Callable[[pathlib.Path], None], tmp_path: pathlib.Path
) -> None:
    report = run_with(tmp_path, tamper)
    assert report.failures and report.comparison.lost_bytes > 0
    assert report.lines()[-1] == "FAILED" and not report.as_json()["fine"]


def test_it_is_fine_when_nobody_tampers(tmp_path: pathlib.Path) -> None:
    assert run_with(tmp_path, lambda spool: None).failures == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing_behind(number: signal.Signals, tmp_path: pathlib.Path) -> None:
    command = [str(MPLOAD), "chaos", "--directory", str(tmp_path), "--duration", "100"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    while "kill" not in (line := process.stdout.readline()):
        assert line
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, errors) == (130, "mpload: interrupted\n")
    assert not list(tmp_path.iterdir())
    assert not processes_with(str(tmp_path))


def test_a_run_that_is_killed_leaves_no_process_behind(tmp_path: pathlib.Path) -> None:
    command = [str(MPLOAD), "chaos", "--directory", str(tmp_path), "--duration", "100"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "connections of" not in (line := process.stdout.readline()):
        assert line
    process.kill()
    process.communicate(timeout=DEADLINE_S)
    deadline = time.monotonic() + DEADLINE_S
    while processes_with(str(tmp_path)):
        assert time.monotonic() < deadline, "still there"
        time.sleep(0.01)


def processes_with(word: str) -> list[str]:
    """Command lines that name ``word``."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if word in line:
                found.append(line)
    return found


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--kill", "everything"], "choose from worker,storer"),
        (["--clients", "0"], "out of bounds"),
        (["--duration", "0"], "out of bounds"),
    ],
)
def test_bad_usage_is_exit_code_2(options: list[str], words: str) -> None:
    answer = subprocess.run([str(MPLOAD), "chaos", *options], capture_output=True, text=True, check=False)
    assert answer.returncode == 2 and words in answer.stderr
