"""What ``mpload chaos`` does to a daemon: kill, stop and continue its processes, reload, restart.

Rules: a process is signalled through a pidfd that was opened before it was made sure that it is one of the daemon's, so
that a reused number never hits a stranger. A fault whose target is not there waits for it, bounded. Everything that was
stopped is continued, whatever happens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import random
import select
import signal
import time
from collections.abc import Callable
from typing import Any

from mpserverd.load.chaos_plan import HEARTBEAT_TIMEOUT_S, WORKERS_MAX, WORKERS_MIN, FaultKind
from mpserverd.load.stand_in import StandIn, UnitState

TARGET_S_MAX = 15.0
"""So long a fault waits for its target; a storer's backoff and start take a second at most."""
POLL_S = 0.01
READY_S = 60.0
DEATH_S_MAX = 10.0
STOP_S = (0.02, 1.5)
LONG_STOP_SHARE = 0.15
"""Of the stops so many outlast the heartbeat's deadline, so that the process is replaced."""
AGAIN_SHARE, AGAIN_S, AGAIN_MAX = 0.3, (0.0, 0.5), 3
"""Of the kills of the supervisor so many are followed by one more, at any instant of its next start or soon after."""
BOTH_SHARE = 0.2
"""Of the kills so many take worker and storer in one moment."""

KILLABLE = frozenset({"starting", "running", "stopping"})
"""States as the daemon names them."""

Facts = dict[str, Any]


@dataclasses.dataclass
class Done:
    """One fault that was done. ``end_ns`` is when its cause was over: the process dead, continued, or ready again."""

    kind: FaultKind
    begin_ns: int
    end_ns: int
    text: str
    kills: int = 0


@dataclasses.dataclass
class Stopped:
    name: str
    pidfd: int
    continue_ns: int
    done: Done


