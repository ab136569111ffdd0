"""Faults hit the processes that they are meant for, and no others; what was stopped goes on."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mpserverd.load import chaos_faults
from mpserverd.load.chaos_faults import Done, Faults
from mpserverd.load.chaos_plan import FaultKind
from mpserverd.load.chaos_report import Pauses
from mpserverd.load.stand_in import StandIn, UnitSettings

DEADLINE_S = 20.0

SERVICE = """
import ctypes, os, pathlib, signal, socket, sys
def child():
    if (pid := os.fork()) == 0:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        while True: signal.pause()
    return pid
pids = [child() for _ in range(3)]
fresh = pathlib.Path(sys.argv[1] + ".new")
fresh.write_text(" ".join(map(str, pids)))
fresh.rename(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
signal.signal(signal.SIGHUP, lambda *_: None)
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
    out.connect(os.environ["NOTIFY_SOCKET"])
    out.send(b"READY=1")
while True: signal.pause()
"""


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def state_of(pid: int) -> str:
    """As /proc says it; "" when there is no such process."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


class Target:
    """A service with two workers and a storer, and the faults for it."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.pids_path = directory / "pids"
        self.unit = StandIn(
            [sys.executable, "-c", SERVICE, str(self.pids_path)],
            directory=directory,
            settings=UnitSettings(restart_delay_s=0.01),
        )
        self.strangers: list[int] = []
        self.configured: list[int] = []
        self.faults = Faults(self.unit, self.facts, self.configured.append, 1, both=False)

    @property
    def pids(self) -> list[int]:
        return [int(word) for word in self.pids_path.read_text().split()]

    def facts(self) -> dict[str, Any]:
        pids = self.strangers or self.pids
        rows = [{"name": name, "pid": pid, "state": "running"} for name, pid in zip("abc", pids, strict=True)]
        return {"workers": rows[:2], "storer": {**rows[2], "name": "storer"}}

    def do(self, kind: FaultKind) -> list[Done]:
        return self.faults.do(kind, lambda: None)


@pytest.fixture
def target(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    monkeypatch.setattr(chaos_faults, "TARGET_S_MAX", 0.05)
    target = Target(tmp_path)
    with target.unit:
        yield target
        target.faults.continue_due(everything=True)


def test_a_kill_of_a_worker_takes_one_worker(target: Target) -> None:
    before = target.pids
    (done,) = target.do(FaultKind.WORKER)
    assert (done.kind, done.kills) == (FaultKind.WORKER, 1) and done.end_ns > done.begin_ns
    assert sorted(state_of(pid) in ("Z", "") for pid in before[:2]) == [False, True]
    assert state_of(before[2]) in ("S", "R")


def test_a_kill_of_the_storer_takes_the_storer(target: Target) -> None:
    assert target.do(FaultKind.STORER)[0].text == "kill -9 storer"
    assert [state_of(pid) in ("Z", "") for pid in target.pids] == [False, False, True]


def test_both_may_be_killed_in_one_moment(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos_faults, "BOTH_SHARE", 1.0)
    target.faults = Faults(target.unit, target.facts, target.configured.append, 1, both=True)
    done = target.do(FaultKind.STORER)
    assert [each.kind for each in done] == [FaultKind.WORKER, FaultKind.STORER]
    assert done[0].begin_ns == done[1].begin_ns and sum(each.kills for each in done) == 2


def test_a_process_that_is_not_the_daemons_is_never_touched(target: Target) -> None:
    """A stale pid may be anybody's by now."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        target.strangers = [stranger.pid] * 3
        for kind in (FaultKind.WORKER, FaultKind.STORER):
            assert target.do(kind) == []
        stranger.communicate(b"\n")
    assert stranger.returncode == 0


def test_a_killed_supervisor_is_waited_for_until_it_is_ready_again(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chaos_faults, "AGAIN_SHARE", 0.0)
    main = target.unit.state.pid
    turns: list[int] = []
    (done,) = target.faults.do(FaultKind.SUPERVISOR, lambda: turns.append(1))
    assert target.unit.state.ready and target.unit.state.pid != main and done.kills == 1
    assert target.faults.restarts_s[0] == pytest.approx((done.end_ns - done.begin_ns) / 1e9)
    assert turns, "nobody else had a turn meanwhile"


def test_a_restart_is_no_kill_and_comes_back(target: Target) -> None:
    (done,) = target.do(FaultKind.RESTART)
    assert (done.kills, target.unit.state.starts, target.unit.state.last_exit) == (0, 2, 0)


def test_what_is_stopped_goes_on_when_its_time_is_over(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos_faults, "STOP_S", (0.05, 0.05))
    monkeypatch.setattr(chaos_faults, "LONG_STOP_SHARE", 0.0)
    pids = [target.unit.state.pid, *target.pids]
    (done,) = target.do(FaultKind.STOP)
    wait_until(lambda: [state_of(pid) for pid in pids].count("T") == 1)
    planned_ns = done.end_ns
    while target.faults.anything_stopped:
        target.faults.continue_due()
    wait_until(lambda: "T" not in [state_of(pid) for pid in pids])
    assert done.end_ns >= planned_ns


def test_everything_goes_on_at_the_end(target: Target) -> None:
    pids = [target.unit.state.pid, *target.pids]
    for _ in range(6):
        target.do(FaultKind.STOP)
    wait_until(lambda: "T" in [state_of(pid) for pid in pids])
    target.faults.continue_due(everything=True)
    wait_until(lambda: "T" not in [state_of(pid) for pid in pids])


def test_a_stopped_process_is_not_killed(target: Target) -> None:
    """Else its continuation would be nobody's; a hung worker is the supervisor's to kill."""
    while len([pid for pid in target.pids if state_of(pid) == "T"]) < 3:
        target.do(FaultKind.STOP)
    assert target.do(FaultKind.WORKER) == target.do(FaultKind.STORER) == []


def test_each_reload_changes_the_number_of_workers(target: Target) -> None:
    target.faults.workers = 2
    seen = []
    for _ in range(5):
        target.unit.wait_ready()
        (done,) = target.do(FaultKind.RELOAD)
        seen.append(target.faults.workers)
        assert done.text == f"SIGHUP, {seen[-1]} workers"
    assert target.configured == seen and all(a != b for a, b in zip([2, *seen], seen, strict=False))


def test_a_supervisor_is_killed_again_while_it_starts(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos_faults, "AGAIN_SHARE", 1.0)
    monkeypatch.setattr(chaos_faults, "AGAIN_S", (0.0, 0.01))
    (done,) = target.do(FaultKind.SUPERVISOR)
    assert done.kills == chaos_faults.AGAIN_MAX
    assert target.unit.state.ready and target.unit.state.starts == 1 + chaos_faults.AGAIN_MAX


SECOND = 1_000_000_000


def test_a_pause_is_explained_by_the_fault_that_it_followed() -> None:
    pauses = Pauses()
    pauses.add([(10 * SECOND, 11 * SECOND), (20 * SECOND, 21 * SECOND), (50 * SECOND, 52 * SECOND)])
    done = [
        Done(FaultKind.RELOAD, 10 * SECOND - 300_000_000, 10 * SECOND - 300_000_000, ""),
        Done(FaultKind.WORKER, 10 * SECOND - 100_000_000, 10 * SECOND - 90_000_000, ""),
        Done(FaultKind.STORER, 20 * SECOND + 1, 20 * SECOND + 2, ""),
        Done(FaultKind.STOP, 19 * SECOND, 20 * SECOND, ""),
    ]
    assert {name: each["longest_ms"] for name, each in pauses.by_kind(done).items()} == {
        "none": 2000.0,
        "stop": 1000.0,
        "worker": 1000.0,
        "reload": 0.0,
        "storer": 0.0,
    }


def test_a_fault_that_nobody_noticed_counts_in_the_median() -> None:
    pauses = Pauses()
    pauses.add([(10 * SECOND, 10 * SECOND + 30_000_000), (10 * SECOND, 10 * SECOND + 10_000_000)])
    done = [Done(FaultKind.WORKER, at * SECOND, at * SECOND + 1, "") for at in (2, 5, 10)]
    assert pauses.by_kind(done) == {"worker": {"count": 3, "median_ms": 0.0, "longest_ms": 30.0}}
