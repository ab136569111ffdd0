"""Clients stream from outside the machine while the daemon inside is restarted, killed, reloaded and upgraded.

Every byte is hashed by the clients, and compared with the files of the spool, which are read from outside too. The
newer package lays live memory out in another way, so that upgrade and downgrade move it. How long clients waited is
printed.
"""

from __future__ import annotations

import collections
import json
import pathlib
import re
import select
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

import pytest

from tests.integration.oracle import stored_streams
from tests.system.machine import SLOWNESS, Machine

UNIT = "mpserverd"
PORT = 8890
CLIENTS = pathlib.Path(__file__).with_name("live_clients.py")
FEW, MANY = (2, 6, 0), (1, 3, 4996)
"""How many are fast, steady, slow."""
CONFIG = f"""
[server]
max_clients = 5010
[buffers]
bytes = "256 MiB"
chunk_bytes = "16 KiB"
[[listener]]
name = "live"
address = "127.0.0.1:{PORT}"
packet_size = 16
on_full = "block"
[spool]
segment_bytes = "1 MiB"
min_free_bytes = 0
"""
DROP_IN = """
[Service]
Environment=MPSERVERD_CRASHES_MAX=0
"""
"""These tests kill it more often than a minute allows before everything stored is discarded."""
BUSY = {
    "killed": f"kill -9 $(systemctl show -P MainPID {UNIT})",
    "restarting": f"systemctl restart --no-block {UNIT}",
    "starting": f"""
        systemctl restart --no-block {UNIT}
        timeout 10 sh -c 'until [ $(systemctl show -P ActiveState {UNIT}) = activating ]; do :; done'
    """,
    "reloading": f"systemctl reload --no-block {UNIT}",
}
MOMENTS_S = (0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
DEADLINE_S = 120.0


class LiveClients:
    """The process with the clients. ``check_stored`` ends them; leaving the ``with`` block ends it in any case."""

    def __init__(self, machine: Machine, fast: int, steady: int, slow: int) -> None:
        self.machine = machine
        self.count = fast + steady + slow
        self.spool = machine.root / "var/lib/mpserverd"
        self._streams_before = len(stored_streams(self.spool, live=True))
        counts = map(str, (PORT, fast, steady, slow))
        self._process = machine.popen_outside(sys.executable, str(CLIENTS), *counts)

    def __enter__(self) -> Self:
        assert self._answer() == {"connected": self.count}
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def go_through(self, what: str, event: Callable[[], object], *, new_life: bool = True) -> None:
        """Every client sends before, during and after it."""
        self._ask("mark")
        before = self.machine.main_pid()
        began_s = time.monotonic()
        event()
        self.machine.wait_until_serving(not_pid=before if new_life else 0)
        took_ms = 1000 * (time.monotonic() - began_s)
        answer = self._ask("mark")
        pause_ms = 1000 * answer["longest_pause_s"]
        print(f"{self.count} clients, {what}: serves after {took_ms:.0f} ms, longest pause {pause_ms:.0f} ms")
        assert answer["failures"] == [], what

    def check_stored(self) -> None:
        """All ended in order, nobody was disconnected, and what is on disk is what was sent, once."""
        answer = self._ask("end")
        assert answer["failures"] == []
        connected = "mpserverctl --json streams | grep -q '\"connected\": true'"
        self.machine.wait_for(lambda: self.machine.sh(connected, check=False).returncode != 0, what="all to be stored")
        streams = stored_streams(self.spool)[self._streams_before :]
        stored, sent = collections.Counter(each.sha256 for each in streams), collections.Counter(answer["digests"])
        assert sum(len(each.content) for each in streams) == answer["sent_bytes"]
        assert (len(sent - stored), len(stored - sent)) == (0, 0)
        self.machine.run("mpserverctl", "ledger")
        print(f"{self.count} clients: {answer['sent_bytes']:,} bytes sent and found, 0 disconnects")

    def _ask(self, word: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        """The one line that follows an order."""
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], DEADLINE_S * SLOWNESS)
        assert readable, "the clients do not answer"
        return dict(json.loads(self._process.stdout.readline()))


@pytest.fixture(scope="module")
def machine(debs: dict[str, pathlib.Path], next_deb: pathlib.Path, depends: list[str]) -> Iterator[Machine]:
    with Machine([debs["mpserverd"], next_deb], depends) as machine:
        machine.write("/etc/mpserverd/conf.d/90-live.toml", CONFIG)
        machine.write(f"/etc/systemd/system/{UNIT}.service.d/90-live.conf", DROP_IN)
        machine.apt("install", f"/srv/{debs['mpserverd'].name}")
        machine.wait_until_serving()
        yield machine
        journal = machine.journal("-u", UNIT)
        bad = re.compile("without a carrier|discarded|Traceback|child (crashed|died)")
        assert [line for line in journal.splitlines() if bad.search(line)] == []


@pytest.fixture
def install(machine: Machine, debs: dict[str, pathlib.Path], next_deb: pathlib.Path) -> Callable[[str], None]:
    """Install the "next" or "this" package over the other; their live memory has different versions."""

    def layout() -> str:
        return machine.python("from mpserverd.arena.state import STATE_VERSION; print(STATE_VERSION)")

    def install(which: str) -> None:
        before = layout()
        deb = next_deb if which == "next" else debs["mpserverd"]
        machine.run("dpkg", "-i", f"/srv/{deb.name}")
        assert layout() != before

    return install


def kill(machine: Machine) -> None:
    machine.run("kill", "-KILL", str(machine.main_pid()))


@pytest.mark.parametrize("counts", [FEW, MANY], ids=["few", "five_thousand"])
def test_clients_notice_no_restart_kill_reload_upgrade_or_downgrade(
    machine: Machine, install: Callable[[str], None], counts: tuple[int, int, int]
) -> None:
    with LiveClients(machine, *counts) as clients:
        clients.go_through("systemctl restart", lambda: machine.run("systemctl", "restart", UNIT))
        clients.go_through("kill -9", lambda: kill(machine))
        clients.go_through("systemctl reload", lambda: machine.run("systemctl", "reload", UNIT), new_life=False)
        clients.go_through("mpserverctl reload", lambda: machine.run("mpserverctl", "reload"), new_life=False)
        clients.go_through("upgrade", lambda: install("next"))
        clients.go_through("kill -9, upgraded", lambda: kill(machine))
        clients.go_through("downgrade", lambda: install("this"))
        assert len(machine.ctl("clients")) == clients.count
        clients.check_stored()


@pytest.mark.parametrize("what", BUSY)
def test_clients_notice_no_restart_that_comes_while_the_unit_is_busy(machine: Machine, what: str) -> None:
    """Not that moment, nor some later ones."""
    with LiveClients(machine, *FEW) as clients:
        for moment_s in MOMENTS_S:
            script = f"{BUSY[what]}\nsleep {moment_s}; systemctl restart {UNIT}"
            clients.go_through(f"restart {moment_s} s after {what}", lambda script=script: machine.sh(script))
        clients.check_stored()
