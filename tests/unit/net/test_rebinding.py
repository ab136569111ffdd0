"""Which sockets go on, and what happens to those that are in the way."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Iterator

import pytest

from mpserverd.config.schema import Config, ListenerConfig
from mpserverd.errors import StartError
from mpserverd.net import inherited
from mpserverd.net.listener import open_listener
from mpserverd.net.rebinding import kept_sockets, open_beside, stop_listening


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    """Listens on a port that was asked for."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
    made = open_listener(ListenerConfig(address=f"127.0.0.1:{port}"), 16)
    yield made
    made.close()


def port_of(sock: socket.socket) -> int:
    return int(sock.getsockname()[1])


def config(**addresses: str) -> Config:
    listeners = tuple(ListenerConfig(name=name, address=address) for name, address in addresses.items())
    return dataclasses.replace(Config(), listeners=listeners)


def listens(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def test_the_own_name_comes_before_another_with_the_same_address(sock: socket.socket) -> None:
    port = port_of(sock)
    assert kept_sockets(config(a="127.0.0.1:0"), {"a": sock, "b": sock}) == {"a": "a"}
    assert kept_sockets(config(a=f"127.0.0.1:{port}"), {"b": sock}) == {"a": "b"}


def test_port_0_takes_no_other_listeners_port(sock: socket.socket) -> None:
    assert kept_sockets(config(a="127.0.0.1:0"), {"b": sock}) == {}


def test_another_address_is_another_socket(sock: socket.socket) -> None:
    port = port_of(sock)
    assert kept_sockets(config(a=f"127.0.0.2:{port}"), {"a": sock}) == {}
    assert kept_sockets(config(a=f"0.0.0.0:{port}"), {"a": sock}) == {}


def test_one_that_is_in_the_way_makes_place_though_a_copy_of_it_is_held(sock: socket.socket) -> None:
    port = port_of(sock)
    wanted = config(a=f"0.0.0.0:{port}")
    with sock.dup():
        opened = open_beside(wanted.listeners, wanted, [sock], 16)
        with opened["a"]:
            assert listens(opened["a"])
            assert not listens(sock)


def test_one_that_made_place_in_vain_listens_again_on_its_port(sock: socket.socket) -> None:
    port = port_of(sock)
    wanted = config(a=f"0.0.0.0:{port}", b="192.0.2.1:0")
    with pytest.raises(StartError, match="no interface of this machine has that address"):
        open_beside(wanted.listeners, wanted, [sock], 16)
    assert port_of(sock) == port
    socket.create_connection(("127.0.0.1", port), timeout=10).close()


def test_a_port_that_the_kernel_chose_is_taken_back_too() -> None:
    with open_listener(ListenerConfig(address="127.0.0.1:0"), 16) as sock:
        port = port_of(sock)
        wanted = config(a=f"0.0.0.0:{port}", b="192.0.2.1:0")
        with pytest.raises(StartError):
            open_beside(wanted.listeners, wanted, [sock], 16)
        socket.create_connection(("127.0.0.1", port), timeout=10).close()


def test_a_socket_of_a_socket_unit_is_never_shut_down(sock: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PID", str(os.getpid())), ("FDS", "1"), ("FDNAMES", "raw")):
        monkeypatch.setenv(f"LISTEN_{name}", value)
    monkeypatch.setattr(inherited, "FIRST_FD", sock.fileno())
    with sock.dup() as copy:
        stop_listening(copy)
        assert listens(sock)
    for name in ("PID", "FDS", "FDNAMES"):
        monkeypatch.delenv(f"LISTEN_{name}")
    stop_listening(sock)
    assert not listens(sock)
