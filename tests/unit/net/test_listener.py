"""Listening sockets."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator

import pytest

from mpserverd.config.schema import ListenerConfig
from mpserverd.errors import StartError
from mpserverd.net.listener import ShortageError, bound_address, make_ready, open_listener, try_accept

LOCAL = ListenerConfig(address="127.0.0.1:0")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    sock = open_listener(LOCAL, 16)
    yield sock
    sock.close()


def connect(listener: socket.socket) -> socket.socket:
    return socket.create_connection(listener.getsockname()[:2])


def test_the_port_that_the_kernel_chose_is_told(listener: socket.socket) -> None:
    assert bound_address(listener) == f"127.0.0.1:{listener.getsockname()[1]}"


def test_a_taken_port_names_address_and_holder(listener: socket.socket) -> None:
    address = bound_address(listener)
    with pytest.raises(StartError) as error:
        open_listener(ListenerConfig(name="second", address=address), 16)
    assert address in str(error.value)
    assert "listener second" in str(error.value)
    assert f"pid {os.getpid()} (" in str(error.value)


def test_an_address_of_another_machine_is_an_error_in_words() -> None:
    with pytest.raises(StartError, match="no interface of this machine has that address"):
        open_listener(ListenerConfig(address="192.0.2.1:0"), 16)


def test_an_accepted_connection_has_the_options_of_its_listener(listener: socket.socket) -> None:
    with connect(listener):
        accepted = try_accept(listener)
        assert accepted is not None
        sock, host, _ = accepted
        with sock:
            make_ready(sock, LOCAL)
            assert host == "127.0.0.1"
            assert not sock.getblocking()
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE) == 1
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 2 * LOCAL.receive_buffer_bytes


def test_options_that_are_off_stay_off(listener: socket.socket) -> None:
    with connect(listener):
        accepted = try_accept(listener)
        assert accepted is not None
        with accepted[0] as sock:
            make_ready(sock, ListenerConfig(nodelay=False, keepalive=False, receive_buffer_bytes=0))
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 0


def test_an_empty_queue_gives_nothing(listener: socket.socket) -> None:
    assert try_accept(listener) is None


def test_out_of_descriptors_is_a_shortage_and_the_client_waits(listener: socket.socket) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with connect(listener):
        spare = os.open("/dev/null", os.O_RDONLY)
        os.close(spare)  # the lowest free number
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare, hard))
        try:
            with pytest.raises(ShortageError):
                try_accept(listener)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        accepted = try_accept(listener)
        assert accepted is not None
        accepted[0].close()


def test_a_socket_that_cannot_be_made_is_an_error_in_words() -> None:
    """At a reload it must not end the daemon."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = os.open("/dev/null", os.O_RDONLY)
    os.close(spare)
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare, hard))
    try:
        with pytest.raises(StartError, match=r"cannot listen on 127\.0\.0\.1:0: Too many open files"):
            open_listener(LOCAL, 16)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.skipif(not os.path.exists("/proc/net/if_inet6"), reason="no IPv6 here")
def test_an_ipv6_listener_takes_ipv4_unless_told_otherwise() -> None:
    both = open_listener(ListenerConfig(address="[::]:0"), 4)
    port = both.getsockname()[1]
    with both, socket.create_connection(("127.0.0.1", port)):
        accepted = try_accept(both)
        assert accepted is not None
        assert accepted[1] == "::ffff:127.0.0.1"
        accepted[0].close()
    only = open_listener(ListenerConfig(address="[::]:0"), 4, only_v6=True)
    with only, pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", only.getsockname()[1]))
