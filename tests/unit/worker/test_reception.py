"""Hellos in a worker, over real TCP."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator

import pytest

from mpserverd.arena.state import FIRST_WORKER_SLOT, Con, ConnectionState, Slot, StateTable
from mpserverd.net import tcp_info
from mpserverd.net.channel import Kind, Message
from mpserverd.worker.reception import Reception

ROW = 1


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname(), timeout=5) as client,
    ):
        server, _ = listener.accept()
        with server:
            yield client, server


def test_a_worker_says_whose_hello_it_looks_at(pair: tuple[socket.socket, socket.socket]) -> None:
    """Else no death could be held against it."""
    client, server = pair
    state = StateTable.create(connections=2, streams=1, slots=3)
    base = state.connection_base(ROW)
    state.words[base + Con.COOKIE] = tcp_info.cookie(server)
    state.words[base + Con.STATE] = ConnectionState.HELLO
    said: list[Message] = []
    with select.epoll() as epoll:
        reception = Reception(state, 0, epoll, said.append, FIRST_WORKER_SLOT)
        reception.greet(Message(Kind.GREET, ROW, fd=os.dup(server.fileno())), 0)
        client.sendall(b"MPS/1 plc-1 16\n")
        ((fd, events),) = epoll.poll(5)
        assert reception.handle(fd, events)
    assert state.slots[FIRST_WORKER_SLOT, Slot.IN_HAND] == ROW + 1
    assert [message.payload for message in said] == [{"line": "MPS/1 plc-1 16\n"}]
    os.close(state.fd)
