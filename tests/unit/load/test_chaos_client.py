"""A chaos client sends exactly what it says it sent, however its connections end. Time is an argument: nobody waits."""

from __future__ import annotations

import hashlib
import select
import socket
from collections.abc import Iterator

import pytest

from mpserverd.load.chaos_client import NS_PER_S, ChaosClient, ClientState
from mpserverd.load.chaos_content import Content
from mpserverd.load.chaos_plan import ClientPlan, Habit
from mpserverd.load.chaos_sent import ENDED, RESET

SEED = 9
TURN_NS = 2_000_000
TURNS_MAX = 20_000
SIZE = 24


class Server:
    """Takes every connection and all that comes, unless it is told not to read."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        self.listener.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384
        )  # else the kernel makes it larger as it likes
        self.address: tuple[str, int] = self.listener.getsockname()
        self.content: list[bytearray] = []
        self.ends: list[str] = []
        self.open: dict[socket.socket, int] = {}
        self.reads = True

    def turn(self) -> None:
        try:
            sock, _ = self.listener.accept()
            sock.setblocking(False)
            self.open[sock] = len(self.content)
            self.content.append(bytearray())
            self.ends.append("")
        except BlockingIOError:
            pass
        for sock, number in list(self.open.items()) if self.reads else []:
            self.read(sock, number)

    def read(self, sock: socket.socket, number: int) -> None:
        try:
            while received := sock.recv(1 << 16):
                self.content[number] += received
            self.ends[number] = "FIN"
        except BlockingIOError:
            return
        except ConnectionResetError:
            self.ends[number] = "RST"
        self.close(sock)

    def close(self, sock: socket.socket) -> None:
        del self.open[sock]
        sock.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in list(self.open):
            self.close(sock)
        self.listener.close()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


class Run:
    """A client, the server, and a clock that goes by 2 ms a turn."""

    def __init__(
        self, server: Server, habit: Habit, *, named: bool = False, size: int = SIZE, rate: float = 1e5
    ) -> None:
        self.server, self.now_ns = server, NS_PER_S
        plan = ClientPlan(3, "127.1.0.4", size, rate, habit, named)
        self.client = ChaosClient(plan, server.address, SEED)
        self.turns = 0

    def turn(self) -> None:
        self.turns += 1
        assert self.turns < TURNS_MAX, f"the client is {self.client.state.value} for ever"
        client = self.client
        if client.wake_ns is not None and client.wake_ns <= self.now_ns:
            client.wake(self.now_ns)
        if client.sock is not None:
            poll = select.poll()
            poll.register(client.sock, client.wants)
            for _, events in poll.poll(0):
                client.serve(events, self.now_ns)
        self.server.turn()
        self.now_ns += TURN_NS

    def until_connections(self, count: int) -> None:
        while len([end for end in self.server.ends if end]) < count:
            self.turn()

    def to_the_end(self) -> None:
        self.client.finish(self.now_ns)
        while self.client.state is not ClientState.DONE or self.server.open:
            self.turn()


def content(number: int, size: int, length: int) -> bytes:
    """The first ``length`` bytes of a stream."""
    made = Content(SEED, 3, number, size)
    return b"".join(made.piece(at, min(at + 60_000, length)).tobytes() for at in range(0, length, 60_000))


@pytest.mark.parametrize("habit", list(Habit))
@pytest.mark.parametrize("size", [7, 1500])
def test_each_connection_of_an_unnamed_client_is_a_stream_with_a_content_of_its_own(
    server: Server, habit: Habit, size: int
) -> None:
    run = Run(server, habit, size=size)
    returns = habit not in (Habit.STEADY, Habit.STALLING)
    run.until_connections(3 if returns else 0)
    for _ in range(2000):
        run.turn()
    run.to_the_end()
    assert len(run.client.streams) == len(server.content) >= (3 if returns else 1)
    for stream, received in zip(run.client.streams, server.content, strict=True):
        whole = bytes(received[: len(received) // size * size])
        assert (stream.whole_bytes, stream.sha256) == (len(whole), hashlib.sha256(whole).hexdigest())
        assert whole == content(stream.number, size, len(whole))
    torn = sum(len(received) % size for received in server.content)
    assert run.client.totals.truncated_bytes == torn
    assert run.client.totals.sent_bytes == sum(map(len, server.content))
    assert bool(torn) == (habit in (Habit.TORN, Habit.RESETTING))
    assert (run.client.totals.disconnects, run.client.totals.refusals) == (0, 0)


@pytest.mark.parametrize("habit", [Habit.RETURNING, Habit.TORN, Habit.RESETTING])
def test_the_connections_of_a_named_client_go_on_where_the_last_one_was_whole(server: Server, habit: Habit) -> None:
    run = Run(server, habit, named=True)
    run.until_connections(4)
    run.to_the_end()
    (stream,) = run.client.streams
    pieces = [bytes(received[: len(received) // SIZE * SIZE]) for received in server.content]
    whole = b"".join(pieces)
    assert whole == content(0, SIZE, len(whole))
    assert (stream.whole_bytes, stream.sha256) == (len(whole), hashlib.sha256(whole).hexdigest())
    ends = [sum(map(len, pieces[: end + 1])) for end in range(len(pieces))]
    assert [(each.begin, each.end) for each in stream.connections] == list(zip([0, *ends], ends, strict=False))
    assert len({each.port for each in stream.connections}) == len(pieces)
    assert sum(each.torn_bytes for each in stream.connections) == run.client.totals.truncated_bytes
    assert {each.how for each in stream.connections} == {RESET if habit is Habit.RESETTING else ENDED}
    assert all(each.opened_ns < each.closed_ns for each in stream.connections)


def test_a_resetting_client_resets_and_a_returning_one_does_not(server: Server) -> None:
    run = Run(server, Habit.RESETTING)
    run.until_connections(2)
    run.to_the_end()
    assert set(server.ends) == {"RST"}


def test_the_time_in_which_the_kernel_takes_nothing_is_a_pause(server: Server) -> None:
    run = Run(server, Habit.STEADY, rate=1e9)
    while not server.content or not server.content[0]:
        run.turn()
    server.reads = False
    for _ in range(600):
        run.turn()
    assert run.client.longest_pause_ns(run.now_ns) >= 500 * TURN_NS and not run.client.totals.longest_pause_ns
    server.reads = True
    run.to_the_end()
    assert NS_PER_S <= run.client.totals.longest_pause_ns <= 1.5 * NS_PER_S
    assert any(end - begin == run.client.totals.longest_pause_ns for begin, end in run.client.pauses)


def test_a_stall_of_its_own_is_no_pause(server: Server) -> None:
    run = Run(server, Habit.STALLING)
    for _ in range(5000):
        run.turn()
    run.to_the_end()
    assert run.client.totals.longest_pause_ns == 0
    received = len(server.content[0])
    assert received < 0.95 * 1e5 * 10, "it never stalled"


def test_a_paced_client_keeps_its_rate(server: Server) -> None:
    run = Run(server, Habit.STEADY)
    for _ in range(5000):
        run.turn()
    assert run.client.totals.sent_bytes == pytest.approx(1e5 * 10, rel=0.02)
    run.to_the_end()


@pytest.mark.parametrize("named", [False, True])
def test_a_connection_that_the_server_ends_is_a_disconnect(server: Server, named: bool) -> None:
    run = Run(server, Habit.STEADY, named=named)
    while not server.content or len(server.content[0]) < 10_000:
        run.turn()
    server.close(next(iter(server.open)))
    while not run.client.totals.disconnects:
        run.turn()
    assert "disconnected" in run.client.troubles[0]
    while len(server.content) < 2 or not server.content[1]:
        run.turn()
    run.to_the_end()
    assert run.client.totals.disconnects == 1
    assert run.client.streams[0].broken and run.client.streams[0].connections[0].is_broken
    assert len(run.client.streams) == (1 if named else 2), "it goes on"


def test_nobody_there_is_a_refusal_and_tried_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        address = gone.getsockname()
    with Server() as server:
        run = Run(server, Habit.STEADY)
        run.client.target = address
        while run.client.totals.refusals < 3:
            run.turn()
        run.client.target = server.address
        while not server.content:
            run.turn()
        run.to_the_end()
    assert run.client.totals.connections == 1


def test_a_client_that_is_to_finish_while_it_is_away_does_not_come_back(server: Server) -> None:
    run = Run(server, Habit.RETURNING)
    run.until_connections(1)
    while run.client.state is not ClientState.WAITING:
        run.turn()
    run.to_the_end()
    assert len(server.content) == 1
