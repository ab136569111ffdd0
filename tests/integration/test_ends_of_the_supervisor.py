"""SIGTERM of a restart is told from that of a stop, whenever it comes; the stand-in for systemd says which it is."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket

import pytest

from mpserverd.supervisor.carrier import SINGLES_MAX
from tests.integration import senders
from tests.integration.oracle import sha256
from tests.integration.supervisor_driver import RunningSupervisor, Systemd, packets, wait_for
from tests.integration.unit_driver import SEED, Unit

CLIENTS = 8
TRIES = 20
"""So often a start is killed again that was ready before it could be caught."""


@contextlib.contextmanager
def clients_that_must_not_notice(unit: Unit):  # type: ignore[no-untyped-def]
    """Each sends half before and half after what the body does; all of it must be there, as one stream each."""
    contents = [senders.payload(SEED + number, 320_000) for number in range(CLIENTS)]
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(("127.0.0.1", unit.port))) for _ in contents]
        for client, content in zip(clients, contents, strict=True):
            client.sendall(content[:160_000])
        wait_for(lambda: unit.active() == CLIENTS)
        yield
        for client, content in zip(clients, contents, strict=True):
            client.sendall(content[160_000:])
    wait_for(lambda: unit.durable() == sum(map(len, contents)), 30)
    hashes = set(unit.stored())
    assert {sha256(content) for content in contents} <= hashes


def catch_before_ready(unit: Unit) -> None:
    """kill -9, and stop the next start (SIGSTOP) after it has taken everything up and before it is ready."""
    for _ in range(TRIES):
        seen = len(unit.log())
        unit.system.kill()
        wait_for(lambda seen=seen: "connections adopted" in unit.log()[seen:])
        os.kill(unit.system.state.pid, signal.SIGSTOP)
        if " ready " not in unit.log()[seen:]:
            return
        os.kill(unit.system.state.pid, signal.SIGCONT)
    raise AssertionError("never caught before it was ready")


def test_a_restart_while_the_daemon_starts_disconnects_nobody(tmp_path: pathlib.Path) -> None:
    """systemd skips ExecStop= then: an automatic restart after a crash, and an administrator or apt right behind it."""
    with Unit(tmp_path) as unit:
        with clients_that_must_not_notice(unit):
            catch_before_ready(unit)
            pid = unit.system.state.pid
            start = unit.system.restart()
            os.kill(pid, signal.SIGCONT)
            unit.system.wait_ready(start=start)
        assert "stopping" not in unit.log()
        assert "connections adopted count=8" in unit.log()


def test_a_stop_while_the_daemon_starts_is_a_stop(tmp_path: pathlib.Path) -> None:
    with Unit(tmp_path) as unit, socket.create_connection(("127.0.0.1", unit.port)) as client:
        client.sendall(bytes(160))
        wait_for(lambda: unit.durable() == 160)
        catch_before_ready(unit)
        client.sendall(bytes(160))
        with unit.system._changed:
            os.kill(unit.system.state.pid, signal.SIGCONT)
        assert unit.system.stop() == 0
        assert client.recv(1) == b""
        assert unit.durable() == 320
        assert unit.system.stored_names() == []


def test_sigterm_behind_a_leave_that_waits_for_systemd_is_no_stop(tmp_path: pathlib.Path) -> None:
    """As systemd does when ExecStop= is over and the main process still lives."""
    with Unit(tmp_path, max_clients=SINGLES_MAX + 50, buffers="32 MiB") as unit:
        with clients_that_must_not_notice(unit):
            with unit.system._changed:  # systemd is busy and takes nothing
                for _ in range(SINGLES_MAX + 1):  # so many begin an exchange of carriers, with a barrier
                    socket.create_connection(("127.0.0.1", unit.port)).close()
                wait_for(lambda: unit.log().count("connection ended") > SINGLES_MAX, 30)
                start = unit.system.state.starts + 1
                assert unit.ask("leave")["left"]
                os.kill(unit.system.state.pid, signal.SIGTERM)
            unit.system.wait_ready(start=start)
        assert "stopping" not in unit.log()


def test_a_restart_that_systemd_keeps_waiting_says_what_is_missing_and_loses_nobody(tmp_path: pathlib.Path) -> None:
    with Unit(tmp_path, max_clients=SINGLES_MAX + 50, buffers="32 MiB", server="restart_timeout_s = 0.5") as unit:
        with clients_that_must_not_notice(unit):
            with unit.system._changed:
                for _ in range(SINGLES_MAX + 1):
                    socket.create_connection(("127.0.0.1", unit.port)).close()
                wait_for(lambda: unit.log().count("connection ended") > SINGLES_MAX, 30)
                start = unit.system.state.starts + 1
                assert unit.ask("leave")["left"]
                wait_for(lambda: "left before everything was kept" in unit.log())
            unit.system.wait_ready(start=start)
        (line,) = [line for line in unit.log().splitlines() if "left before everything" in line]
        assert "ERROR" in line and "systemd" in line and "waited_s=0.5" in line


def test_start_and_stop_say_what_they_are_at_and_ask_systemd_for_more_time(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        Systemd(tmp_path, monkeypatch) as systemd,
        RunningSupervisor(tmp_path, fault="never done", stop_timeout_s=60) as supervisor,
    ):
        assert systemd.heard("STATUS=starting: waits for storer, worker-0, worker-1\nEXTEND_TIMEOUT_USEC=10000000")
        with supervisor.connect() as client:
            client.sendall(packets(10))
            wait_for(lambda: supervisor.taken() == [160])
        supervisor.signal(signal.SIGTERM)
        storing = "STATUS=stopping: storing, 0 connections, 160 bytes not durable\nEXTEND_TIMEOUT_USEC="
        wait_for(lambda: systemd.heard(storing))
        wait_for(lambda: "stop goes on phase=storing connections=0 at_risk_bytes=160" in supervisor.log())
        supervisor.signal(signal.SIGTERM)
        assert supervisor.process.wait(15) == 1
