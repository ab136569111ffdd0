"""What a supervisor had in hand when it was killed is in a carrier afterwards."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import pathlib
import signal
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from mpserverd.arena.state import Con, ConnectionState, StateTable
from mpserverd.net.tcp_info import cookie
from mpserverd.supervisor.carrier import Carrier
from mpserverd.supervisor.guard import Guard

DEADLINE_S = 20.0


class Scene:
    """A supervisor is a forked process here; this one plays clients, systemd's store and the next supervisor."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.state = StateTable.create(connections=8, streams=8, slots=8)
        self.carriers = [Carrier.make(), Carrier.make()]
        self.clients: list[socket.socket] = []
        self._said, self._say = os.pipe()

    def connect(self, content: bytes) -> socket.socket:
        client = socket.create_connection(self.listener.getsockname(), timeout=DEADLINE_S)
        client.sendall(content)
        self.clients.append(client)
        return client

    def supervisor(self, life: Callable[[Guard], object], carriers: int = 1) -> int:
        """Fork one that lives ``life`` and is killed at its end, guarded. Returns its pid."""
        pid = os.fork()
        if pid == 0:
            try:
                os.close(self._said)
                for client in self.clients:
                    client.close()
                guard = Guard(self.state)
                guard.begin()
                guard.point_at([carrier.ends[0] for carrier in self.carriers[:carriers]])
                self.say(guard.pid)
                life(guard)
            finally:
                os.kill(os.getpid(), signal.SIGKILL)
        return pid

    def said(self) -> int:
        """The next number that the supervisor says; the guard's pid is the first."""
        digits = b""
        while not digits.endswith(b"\n"):
            digits += os.read(self._said, 1)
        return int(digits)

    def say(self, number: int) -> None:
        os.write(self._say, b"%d\n" % number)

    def found(self, carrier: int = 0) -> list[tuple[int, int]]:
        """What a carrier holds once the guard is gone."""
        found = list(self.carriers[carrier].take_all())
        for _, fd in found:
            self.clients.append(socket.socket(fileno=fd))
        return found

    def wait_until_gone(self, pid: int) -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        while pathlib.Path(f"/proc/{pid}").exists() and "(zombie)" not in status(pid):
            assert time.monotonic() < deadline_s, "the guard goes on"
            time.sleep(0.002)

    def close(self) -> None:
        for carrier in self.carriers:
            carrier.close()
        for sock in (self.listener, *self.clients):
            sock.close()
        os.close(self._said)
        os.close(self._say)
        os.close(self.state.fd)


def status(pid: int) -> str:
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{pid}/status").read_text()
    return "(zombie)"


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene()
    yield made
    made.close()


def test_a_connection_that_was_accepted_an_instant_ago_outlives_the_supervisor(scene: Scene) -> None:
    client = scene.connect(b"first packets")
    pid = scene.supervisor(lambda _: scene.listener.accept()[0].detach())
    guard = scene.said()
    os.waitpid(pid, 0)
    scene.wait_until_gone(guard)
    [(_, fd)] = scene.found()
    accepted = scene.clients[-1]
    assert accepted.fileno() == fd
    client.sendall(b", and more")
    assert accepted.recv(13) + accepted.recv(10) == b"first packets, and more"


def test_connections_with_a_row_and_listeners_are_left_alone(scene: Scene) -> None:
    """They are in a carrier, or stored, already."""

    def life(_: Guard) -> None:
        known, _ = scene.listener.accept()
        row = scene.state.connections[3]
        row[Con.COOKIE], row[Con.STATE] = cookie(known), ConnectionState.ASSIGNED
        known.detach()
        unknown, _ = scene.listener.accept()
        scene.say(cookie(unknown))
        unknown.detach()

    scene.connect(b"known")
    scene.connect(b"unknown")
    pid = scene.supervisor(life, carriers=2)
    guard = scene.said()
    os.waitpid(pid, 0)
    scene.wait_until_gone(guard)
    wanted = [scene.said()]
    for carrier in (0, 1):  # while one replaces the other it goes into both
        assert [cookie for cookie, _ in scene.found(carrier)] == wanted


def test_what_the_supervisor_closes_is_closed_although_the_guard_lives(scene: Scene) -> None:
    client = scene.connect(b"")

    def life(guard: Guard) -> None:
        accepted, _ = scene.listener.accept()
        accepted.close()
        signal.pause()

    pid = scene.supervisor(life)
    assert client.recv(1) == b""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    scene.wait_until_gone(scene.said())
    assert scene.found() == []


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_guard_that_cannot_be_made_leaves_nothing(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    """No signal stays blocked, and no process and no descriptor remains, however often it is tried."""
    real, calls = os.pidfd_open, itertools.count(1)

    def fail(pid: int) -> int:
        if next(calls) % 2 == fails_at % 2:
            raise OSError(errno.EMFILE, "Too many open files")
        return real(pid)

    guard = Guard(scene.state)
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "pidfd_open", fail)
    for _ in range(3):
        with pytest.raises(OSError, match="Too many"):
            guard.begin()
        next(calls) if fails_at == 1 else None
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert len(os.listdir("/proc/self/fd")) == before
    assert guard.pid == 0


def test_it_ends_with_a_supervisor_that_ends_it_and_hears_no_signal_before(scene: Scene) -> None:
    def life(guard: Guard) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(guard.pid, number)
        assert os.waitpid(guard.pid, os.WNOHANG) == (0, 0)
        guard.end()
        os._exit(7)

    pid = scene.supervisor(life)
    guard = scene.said()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert not pathlib.Path(f"/proc/{guard}").exists()
