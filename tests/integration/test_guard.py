"""A supervisor that is killed between accepting a connection and knowing of it cuts nobody off."""

from __future__ import annotations

import os
import pathlib
import signal
import socket

import pytest

from mpserverd.load.stand_in_spawn import session_pids
from tests.integration.driver import DEADLINE_S, SLOWNESS, connect
from tests.integration.oracle import sha256
from tests.integration.senders import payload
from tests.integration.supervisor_driver import wait_for
from tests.integration.trouble import Trouble
from tests.integration.unit_driver import Unit

KILLS = 5


def test_a_supervisor_that_dies_while_it_accepts_cuts_nobody(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trouble = Trouble(tmp_path)
    for name, value in trouble.environ.items():
        monkeypatch.setenv(name, value)
    contents, clients = [], []
    with Unit(tmp_path) as unit:
        for number in range(KILLS):
            starts = unit.system.state.starts
            trouble.die_accepting()
            clients.append(connect(unit.port))
            contents.append(payload(number, 160_000))
            clients[-1].sendall(contents[-1][:100])
            unit.system.wait_ready(start=starts + 1)
            wait_for(lambda n=number: unit.active() == n + 1)
        for client, content in zip(clients, contents, strict=True):
            client.sendall(content[100:])
            client.shutdown(socket.SHUT_WR)
            client.settimeout(DEADLINE_S * SLOWNESS)
            assert client.recv(1) == b""
            client.close()
        wait_for(lambda: unit.durable() == sum(map(len, contents)))
        assert unit.stored() == sorted(map(sha256, contents))


def test_a_guard_that_is_killed_is_replaced_and_none_is_left_at_the_end(tmp_path: pathlib.Path) -> None:
    with Unit(tmp_path) as unit:
        session = unit.system.state.pid
        for _ in range(3):
            [guard] = guards(session)
            os.kill(guard, signal.SIGKILL)
            wait_for(lambda old=guard: [pid for pid in guards(session) if pid != old])
    assert not guards(session)


def test_a_guard_that_stands_still_keeps_no_start_waiting_for_long(tmp_path: pathlib.Path) -> None:
    with Unit(tmp_path) as unit, connect(unit.port) as client:
        client.sendall(bytes(1600))
        wait_for(lambda: unit.durable() == 1600)
        session = unit.system.state.pid
        [guard] = guards(session)
        os.kill(guard, signal.SIGSTOP)
        unit.system.wait_ready(start=unit.system.kill())
        client.sendall(bytes(1600))
        wait_for(lambda: unit.durable() == 3200)
        assert not guards(session)


def guards(session: int) -> list[int]:
    return [pid for pid in session_pids(session) if pathlib.Path(f"/proc/{pid}/comm").read_text() == "mps-guard\n"]