class Faults:
    """``facts`` asks the daemon who its processes are: None when it does not answer. ``configure(workers)`` rewrites
    its configuration file."""

    def __init__(
        self,
        unit: StandIn,
        facts: Callable[[], Facts | None],
        configure: Callable[[int], None],
        seed: int,
        *,
        both: bool,
    ) -> None:
        self._unit, self._facts, self._configure = unit, facts, configure
        self._known: Facts | None = None
        self._chance = random.Random(f"targets {seed}")
        self._both = both
        self._stopped: list[Stopped] = []
        self.workers: int | None = None
        """As the last reload said."""
        self.restarts_s: list[float] = []

    @property
    def anything_stopped(self) -> bool:
        return bool(self._stopped)

    def do(self, kind: FaultKind, keep_going: Callable[[], None]) -> list[Done]:
        """Do it, calling ``keep_going`` while it waits. Empty when there was no target in time."""
        actions: dict[FaultKind, Callable[[Callable[[], None]], list[Done]]] = {
            FaultKind.WORKER: lambda wait: self._kill("worker", wait),
            FaultKind.STORER: lambda wait: self._kill("storer", wait),
            FaultKind.SUPERVISOR: self._kill_supervisor,
            FaultKind.STOP: self._stop,
            FaultKind.RELOAD: self._reload,
            FaultKind.RESTART: self._restart,
        }
        return actions[kind](keep_going)

    # --- kill

    def _kill(self, role: str, wait: Callable[[], None]) -> list[Done]:
        names = [role]
        if self._both and self._chance.random() < BOTH_SHARE:
            names = ["worker", "storer"]
        targets = self._targets(names, wait)
        begin_ns = time.monotonic_ns()
        for _, pidfd in targets:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        done = []
        for name, pidfd in targets:
            self._await_death(pidfd)
            os.close(pidfd)
            kind = FaultKind.STORER if name == "storer" else FaultKind.WORKER
            done.append(Done(kind, begin_ns, time.monotonic_ns(), f"kill -9 {name}", kills=1))
        return done

    def _targets(self, names: list[str], wait: Callable[[], None]) -> list[tuple[str, int]]:
        """Name and pidfd of one running process for each name, as far as there are any in time."""
        until_s = time.monotonic() + TARGET_S_MAX
        while True:
            found = [target for name in names if (target := self._target(name)) is not None]
            if len(found) == len(names) or time.monotonic() >= until_s:
                return found
            for _, pidfd in found:
                os.close(pidfd)
            wait()
            time.sleep(POLL_S)

    def _target(self, role: str) -> tuple[str, int] | None:
        """One that lives and is not stopped by us: it may be starting, or be leaving after a reload."""
        if not any(stopped.name.startswith("supervisor") for stopped in self._stopped):
            self._known = self._facts()
        facts = self._known
        if facts is None:
            return None
        rows = facts.get("workers", []) if role == "worker" else [facts.get("storer")]
        stopped = {stopped.name for stopped in self._stopped}
        living = [row for row in rows if row and row["state"] in KILLABLE and row["pid"]]
        living = [row for row in living if f"{row['name']} {row['pid']}" not in stopped]
        if not living:
            return None
        row = self._chance.choice(living)
        pidfd = self._own(row["pid"])
        return None if pidfd is None else (row["name"], pidfd)

    def _own(self, pid: int) -> int | None:
        """A pidfd, when that process is of the daemon's session."""
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return None
        try:
            if os.getsid(pid) == self._unit.state.pid:
                return pidfd
        except ProcessLookupError:
            pass
        os.close(pidfd)
        return None

    @staticmethod
    def _await_death(pidfd: int) -> None:
        select.select([pidfd], [], [], DEATH_S_MAX)

    def _kill_supervisor(self, wait: Callable[[], None]) -> list[Done]:
        """At times once more while it starts: in the middle of taking up what the last one left."""
        begin_ns, kills = time.monotonic_ns(), 1
        start = self._unit.kill()
        while kills < AGAIN_MAX and self._chance.random() < AGAIN_SHARE:
            self._await(functools.partial(_has_begun, start), start, wait)
            until_s = time.monotonic() + self._chance.uniform(*AGAIN_S)
            while time.monotonic() < until_s:
                wait()
                time.sleep(min(POLL_S, max(0.0, until_s - time.monotonic())))
            start, kills = self._unit.kill(), kills + 1
        times = f", {kills} times" if kills > 1 else ""
        return self._ready_again(FaultKind.SUPERVISOR, f"kill -9 supervisor{times}", start, begin_ns, wait, kills)

    def _restart(self, wait: Callable[[], None]) -> list[Done]:
        begin_ns = time.monotonic_ns()
        return self._ready_again(FaultKind.RESTART, "restart", self._unit.restart(), begin_ns, wait)

    def _ready_again(
        self, kind: FaultKind, text: str, start: int, begin_ns: int, wait: Callable[[], None], kills: int = 0
    ) -> list[Done]:
        """Everything that ends the main process: done when it is ready again."""
        self._await(lambda state: state.ready and state.starts >= start, start, wait)
        end_ns = time.monotonic_ns()
        self.restarts_s.append((end_ns - begin_ns) / 1e9)
        text = f"{text}, ready again after {(end_ns - begin_ns) / 1e6:.0f} ms"
        return [Done(kind, begin_ns, end_ns, text, kills)]

    def _await(self, condition: Callable[[UnitState], bool], start: int, wait: Callable[[], None]) -> None:
        until_s = time.monotonic() + READY_S
        while not self._unit.wait_for(condition, POLL_S):
            if time.monotonic() >= until_s:
                self._unit.wait_ready(0.0, start=start)  # says what is wrong
            wait()

    # --- stop and continue

    def _stop(self, wait: Callable[[], None]) -> list[Done]:
        """Its end is not now: see ``continue_due``."""
        role = self._chance.choice(("worker", "worker", "storer", "storer", "supervisor"))
        if role == "supervisor":
            pid = self._unit.state.pid
            pidfd = self._own(pid) if pid else None
            target = None if pidfd is None else (f"supervisor {pid}", pidfd)
        else:
            targets = self._targets([role], wait)
            target = (f"{targets[0][0]} {_pid_of(targets[0][1])}", targets[0][1]) if targets else None
        if target is None or target[0] in {stopped.name for stopped in self._stopped}:
            if target is not None:
                os.close(target[1])
            return []
        now_ns = time.monotonic_ns()
        length_s = self._chance.uniform(*STOP_S)
        if role != "supervisor" and self._chance.random() < LONG_STOP_SHARE:
            length_s += HEARTBEAT_TIMEOUT_S
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(target[1], signal.SIGSTOP)
        continue_ns = now_ns + int(length_s * 1e9)
        text = f"SIGSTOP {target[0].rpartition(' ')[0]} for {length_s * 1000:.0f} ms"
        done = Done(FaultKind.STOP, now_ns, continue_ns, text)
        self._stopped.append(Stopped(target[0], target[1], continue_ns, done))
        return [done]

    def continue_due(self, *, everything: bool = False) -> None:
        """SIGCONT for those whose time is over."""
        now_ns = time.monotonic_ns()
        for stopped in list(self._stopped):
            if everything or now_ns >= stopped.continue_ns:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(stopped.pidfd, signal.SIGCONT)
                stopped.done.end_ns = time.monotonic_ns()
                os.close(stopped.pidfd)
                self._stopped.remove(stopped)

    # --- reload

    def _reload(self, _: Callable[[], None]) -> list[Done]:
        """Another number of workers each time, so that it can be seen whether it was done."""
        others = [count for count in range(WORKERS_MIN, WORKERS_MAX + 1) if count != self.workers]
        self.workers = self._chance.choice(others)
        self._configure(self.workers)
        begin_ns = time.monotonic_ns()
        self._unit.kill(signal.SIGHUP)
        return [Done(FaultKind.RELOAD, begin_ns, begin_ns, f"SIGHUP, {self.workers} workers")]


def _has_begun(start: int, state: UnitState) -> bool:
    return state.pid != 0 and state.starts >= start


def _pid_of(pidfd: int) -> int:
    text = pathlib.Path(f"/proc/self/fdinfo/{pidfd}").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pid:"))
