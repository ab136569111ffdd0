"""The control socket's server, in its loop, against real sockets."""

from __future__ import annotations

import os
import select
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mpserverd.control.messages import Reply, Request
from mpserverd.errors import StartError
from mpserverd.limits import CONTROL_LINE_BYTES_MAX
from mpserverd.supervisor import control_server
from mpserverd.supervisor.control_server import CONNECTIONS_MAX, Answer, ControlServer, Peer, open_control_socket
from mpserverd.supervisor.core import Core

LINES = 60_000


def echo(request: Request, peer: Peer) -> Answer:
    if request.command == "fault":
        raise ZeroDivisionError("a fault of ours")
    if request.command == "nonsense":
        return Answer(Reply(True, {1, 2}))
    if request.command == "fds":
        return Answer(Reply(True), (os.open("/dev/null", os.O_RDONLY), os.open("/dev/zero", os.O_RDONLY)))
    return Answer(Reply(True, {"arguments": request.arguments, "pid": peer.pid}))


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "control.sock")


@pytest.fixture
def server(core: Core, path: str) -> Iterator[ControlServer]:
    made = ControlServer(core, path, open_control_socket(path), echo)
    made.serve()
    yield made
    made.close()
    assert not os.path.exists(path)


def dial(path: str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(5)
    client.connect(path)
    return client


def turn(core: Core, until: Callable[[], bool], timeout_s: float = 5) -> None:
    deadline_s = time.monotonic() + timeout_s
    core.loop.after(timeout_s, lambda: None)
    while not until():
        assert time.monotonic() < deadline_s
        core.loop.after(0.01, lambda: None)
        core.loop.run_once()


def readable(client: socket.socket) -> bool:
    return bool(select.select([client], [], [], 0)[0])


def test_a_request_is_answered_and_the_asker_is_known(core: Core, server: ControlServer, path: str) -> None:
    with dial(path) as client:
        client.sendall(Request("x", {"a": 1}).encode())
        turn(core, lambda: readable(client))
        reply = Reply.decode(client.recv(4096))
    assert reply.result == {"arguments": {"a": 1}, "pid": os.getpid()}


def test_a_request_may_come_byte_by_byte(core: Core, server: ControlServer, path: str) -> None:
    with dial(path) as client:
        for byte in Request("x").encode():
            client.sendall(bytes([byte]))
            core.loop.after(0, lambda: None)
            core.loop.run_once()
        turn(core, lambda: readable(client))
        assert Reply.decode(client.recv(4096)).ok


def test_descriptors_come_with_the_reply_and_the_server_keeps_none(
    core: Core, server: ControlServer, path: str
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with dial(path) as client:
        client.sendall(Request("fds").encode())
        turn(core, lambda: readable(client))
        line, fds, _, _ = socket.recv_fds(client, 4096, 4)
        assert Reply.decode(line).ok
        assert [os.readlink(f"/proc/self/fd/{fd}") for fd in fds] == ["/dev/null", "/dev/zero"]
        for fd in fds:
            os.close(fd)
    turn(core, lambda: len(os.listdir("/proc/self/fd")) == before)


def test_a_reply_larger_than_the_buffers_arrives_whole(core: Core, server: ControlServer, path: str) -> None:
    text = "x" * (CONTROL_LINE_BYTES_MAX - 100)
    with dial(path) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(Request("x", {"a": text}).encode())
        received = b""

        def complete() -> bool:
            nonlocal received
            while readable(client):
                received += client.recv(1000)
            return received.endswith(b"\n")

        turn(core, complete)
    assert Reply.decode(received).result["arguments"]["a"] == text


def test_a_line_that_never_ends_is_refused(core: Core, server: ControlServer, path: str) -> None:
    with dial(path) as client:
        client.setblocking(False)
        left = b"x" * (CONTROL_LINE_BYTES_MAX + 10)
        while left:
            try:
                left = left[client.send(left) :]
            except BlockingIOError:
                core.loop.run_once()
        turn(core, lambda: readable(client))
        assert "at most" in Reply.decode(client.recv(4096)).error


def test_who_says_nothing_is_dropped_at_the_deadline(core: Core, server: ControlServer, path: str) -> None:
    with dial(path) as client:
        core.loop.run_once()
        server.check_deadlines(time.monotonic())
        assert not readable(client)
        server.check_deadlines(time.monotonic() + control_server.DEADLINE_S + 1)
        assert client.recv(1) == b""


def test_one_more_than_the_limit_pushes_out_the_oldest(core: Core, server: ControlServer, path: str) -> None:
    clients = []
    for _ in range(CONNECTIONS_MAX + 1):
        clients.append(dial(path))
        core.loop.after(0, lambda: None)
        core.loop.run_once()
    turn(core, lambda: readable(clients[0]))
    assert clients[0].recv(1) == b""
    clients[-1].sendall(Request("x").encode())
    turn(core, lambda: readable(clients[-1]))
    for client in clients:
        client.close()


def test_thousands_of_lines_at_once_are_answered_one_by_one_while_others_are_served(
    core: Core, server: ControlServer, path: str
) -> None:
    """The asker takes each reply at once, so that nothing makes the server pause."""
    count = 0

    def take(many: socket.socket) -> None:
        nonlocal count
        while count < LINES:
            count += many.recv(1 << 16).count(b"\n")

    with dial(path) as many, dial(path) as other:
        taking = threading.Thread(target=take, args=(many,))
        taking.start()
        many.settimeout(60)
        many.sendall(b"\n" * LINES)
        other.sendall(Request("x").encode())
        turn(core, lambda: readable(other))
        assert count < LINES, "the other did not have to wait for all of them"
        assert Reply.decode(other.recv(4096)).ok
        turn(core, lambda: count == LINES, 60)
        taking.join()


@pytest.mark.parametrize("command", ["fault", "nonsense"])
def test_a_fault_of_ours_in_one_command_costs_that_connection_only(
    core: Core, server: ControlServer, path: str, command: str
) -> None:
    with dial(path) as client:
        client.sendall(Request(command).encode() * 2)
        turn(core, lambda: readable(client))
        received = b""
        while more := client.recv(4096):
            received += more
        assert "its log says how" in Reply.decode(received).error, "one reply, then the end"
    with dial(path) as next_one:
        next_one.sendall(Request("x").encode())
        turn(core, lambda: readable(next_one))
        assert Reply.decode(next_one.recv(4096)).ok


def test_the_file_is_for_owner_and_group_only(server: ControlServer, path: str) -> None:
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o660


def test_a_file_of_the_dead_is_replaced_and_one_of_the_living_is_not(path: str) -> None:
    first = open_control_socket(path)
    with pytest.raises(StartError, match=f"runs already: pid {os.getpid()}"):
        open_control_socket(path)
    first.close()
    open_control_socket(path).close()


def test_a_path_that_cannot_be_used_is_an_error_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartError, match="File exists"):
        open_control_socket(str(tmp_path / "file" / "control.sock"))


def test_a_server_does_not_remove_the_file_of_its_successor(core: Core, path: str) -> None:
    first = ControlServer(core, path, open_control_socket(path), echo)
    os.unlink(path)
    second = ControlServer(core, path, open_control_socket(path), echo)
    first.close()
    assert os.path.exists(path)
    second.close()
