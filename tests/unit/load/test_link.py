"""A link goes through its states in order, keeps packets whole over broken connections, and leaves no socket behind."""

from __future__ import annotations

import itertools
import select
import socket
import struct
import time
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest

from mpserverd.client.packets import PacketBlock
from mpserverd.load.expected import ExpectedPackets
from mpserverd.load.link import MOVES, READ, WRITE, Link, LinkState, address_text
from mpserverd.load.scenario import Scenario

DEADLINE_S = 10
BLOCK_PACKETS = 200
"""The kernel takes some 64 KiB or all of a write; only a larger one is cut inside a packet."""


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(DEADLINE_S)
        yield server


def make_link(listener: socket.socket, **options: Any) -> Link:
    target = ((int(socket.AF_INET), listener.getsockname()),)
    options = {"rate": Fraction(0), "packets": 100, "duration_s": None, "packet_size": 1000} | options
    scenario = Scenario(target, **options)
    return Link(scenario, 0, PacketBlock(scenario.packet_size, BLOCK_PACKETS, 1), shared_block=True)


def open_link(link: Link, listener: socket.socket) -> socket.socket:
    """Connect it; returns the server's side."""
    link.begin_connect(time.monotonic_ns())
    accepted, _ = listener.accept()
    accepted.settimeout(DEADLINE_S)
    assert link.sock is not None and link.wants == WRITE
    assert select.select([], [link.sock], [], DEADLINE_S)[1]
    link.end_connect(time.monotonic_ns())
    assert link.state is LinkState.OPEN
    return accepted


def read_all(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(1 << 20), b""))


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def until_readable(link: Link) -> None:
    assert link.sock is not None
    assert select.select([link.sock], [], [], DEADLINE_S)[0]


@pytest.mark.parametrize(("before", "after"), list(itertools.product(LinkState, LinkState)))
def test_only_moves_of_the_table_are_made(listener: socket.socket, before: LinkState, after: LinkState) -> None:
    link = make_link(listener)
    link.state = before
    if after in MOVES[before]:
        link._move(after)
        assert link.state is after
    else:
        with pytest.raises(RuntimeError, match=f"from {before.value} to {after.value}"):
            link._move(after)


def test_every_packet_arrives_and_the_close_is_confirmed(listener: socket.socket) -> None:
    link = make_link(listener)
    received = b""
    with open_link(link, listener) as server:
        link.start(time.monotonic_ns(), 0)
        while not link.finished:
            link.send_due(time.monotonic_ns(), 100)
            received += server.recv(1 << 20)
        link.begin_close(time.monotonic_ns())
        assert link.state is LinkState.CLOSING
        received += read_all(server)
    until_readable(link)
    link.on_readable(time.monotonic_ns())
    assert link.state is LinkState.DONE and link.sock is None
    again = ExpectedPackets(link.scenario, 0)
    assert len(received) == 100_000 and again.first_difference(0, 0, [received]) is None
    result = link.result()
    assert (result.packets, result.bytes, result.errors, result.packets_unsent) == (100, 100_000, 0, 0)
    assert result.connections[0].unconfirmed_bytes == 0


def test_a_new_connection_begins_with_a_whole_packet(listener: socket.socket) -> None:
    """The server resets in the middle of a packet; nothing of that packet goes to the next connection."""
    link = make_link(listener, packets=20_000, send_buffer_bytes=4096)
    first = open_link(link, listener)
    link.start(time.monotonic_ns(), 0)
    while link.wants == READ | WRITE or link.wants == READ:
        link.send_due(time.monotonic_ns(), 1000)
        if link.records[0].sent_bytes % 1000 and link._pending is not None:
            break
        first.recv(77)
    torn_bytes = link.records[0].sent_bytes
    assert torn_bytes % 1000
    reset(first)
    until_readable(link)
    link.on_readable(time.monotonic_ns())
    assert link.state is LinkState.WAITING and link.wake_ns is not None
    with open_link(link, listener) as second:
        link.send_due(time.monotonic_ns(), 1)
        (sequence,) = struct.unpack("<Q", second.recv(1000)[:8])
        assert sequence == torn_bytes // 1000 + 1 == link.records[1].first_index
        assert link.packets == torn_bytes // 1000 + link.records[1].sent_bytes // 1000
        link.stop(time.monotonic_ns())
        link.begin_close(time.monotonic_ns())
    while link.state is LinkState.CLOSING:
        until_readable(link)
        link.on_readable(time.monotonic_ns())
    assert link.reconnects == 1 and link.records[0].broken == "ECONNRESET"


