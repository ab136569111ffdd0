"""An mps link goes on where the server says, counts each packet once, and says when a promise was broken."""

from __future__ import annotations

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
from mpserverd.load.link import LinkState
from mpserverd.load.mps_link import MpsLink
from mpserverd.load.scenario import Scenario

DEADLINE_S = 10
SIZE = 1000
EPOCH = 0xABCDEF
MS = 1_000_000


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(DEADLINE_S)
        yield server


def make_link(listener: socket.socket, **options: Any) -> MpsLink:
    target = ((int(socket.AF_INET), listener.getsockname()),)
    values: dict[str, Any] = {"rate": Fraction(0), "packets": 100, "duration_s": None, "packet_size": SIZE, "batch": 10}
    scenario = Scenario(target, protocol="mps", **(values | options))
    return MpsLink(scenario, 0, PacketBlock(SIZE, scenario.batch, 1), shared_block=True)


class Server:
    """The server's side of one connection."""

    def __init__(self, link: MpsLink, listener: socket.socket, answer: str | None = None) -> None:
        self.link = link
        link.begin_connect(time.monotonic_ns())
        self.sock, _ = listener.accept()
        self.sock.settimeout(DEADLINE_S)
        assert link.sock is not None and select.select([], [link.sock], [], DEADLINE_S)[1]
        link.end_connect(time.monotonic_ns())
        assert link.state is LinkState.GREETING
        self.hello = self.sock.recv(512).decode()
        if answer is not None:
            self.say(answer)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()
        if self.link.sock is not None:
            self.link.sock.close()

    def say(self, text: str, now_ns: int | None = None) -> None:
        """Send it, and let the link hear it."""
        self.sock.sendall(text.encode())
        hear(self.link, now_ns)

    def ok(self, next_packet: int) -> Server:
        self.say(f"OK {next_packet} durable {EPOCH:016x}\n")
        assert self.link.state is LinkState.OPEN
        return self

    def take(self, size_bytes: int) -> bytes:
        content = b""
        while len(content) < size_bytes:
            content += self.sock.recv(size_bytes - len(content))
        return content

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()
        hear(self.link)


def hear(link: MpsLink, now_ns: int | None = None) -> None:
    assert link.sock is not None and select.select([link.sock], [], [], DEADLINE_S)[0]
    link.on_readable(time.monotonic_ns() if now_ns is None else now_ns)


def as_sent(link: MpsLink, first: int, count: int) -> bytes:
    return ExpectedPackets(link.scenario, link.begin_ns).packets(0, first, count).tobytes()


def test_the_first_hello_asks_for_a_stream_of_its_own(listener: socket.socket) -> None:
    with Server(make_link(listener), listener) as server:
        assert server.hello == "MPS/1 mpload-1-0 1000 new=1\n"
    with Server(make_link(listener, client_prefix="bench", seed=9), listener) as server:
        assert server.hello == "MPS/1 bench-0 1000 new=1\n"


def test_a_packet_is_over_when_it_is_acknowledged(listener: socket.socket) -> None:
    link = make_link(listener)
    link.start(1, 0)
    with Server(link, listener) as server:
        server.ok(0)
        link.send_due(time.monotonic_ns(), 100)
        assert server.take(100 * SIZE)[:8] == bytes(8)
        assert link.all_sent and not link.finished
        server.say("ACK 99\n")
        assert not link.finished and link.acked == 99
        server.say("ACK 100\n")
        assert link.finished
        link.begin_close(time.monotonic_ns())
        assert server.sock.recv(1) == b""
    result = link.result()
    assert (result.packets, result.packets_acked, result.packets_resent) == (100, 100, 0)
    assert (result.client_id, result.level, result.epoch) == ("mpload-1-0", "durable", f"{EPOCH:016x}")


def test_after_a_break_it_goes_on_where_the_server_says_with_the_same_bytes(listener: socket.socket) -> None:
    link = make_link(listener, rate=Fraction(1_000_000))
    link.start(1, 0)
    with Server(link, listener).ok(0) as server:
        link.send_due(time.monotonic_ns(), 100)
        server.say("ACK 30\n")
        server.take(100 * SIZE)
        server.reset()
        assert link.state is LinkState.WAITING and link.errors_by_reason == {"ECONNRESET": 1}
    with Server(link, listener) as server:
        assert server.hello == f"MPS/1 mpload-1-0 1000 epoch={EPOCH:016x} first=30\n"
        server.ok(40)
        link.send_due(time.monotonic_ns(), 100)
        assert server.take(60 * SIZE) == as_sent(link, 40, 60)
        server.say("ACK 100\n")
        assert link.finished
    result = link.result()
    assert (result.packets, result.packets_acked, result.packets_resent, result.packets_unsent) == (100, 100, 60, 0)
    assert [record.first_index for record in result.connections] == [0, 40]


