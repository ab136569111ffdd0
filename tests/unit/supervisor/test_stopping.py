"""A stop comes to its end whatever clients do."""

from __future__ import annotations

import dataclasses
import ipaddress
import socket

import pytest

from mpserverd.config.schema import ListenerConfig
from mpserverd.net.listener import ACCEPT_BATCH_MAX
from mpserverd.supervisor import accepting
from mpserverd.supervisor.accepting import Accepting
from mpserverd.supervisor.children import Children
from mpserverd.supervisor.connections import Connections
from mpserverd.supervisor.core import Core

BACKLOG = 100


def test_a_flood_of_newcomers_does_not_keep_the_stop(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come faster than they are refused; only what fits into the kernel's queue is taken."""
    denied = ListenerConfig(
        name="raw", address="127.0.0.1:0", packet_size=16, deny=(ipaddress.ip_network("127.0.0.0/8"),)
    )
    server = dataclasses.replace(core.config.server, backlog=BACKLOG)
    core.config = dataclasses.replace(core.config, server=server, listeners=(denied,))
    door = Accepting(core, Connections(core, Children(core, {})))
    door.open_all(core.config)
    door.serve()
    count = 0

    def another_one(_: socket.socket) -> tuple[socket.socket, str, int]:
        nonlocal count
        count += 1
        assert count < 10 * BACKLOG, "there is no end to it"
        return socket.socket(), "127.0.0.1", 1024 + count

    monkeypatch.setattr(accepting, "try_accept", another_one)
    door.stop()
    assert BACKLOG <= count <= BACKLOG + ACCEPT_BATCH_MAX