def test_a_refused_attempt_is_tried_again_later() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        link = make_link(server)
    now_ns = time.monotonic_ns()
    link.begin_connect(now_ns)
    if link.state is LinkState.CONNECTING:
        assert link.sock is not None
        assert select.select([], [link.sock], [], DEADLINE_S)[1]
        link.end_connect(now_ns)
    assert link.state is LinkState.WAITING and link.sock is None
    assert link.errors_by_reason == {"connect_ECONNREFUSED": 1}
    assert link.wake_ns is not None and 0 < link.wake_ns - now_ns <= 10**8


def test_an_attempt_that_nobody_answers_times_out(listener: socket.socket) -> None:
    link = make_link(listener, connect_timeout_s=0.5)
    link.begin_connect(1_000)
    assert link.wake_ns == 500_001_000
    link.on_timeout(link.wake_ns)
    assert link.errors_by_reason == {"connect_ETIMEDOUT": 1} and link.sock is None


def test_an_address_that_is_not_ours_is_a_failed_attempt(listener: socket.socket) -> None:
    link = make_link(listener, source_addresses=("192.0.2.1",))
    link.begin_connect(0)
    assert link.errors_by_reason == {"connect_EADDRNOTAVAIL": 1} and link.sock is None


def test_a_server_that_closes_first_broke_the_connection(listener: socket.socket) -> None:
    link = make_link(listener)
    open_link(link, listener).close()
    until_readable(link)
    link.on_readable(time.monotonic_ns())
    assert link.state is LinkState.WAITING and link.errors_by_reason == {"closed_by_peer": 1}


def test_a_server_that_never_closes_is_given_up(listener: socket.socket) -> None:
    link = make_link(listener, packets=1)
    with open_link(link, listener):
        link.start(0, 0)
        link.send_due(time.monotonic_ns(), 1)
        link.begin_close(0)
        assert link.wake_ns == 10 * 10**9
        link.on_timeout(link.wake_ns)
    assert link.state is LinkState.DONE and link.errors_by_reason == {"close_timeout": 1}


def test_a_stopped_link_completes_its_packet_only(listener: socket.socket) -> None:
    link = make_link(listener, packets=100_000, send_buffer_bytes=4096)
    with open_link(link, listener) as server:
        link.start(time.monotonic_ns(), 0)
        while link.wants != READ | WRITE or link._pending is None or not link.records[0].sent_bytes % 1000:
            link.send_due(time.monotonic_ns(), 1000)
            server.recv(33)
        link.stop(time.monotonic_ns())
        while not link.finished:
            server.recv(1 << 16)
            link.send_due(time.monotonic_ns(), 1)
        assert link.records[0].sent_bytes == link.index * 1000 == link.packets * 1000
        link.begin_close(time.monotonic_ns())
        read_all(server)
    until_readable(link)
    link.on_readable(time.monotonic_ns())
    assert link.state is LinkState.DONE


def test_time_without_a_connection_counts(listener: socket.socket) -> None:
    """A client that lost its connection early did not reach its rate, though all that it sent went out in time."""
    link = make_link(listener, rate=Fraction(1000), packets=1000, batch=10)
    link.start(0, 0)
    link.stop(900_000_000)
    result = link.result()
    assert (result.packets_unsent, result.elapsed_s) == (1000, 0.9)


def test_addresses_are_written_as_the_daemon_writes_them() -> None:
    assert address_text(("127.0.0.1", 80)) == "127.0.0.1:80"
    assert address_text(("::ffff:127.0.0.1", 80, 0, 0)) == "127.0.0.1:80"
    assert address_text(("fe80::1%eth0", 80, 0, 2)) == "[fe80::1]:80"


def test_an_attempt_is_never_said_to_have_begun_after_it_was_accepted(listener: socket.socket) -> None:
    """Whoever looks for the connection's stream goes by that, also when the turn of the loop began long ago."""
    link = make_link(listener)
    link.begin_connect(time.monotonic_ns())
    accepted, _ = listener.accept()
    accepted_ns = time.time_ns()
    turn_ns = time.monotonic_ns()
    time.sleep(0.02)  # another client had its turn first: the lateness is the subject
    link.end_connect(turn_ns)
    assert link.records[0].attempt_unix_ns <= accepted_ns
    accepted.close()
    assert link.sock is not None
    link.sock.close()