def test_an_acknowledgement_is_late_by_what_has_passed_since_the_batch_was_due(listener: socket.socket) -> None:
    """Three batches of 10, a millisecond apart; the OK after a break acknowledges too."""
    link = make_link(listener, rate=Fraction(10_000), packets=30)
    start_ns = time.monotonic_ns() - 10 * MS
    link.start(start_ns, 0)
    with Server(link, listener).ok(0) as server:
        link.send_due(time.monotonic_ns(), 100)
        server.take(30 * SIZE)
        server.say("ACK 9\n", start_ns + 50 * MS)
        assert link.acknowledging.count == 0
        server.say("ACK 15\n", start_ns + 100 * MS)
        assert (link.acknowledging.count, link.acknowledging.max_ns) == (1, 100 * MS)
        server.reset()
    with Server(link, listener) as server:
        server.say(f"OK 30 durable {EPOCH:016x}\n", start_ns + 5000 * MS)
    assert (link.acknowledging.count, link.acknowledging.max_ns) == (3, 4999 * MS)
    assert link.finished and link.result().acked_s == 5.0


def test_flat_out_a_block_is_acknowledged_from_when_it_was_first_made(listener: socket.socket) -> None:
    link = make_link(listener, packets=20)
    link.start(1, 0)
    with Server(link, listener).ok(0) as server:
        link.send_due(time.monotonic_ns(), 1)
        made_ns = time.monotonic_ns()
        server.reset()
    with Server(link, listener).ok(0) as server:
        link.send_due(time.monotonic_ns(), 100)
        server.say("ACK 20\n", made_ns + 700 * MS)
    assert link.acknowledging.count == 2 and link.acknowledging.max_ns >= 700 * MS


def test_an_acknowledgement_that_falls_is_ignored_and_a_torn_line_is_none(listener: socket.socket) -> None:
    link = make_link(listener)
    link.start(1, 0)
    with Server(link, listener).ok(0) as server:
        link.send_due(time.monotonic_ns(), 100)
        server.say("ACK 50\nACK 4\n\nAC")
        assert link.acked == 50 and link.state is LinkState.OPEN
        server.say("K 60\n")
        assert link.acked == 60


@pytest.mark.parametrize("line", ["ACK 101\n", "hello\n", "OK 0 durable 0000000000abcdef\n", "x" * 600])
def test_a_server_that_talks_nonsense_is_left(listener: socket.socket, line: str) -> None:
    link = make_link(listener)
    link.start(1, 0)
    with Server(link, listener).ok(0) as server:
        link.send_due(time.monotonic_ns(), 100)
        server.say(line)
        assert link.state is LinkState.WAITING and link.errors_by_reason == {"protocol": 1}
        assert link.records[0].broken == "protocol" and link.acked == 0


def test_packets_that_were_acknowledged_and_are_gone_are_counted_and_sent_again(listener: socket.socket) -> None:
    link = make_link(listener)
    link.start(1, 0)
    with Server(link, listener).ok(0) as server:
        link.send_due(time.monotonic_ns(), 100)
        server.say("ACK 80\n")
        server.reset()
    with Server(link, listener).ok(70) as server:
        link.send_due(time.monotonic_ns(), 100)
        server.take(30 * SIZE)
        assert not link.finished
        server.say("ACK 100\n")
    assert link.finished and link.result().packets_withdrawn == 10


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (f"OK 5 durable {EPOCH:016x}\n", "not_a_new_stream"),
        ("ERR client-id no\n", "refused_client-id"),
        ("ERR what-is-this new to us\n", "refused_what-is-this"),
    ],
)
def test_a_server_that_will_not_do_is_given_up(listener: socket.socket, answer: str, reason: str) -> None:
    link = make_link(listener)
    with Server(link, listener, answer):
        assert link.state is LinkState.DONE and link.errors_by_reason == {reason: 1} and link.sock is None


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("OK 100 durable 0000000000000001\n", "other_epoch"),
        (f"OK 101 durable {EPOCH:016x}\n", "beyond_what_was_sent"),
        ("ERR epoch another one\n", "refused_epoch"),
    ],
)
def test_a_stream_that_is_another_one_is_given_up(listener: socket.socket, answer: str, reason: str) -> None:
    link = make_link(listener)
    link.start(1, 0)
    with Server(link, listener).ok(0) as server:
        link.send_due(time.monotonic_ns(), 100)
        server.take(100 * SIZE)
        server.reset()
    with Server(link, listener, answer):
        assert link.state is LinkState.DONE and reason in link.errors_by_reason


