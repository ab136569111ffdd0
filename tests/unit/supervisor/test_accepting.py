"""Listeners without their clients: whose a connection is that has no row."""

from __future__ import annotations

import dataclasses
import select
import socket
from collections.abc import Iterator

import pytest

from mpserverd.config.schema import ListenerConfig
from mpserverd.supervisor.accepting import Accepting
from mpserverd.supervisor.children import Children
from mpserverd.supervisor.connections import Connections
from mpserverd.supervisor.core import Core


@pytest.fixture
def connections(core: Core) -> Iterator[Connections]:
    made = Connections(core, Children(core, {}))
    yield made
    made.close_all(for_good=True)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        return int(holder.getsockname()[1])


@pytest.mark.parametrize("hosts", [["127.0.0.1", "127.0.0.2"], ["127.0.0.3", "127.0.0.2"], ["0.0.0.0"]])
def test_a_connection_without_a_row_goes_to_the_listener_that_it_came_to(
    core: Core, connections: Connections, hosts: list[str]
) -> None:
    """Two share a port; the last one is the right one."""
    port = free_port()
    accepting = Accepting(core, connections)
    listeners = tuple(ListenerConfig(name=f"on-{host}", address=f"{host}:{port}") for host in hosts)
    accepting.open_all(dataclasses.replace(core.config, listeners=listeners))
    try:
        right = accepting.listeners()[-1]
        with socket.create_connection(("127.0.0.2", port)):
            assert select.select([right.sock], [], [], 10)[0]
            assert accepting.take_stray(right.sock.accept()[0].detach())
            (connection,) = connections.all()
            assert connection.listener == right.id
    finally:
        accepting.close_all()
