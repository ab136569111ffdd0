"""Sockets from a socket unit are found by name, and only when they are what the listener says."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from mpserverd.config.schema import ListenerConfig
from mpserverd.errors import StartError
from mpserverd.net import inherited
from mpserverd.supervisor.fd_store import claim


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


def environ_for(sock: socket.socket, monkeypatch: pytest.MonkeyPatch, name: str = "raw") -> dict[str, str]:
    """As if that socket had been passed as the first one."""
    monkeypatch.setattr(inherited, "FIRST_FD", sock.fileno())
    return {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": name}


def address_of(sock: socket.socket) -> str:
    return f"127.0.0.1:{sock.getsockname()[1]}"


def test_names_are_those_of_the_environment() -> None:
    environ = {"LISTEN_PID": "7", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "raw:presses"}
    assert inherited.passed_fds(environ, pid=7) == {"raw": 3, "presses": 4}


def test_what_the_daemon_had_stored_itself_is_nobodys_any_more() -> None:
    """Else a listener of ours out of systemd's store would be taken for a socket unit's, and never make place."""
    environ = {"LISTEN_PID": "7", "LISTEN_FDS": "3", "LISTEN_FDNAMES": "state:raw:listener-mps"}
    claim({"state", "listener-mps"}, environ)
    assert inherited.passed_fds(environ, pid=7) == {"raw": 4}


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"LISTEN_PID": "8", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "raw"},
        {"LISTEN_PID": "7", "LISTEN_FDS": "two", "LISTEN_FDNAMES": "raw"},
        {"LISTEN_PID": "7", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "raw"},
    ],
    ids=["nothing", "for another process", "no number", "names missing"],
)
def test_nothing_is_passed_unless_all_of_it_fits(environ: dict[str, str]) -> None:
    assert inherited.passed_fds(environ, pid=7) == {}


def test_passed_socket_is_taken_and_can_be_closed(listening: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = environ_for(listening, monkeypatch)
    taken = inherited.try_claim(ListenerConfig(address=address_of(listening)), environ)
    assert taken is not None
    assert not os.get_inheritable(taken.fileno())
    assert taken.getsockname() == listening.getsockname()
    taken.close()
    assert listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


def test_socket_of_another_name_is_left_alone(listening: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = environ_for(listening, monkeypatch, name="carrier")
    assert inherited.try_claim(ListenerConfig(address=address_of(listening)), environ) is None


def test_socket_on_another_port_is_refused(listening: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = environ_for(listening, monkeypatch)
    with pytest.raises(StartError, match=r"not on 127\.0\.0\.1:1;"):
        inherited.try_claim(ListenerConfig(address="127.0.0.1:1"), environ)


def test_socket_that_does_not_listen_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as sock, pytest.raises(StartError, match="does not listen"):
        inherited.try_claim(ListenerConfig(), environ_for(sock, monkeypatch))


def test_unix_socket_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX) as sock, pytest.raises(StartError, match="not a TCP one"):
        inherited.try_claim(ListenerConfig(), environ_for(sock, monkeypatch))


def test_file_of_that_name_is_refused(tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    monkeypatch.setattr(inherited, "FIRST_FD", fd)
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "raw"}
    with pytest.raises(StartError, match="is no socket"):
        inherited.try_claim(ListenerConfig(), environ)
    os.close(fd)
