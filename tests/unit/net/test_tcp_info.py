"""The count of bytes that left a socket is exact, whatever the peer did. Oracle: what this test read itself."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from mpserverd.net import tcp_info


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        accepted.settimeout(5)
        with accepted:
            yield client, accepted


def wait_until_unread(sock: socket.socket, count: int) -> None:
    deadline_s = time.monotonic() + 5
    while tcp_info.unread_bytes(sock) != count:
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


def wait_for_fin(sock: socket.socket) -> None:
    deadline_s = time.monotonic() + 5
    while not tcp_info.consumed(sock).fin:
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_peer_is_known_even_of_a_connection_that_it_has_reset(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as server:
        client = socket.create_connection(server.getsockname()[:2])
        accepted, peer = server.accept()
        with accepted:
            assert tcp_info.peer(accepted) == peer[:2]
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
            with pytest.raises(ConnectionResetError):
                accepted.recv(1)
            with pytest.raises(OSError):
                accepted.getpeername()
            assert tcp_info.peer(accepted) == peer[:2]


def test_nothing_read_is_nothing_consumed(pair: tuple[socket.socket, socket.socket]) -> None:
    client, server = pair
    client.sendall(b"x" * 1000)
    wait_until_unread(server, 1000)
    assert tcp_info.consumed(server) == tcp_info.Consumed(0, 1000, fin=False, error=0)


@pytest.mark.parametrize("read", [0, 1, 999, 1000])
def test_a_fin_is_not_counted_as_a_byte(pair: tuple[socket.socket, socket.socket], read: int) -> None:
    client, server = pair
    client.sendall(b"x" * 1000)
    client.shutdown(socket.SHUT_WR)
    wait_for_fin(server)
    while read:
        read_now = len(server.recv(read))
        read -= read_now
    unread = tcp_info.unread_bytes(server)
    taken = tcp_info.consumed(server)
    assert (taken.consumed_bytes, taken.unread_bytes, taken.fin) == (1000 - unread, unread, True)


@pytest.mark.parametrize("fin_first", [False, True])
def test_bytes_before_a_reset_stay_readable_and_counted(
    pair: tuple[socket.socket, socket.socket], fin_first: bool
) -> None:
    client, server = pair
    client.sendall(b"x" * 1000)
    wait_until_unread(server, 1000)
    assert len(server.recv(300)) == 300
    if fin_first:
        client.shutdown(socket.SHUT_WR)
        wait_for_fin(server)
        server.send(b"unread by the peer")
        time.sleep(0.01)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    time.sleep(0.02)
    assert tcp_info.consumed(server).consumed_bytes == 300
    assert len(server.recv(2000)) == 700
    taken = tcp_info.consumed(server)
    assert taken.consumed_bytes == 1000
    if not fin_first:
        with contextlib.suppress(ConnectionResetError):
            server.recv(1)
        assert taken.error in (0, errno.ECONNRESET)


def test_urgent_data_is_counted_like_any_other(pair: tuple[socket.socket, socket.socket]) -> None:
    client, server = pair
    client.sendall(b"a" * 10)
    client.send(b"!", socket.MSG_OOB)
    client.sendall(b"b" * 10)
    wait_until_unread(server, 21)
    got = server.recv(15)
    assert tcp_info.consumed(server).consumed_bytes == len(got)
    rest = server.recv(100)
    assert got + rest == b"a" * 10 + b"!" + b"b" * 10
    assert tcp_info.consumed(server).consumed_bytes == 21


def test_the_count_is_exact_while_the_peer_keeps_sending(pair: tuple[socket.socket, socket.socket]) -> None:
    client, server = pair
    stop = threading.Event()

    def send() -> None:
        with contextlib.suppress(OSError):
            while not stop.is_set():
                client.sendall(b"z" * 7001)

    sender = threading.Thread(target=send)
    sender.start()
    taken = 0
    try:
        for number in range(300):
            taken += len(server.recv(1 + number * 37))
            assert tcp_info.consumed(server).consumed_bytes == taken
    finally:
        stop.set()
        server.close()
        sender.join()


def test_every_dup_has_the_same_cookie(pair: tuple[socket.socket, socket.socket]) -> None:
    client, server = pair
    with server.dup() as dup:
        assert tcp_info.cookie(dup) == tcp_info.cookie(server) != tcp_info.cookie(client)
