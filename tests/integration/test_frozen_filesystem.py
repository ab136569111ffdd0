"""The disk stands still: the storer sleeps in the kernel where nothing wakes it, and no client notices.

A frozen ext4 (fsfreeze) is what a hung disk looks like to a process: state D, SIGKILL has no effect. Workers and even
the supervisor are killed meanwhile. Afterwards every byte that was sent is compared with what is on disk.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from mpserverd.arena.state import Con, Str, StreamState
from mpserverd.control.client import request_state
from tests.integration.freezing import MIB, Disk, thread_states
from tests.integration.streaming import Streamer
from tests.integration.supervisor_driver import wait_for
from tests.integration.test_supervisor_death import Unit

pytestmark = pytest.mark.root

FROZEN_S = float(os.environ.get("MPSERVERD_TEST_FROZEN_S", "2"))
"""So long the disk stands still in each part of the long test: 30 makes it more than a minute."""
CLIENTS = 4
ARENA_MIB = 16
BYTES_PER_S = int(ARENA_MIB * MIB / 3 / (2 * FROZEN_S + 6) / CLIENTS)
"""All of them together stay within the arena, so that nobody has a reason to wait."""
HEARTBEAT_S = 2.5
READY_S_MAX = 5.0
SLOWNESS = float(os.environ.get("MPSERVERD_TEST_SLOWNESS", "1"))
CTL = [sys.executable, "-m", "mpserverd.cli.ctl"]


@pytest.fixture
def disk(tmp_path: pathlib.Path) -> Iterator[Disk]:
    """Where ``Unit`` has its spool."""
    with Disk(tmp_path, tmp_path / "spool", 64) as disk:
        yield disk


class FrozenUnit(Unit):
    """The daemon, its spool on the disk that can be frozen."""

    def __init__(self, home: pathlib.Path) -> None:
        workers = f"2\nheartbeat_timeout_s = {HEARTBEAT_S}"
        super().__init__(home, workers=workers, buffers=f"{ARENA_MIB} MiB")

    def __enter__(self) -> FrozenUnit:
        super().__enter__()
        return self

    def facts(self) -> dict[str, Any]:
        facts, *fds = request_state(f"{self.home}/control.sock")
        for fd in fds:
            os.close(fd)
        return facts

    def received(self) -> int:
        """Bytes that were taken from open connections and from those that have ended since they were put away."""
        with self.tables() as state:
            return int(state.streams[state.streams[:, Str.STATE] != StreamState.FREE, Str.POSITION].sum())

    def ctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [*CTL, "--socket", f"{self.home}/control.sock", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=20 * SLOWNESS, check=False)

    def storer_by_ctl(self) -> dict[str, Any]:
        answer = self.ctl("--json", "stats")
        assert answer.returncode == 0, answer.stderr
        storer: dict[str, Any] = json.loads(answer.stdout)["storer"]
        return storer

    def owner_pids(self) -> list[int]:
        """Workers that have a connection."""
        return [worker["pid"] for worker in self.facts()["workers"] if worker["connections"] and worker["pid"]]


def everything_is_received(unit: FrozenUnit, clients: list[Streamer]) -> None:
    """What was sent until now is in memory: the clients are read although nothing is written."""
    sent = sum(client.sent_bytes for client in clients)
    wait_for(lambda: unit.received() >= sent)


def hold(seconds: float) -> None:
    until_s = time.monotonic() + seconds
    wait_for(lambda: time.monotonic() >= until_s, seconds + 10)


def test_a_frozen_disk_and_deaths_of_workers_and_supervisor_meanwhile_are_noticed_by_no_client(
    tmp_path: pathlib.Path, disk: Disk
) -> None:
    with FrozenUnit(tmp_path) as unit:
        clients = [Streamer(unit.port, BYTES_PER_S, seed).start() for seed in range(CLIENTS)]
        try:
            wait_for(lambda: unit.active() == CLIENTS and unit.durable() > 0)
            storer = int(unit.facts()["storer"]["pid"])
            with disk.frozen_here():
                wait_for(lambda: "D" in thread_states(storer))
                wait_for(lambda: unit.storer_by_ctl()["state"] == "stuck")
                assert unit.storer_by_ctl()["pid"] == storer
                checked = unit.ctl("check")
                assert checked.returncode != 0 and "stuck" in checked.stdout

                for pid in unit.owner_pids():
                    os.kill(pid, signal.SIGKILL)
                everything_is_received(unit, clients)
                hold(FROZEN_S)
                everything_is_received(unit, clients)

                began_s = time.monotonic()
                unit.kill()
                ready_s = time.monotonic() - began_s
                assert "D" in thread_states(storer), "the old storer is gone already"
                everything_is_received(unit, clients)
                assert unit.storer_by_ctl()["state"] == "stuck"
                assert unit.ctl("check").returncode != 0
                assert unit.active() == CLIENTS
                clients.append(Streamer(unit.port, BYTES_PER_S, CLIENTS).start())
                hold(FROZEN_S)
                everything_is_received(unit, clients)
                for pid in unit.owner_pids():
                    os.kill(pid, signal.SIGKILL)
                everything_is_received(unit, clients)
                assert "D" in thread_states(storer)
            wait_for(lambda: unit.storer_by_ctl()["state"] == "running")
            hold(1.0)
        finally:
            digests = sorted(client.finish() for client in clients)
        wait_for(lambda: unit.durable() == sum(client.sent_bytes for client in clients))
        wait_for(lambda: unit.active() == 0)
        assert unit.stored() == digests
        assert unit.system.stop() == 0
        longest_s = max(client.longest_send_s for client in clients)
        print(f"ready after {ready_s * 1000:.0f} ms, the longest send took {longest_s * 1000:.0f} ms")
        assert ready_s < READY_S_MAX * SLOWNESS


def test_a_storer_on_a_slow_disk_is_called_stuck_and_goes_on_itself(tmp_path: pathlib.Path, disk: Disk) -> None:
    with FrozenUnit(tmp_path) as unit:
        client = Streamer(unit.port, BYTES_PER_S, 1).start()
        try:
            wait_for(lambda: unit.durable() > 0)
            storer = int(unit.facts()["storer"]["pid"])
            with disk.frozen_here():
                wait_for(lambda: unit.facts()["storer"]["state"] == "stuck")
                assert "has been writing for" in unit.log() and "no sign of life" not in unit.log()
            wait_for(lambda: unit.facts()["storer"]["state"] == "running")
            assert unit.facts()["storer"]["pid"] == storer
        finally:
            digest = client.finish()
        wait_for(lambda: unit.durable() == client.sent_bytes)
        assert unit.stored() == [digest]


def test_memory_that_is_full_while_the_disk_stands_still_makes_clients_wait_and_loses_nothing(
    tmp_path: pathlib.Path, disk: Disk
) -> None:
    """More than the arena holds: TCP pushes back, also on the next supervisor's workers."""
    with FrozenUnit(tmp_path) as unit:
        clients = [Streamer(unit.port, 16 * MIB, seed).start() for seed in range(2)]
        try:
            wait_for(lambda: unit.durable() > 0)
            with disk.frozen_here():
                wait_for(lambda: blocked(unit) == len(clients))
                unit.kill()
                wait_for(lambda: blocked(unit) == len(clients))
                for pid in unit.owner_pids():
                    os.kill(pid, signal.SIGKILL)
                wait_for(lambda: blocked(unit) == len(clients))
            before = unit.received()
            wait_for(lambda: unit.received() > before + MIB)
        finally:
            digests = sorted(client.finish() for client in clients)
        wait_for(lambda: unit.durable() == sum(client.sent_bytes for client in clients))
        assert unit.stored() == digests


def blocked(unit: FrozenUnit) -> int:
    """Connections whose worker waits for a place."""
    with unit.tables() as state:
        taken = state.connections[:, Con.STATE] != 0
        return int(state.connections[taken, Con.BLOCKED].sum())
