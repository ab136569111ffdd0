"""Messages to systemd, read back from a socket that stands in for it."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpserverd.systemd import Notifier


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    path = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(path)
        server.setblocking(False)
        yield server


@pytest.fixture
def notifier(manager: socket.socket) -> Iterator[Notifier]:
    notifier = Notifier()
    yield notifier
    notifier.close()


def test_messages_are_those_of_the_protocol(manager: socket.socket, notifier: Notifier) -> None:
    assert notifier.ready("serving 3 clients")
    assert notifier.status("idle")
    assert notifier.watchdog()
    assert notifier.reloading()
    assert notifier.stopping()
    assert notifier.progress("stopping: storing")
    assert manager.recv(4096) == b"READY=1\nSTATUS=serving 3 clients"
    assert manager.recv(4096) == b"STATUS=idle"
    assert manager.recv(4096) == b"WATCHDOG=1"
    assert re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=\d+", manager.recv(4096))
    assert manager.recv(4096) == b"STOPPING=1"
    assert manager.recv(4096) == b"STATUS=stopping: storing\nEXTEND_TIMEOUT_USEC=10000000"


def test_status_cannot_assign_anything_else(manager: socket.socket, notifier: Notifier) -> None:
    notifier.status("a\nMAINPID=1 \u20ac")
    assert manager.recv(4096) == b"STATUS=a\\nMAINPID=1 \\u20ac"


def test_manager_that_sleeps_never_blocks(manager: socket.socket, notifier: Notifier) -> None:
    answers = [notifier.watchdog() for _ in range(2000)]
    assert answers[0] is True
    assert answers[-1] is False


def test_without_a_socket_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notifier = Notifier()
    assert notifier.ready("x")
    assert notifier.fileno() == -1
    notifier.close()


def test_socket_that_is_gone_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "none"))
    assert Notifier().ready("x")


def test_abandoned_descriptor_stays_open(notifier: Notifier) -> None:
    """In a child its number may be another's already."""
    number = notifier.fileno()
    notifier.abandon()
    assert notifier.fileno() == -1
    os.close(number)  # would fail if it had been closed


@pytest.mark.parametrize(
    ("environ", "interval_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_watchdog_is_served_at_half_of_its_time(environ: dict[str, str], interval_s: float | None) -> None:
    assert Notifier(environ).watchdog_interval_s() == interval_s
