"""Looks at a daemon while ``mpload chaos`` torments it: what only grows must never fall, and the ledger must balance.

It asks as every tool does, over the control socket; a daemon that is dead or stopped just now is not asked. The ledger
is also asked for with ``mpserverctl``, as an operator would.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np

from mpserverd.arena import report
from mpserverd.arena.chunks import LEASED, USED, ChunkTable
from mpserverd.arena.live import LiveState
from mpserverd.arena.state import Slot, StateTable
from mpserverd.control.client import request_state
from mpserverd.errors import MpserverdError

DEADLINE_S = 2.0
FACTS_S = 0.3
"""Soon, because whoever is stopped must be continued in time; it is asked again."""
CTL_S = 30.0
GROWING = ("total_connections", "total_packets", "total_bytes", "errors")
GAUGES = frozenset({"in_arena_bytes", "partial_bytes", "at_risk_bytes", "holds", "forwarded_bytes"})
"""Accounts of the ledger that rise and fall; all others only rise."""
FAULTS_MAX = 50


class Watch:
    """``faults`` are lines for people, one for each promise that was broken."""

    def __init__(self, socket_path: str) -> None:
        self._path = socket_path
        self._highest: dict[str, int] = {}
        self.facts: dict[str, Any] | None = None
        """Of the last time that the daemon answered."""
        self.looks = self.unanswered = self.ledger_checks = 0
        self.faults: list[str] = []

    def look(self) -> dict[str, Any] | None:
        """Read the counters once and compare them with before; the daemon's stats, None without an answer."""
        live = self._maybe_live(DEADLINE_S)
        if live is None:
            self.unanswered += 1
            return None
        self.looks += 1
        stats = report.stats(live)
        if stats["ledger"]["holds"]:  # else the storer is being stopped in the middle of moving an account
            self._compare(stats)
        return stats

    def ask_facts(self) -> dict[str, Any] | None:
        """Who the processes are now; None when the daemon does not answer soon."""
        live = self._maybe_live(FACTS_S)
        return None if live is None else live.facts

    def stray_chunks(self) -> str:
        """What is wrong with the chunk table of a daemon that holds nothing, "" when nothing is.

        Every chunk is free, or leased to a process that lives. One that is neither is lost for good.
        """
        live = self._maybe_live(DEADLINE_S)
        if live is None:
            return "the daemon does not answer"
        words = live.chunks.words.copy()
        slots = live.state.slots
        living = slots[slots[:, Slot.PID] != 0, Slot.LEASE]
        used = words[(words & 3) == USED] >> 2
        leased = words[(words & 3) == LEASED] >> 2
        dead = leased[~np.isin(leased, living)]
        wrong = {"held, of streams": used, "leased to dead processes": dead}
        return "; ".join(
            f"{len(numbers)} chunks are {what} {np.unique(numbers)[:9].tolist()}"
            for what, numbers in wrong.items()
            if len(numbers)
        )

    def _maybe_live(self, deadline_s: float) -> LiveState | None:
        try:
            facts, state_fd, chunks_fd = request_state(self._path, deadline_s=deadline_s)
        except MpserverdError:
            return None
        self.facts = facts
        try:
            return LiveState(facts, StateTable(state_fd, read_only=True), ChunkTable(chunks_fd, read_only=True))
        finally:
            os.close(state_fd)
            os.close(chunks_fd)

    def _compare(self, stats: dict[str, Any]) -> None:
        now = {name: int(stats[name]) for name in GROWING}
        now |= {f"ledger {name}": int(value) for name, value in stats["ledger"].items() if name not in GAUGES}
        for name, value in now.items():
            before = self._highest.get(name, 0)
            if value < before:
                self.fault(f"{name} fell from {before} to {value}")
            self._highest[name] = max(before, value)

    def check_ledger(self) -> bool:
        """Whether ``mpserverctl ledger`` says that every equation holds."""
        self.ledger_checks += 1
        answer = self._ctl("ledger")
        return answer.returncode == 0

    def ledger(self) -> dict[str, Any]:
        """The report of ``mpserverctl ledger``; raises MpserverdError without one."""
        answer = self._ctl("ledger")
        if answer.returncode not in (0, 1) or not answer.stdout:
            raise MpserverdError(f"mpserverctl ledger: exit code {answer.returncode}, {answer.stderr.strip()}")
        found: dict[str, Any] = json.loads(answer.stdout)
        return found

    def _ctl(self, command: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "mpserverd.cli.ctl", "--socket", self._path, "--json", command]
        return subprocess.run(words, capture_output=True, text=True, timeout=CTL_S, check=False)

    def fault(self, text: str) -> None:
        if len(self.faults) < FAULTS_MAX:
            self.faults.append(text)