@pytest.mark.parametrize("answer", ["ERR busy 100 clients already\n", "ERR unavailable later\n"])
def test_a_refusal_that_passes_is_tried_again(listener: socket.socket, answer: str) -> None:
    link = make_link(listener)
    with Server(link, listener, answer):
        assert link.state is LinkState.WAITING and link.wake_ns is not None
    with Server(link, listener).ok(0):
        assert link.result().errors == 1


def test_a_goodbye_is_no_error_and_its_pause_is_kept(listener: socket.socket) -> None:
    link = make_link(listener)
    link.start(1, 0)
    with Server(link, listener).ok(0) as server:
        link.send_due(time.monotonic_ns(), 1)
        server.say("ACK 10\nBYE superseded retry=7\n", 1_000)
        assert link.state is LinkState.WAITING and link.wake_ns == 7_000_001_000
    assert link.errors == 0 and link.records[0].bye == "superseded" and link.records[0].broken is None
    with Server(link, listener, "BYE stopping\n"):
        assert link.state is LinkState.WAITING and link.errors == 0


def test_a_goodbye_that_a_reset_follows_is_heard_all_the_same(listener: socket.socket) -> None:
    """The client finds out by sending: what the server said before is in its buffer still."""
    link = make_link(listener)
    link.start(1, 0)
    with Server(link, listener).ok(0) as server:
        link.send_due(time.monotonic_ns(), 1)
        server.sock.sendall(b"ACK 5\nBYE stopping\n")
        server.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        server.sock.close()
        assert link.sock is not None and select.select([link.sock], [], [], DEADLINE_S)[0]
        link.send_due(time.monotonic_ns(), 100)
    assert link.state is LinkState.WAITING and link.errors == 0
    assert (link.acked, link.records[0].bye) == (5, "stopping")


def test_a_hello_that_nobody_answers_times_out(listener: socket.socket) -> None:
    link = make_link(listener, connect_timeout_s=0.5)
    with Server(link, listener):
        assert link.wake_ns is not None
        link.on_timeout(link.wake_ns)
        assert link.errors_by_reason == {"hello_timeout": 1} and link.state is LinkState.WAITING
    with Server(link, listener) as server:
        server.sock.close()
        hear(link)
        assert link.errors_by_reason == {"hello_timeout": 1, "hello_unanswered": 1} and not link.records


def test_what_was_sent_once_is_sent_again_even_after_the_stop(listener: socket.socket) -> None:
    link = make_link(listener, packets=None, duration_s=60.0)
    link.start(1, 0)
    with Server(link, listener).ok(0) as server:
        link.send_due(time.monotonic_ns(), 5)
        server.take(50 * SIZE)
        server.reset()
    link.stop(time.monotonic_ns())
    assert link.index_end == 50 and not link.finished
    with Server(link, listener).ok(20) as server:
        link.send_due(time.monotonic_ns(), 100)
        assert len(server.take(30 * SIZE)) == 30 * SIZE
        server.say("ACK 50\n")
    assert link.finished and link.result().packets == 50


def test_a_stop_while_the_kernel_takes_no_more_completes_the_packet(listener: socket.socket) -> None:
    link = make_link(listener, packets=100_000, send_buffer_bytes=4096, batch=200)
    link.start(1, 0)
    with Server(link, listener).ok(0) as server:
        while link._pending is None or not link.records[0].sent_bytes % SIZE:
            link.send_due(time.monotonic_ns(), 1000)
            server.sock.recv(33)
        link.stop(time.monotonic_ns())
        while not link.all_sent:
            server.sock.recv(1 << 16)
            link.send_due(time.monotonic_ns(), 1)
        assert link.records[0].sent_bytes == link.index_end * SIZE == link.packets * SIZE


def test_what_nobody_acknowledged_is_an_error_at_the_end(listener: socket.socket) -> None:
    link = make_link(listener)
    link.start(1, 0)
    with Server(link, listener).ok(0):
        link.send_due(time.monotonic_ns(), 100)
        link.begin_close(time.monotonic_ns())
        assert link.state is LinkState.DONE and link.errors_by_reason == {"unacknowledged": 1}
