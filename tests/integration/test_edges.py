"""Workers that die when a stream stands exactly at the edge of a chunk or of a segment, or a byte beside it."""

from __future__ import annotations

import contextlib
import os
import pathlib
import select
import signal

import pytest

from tests.integration import senders
from tests.integration.driver import Daemon, connect
from tests.integration.oracle import sent_digests, stored_digests

CHUNK_BYTES, SEGMENT_BYTES = 4096, 65_536
EDGES = [at + beside for at in (CHUNK_BYTES, SEGMENT_BYTES) for beside in (-1, 0, 1)]
CONTENT_BYTES = 2 * SEGMENT_BYTES + 16
KILLS = 2
"""The second one dies without having read a byte."""


def settings(packet_size: int) -> dict[str, object]:
    return {
        "server": {"workers": 1, "restart_backoff_s_max": 0.1},
        "buffers": {"chunk_bytes": CHUNK_BYTES},
        "listener": {"packet_size": packet_size, "on_full": "block"},
        "spool": {"segment_bytes": SEGMENT_BYTES},
    }


def kill_its_worker(daemon: Daemon) -> None:
    """SIGKILL, and wait until another one has all connections."""
    pid = daemon.kill("worker-0")

    def is_replaced() -> bool:
        (worker,) = daemon.stats()["worker_list"]
        return worker["pid"] not in (0, pid) and worker["connections"] == len(EDGES)

    daemon.wait_for(is_replaced, what="a successor with all connections")


@pytest.mark.parametrize("packet_size", [1, 16])
@pytest.mark.parametrize("in_arena", [False, True], ids=["durable", "in the arena"])
def test_a_worker_that_dies_exactly_at_an_edge_loses_and_doubles_no_byte(
    tmp_path: pathlib.Path, packet_size: int, in_arena: bool
) -> None:
    """A raw client stands at each edge. What was received is durable by then, or the storer stands still and it is
    not."""
    contents = [senders.payload(number, CONTENT_BYTES) for number in range(len(EDGES))]
    whole = [edge - edge % packet_size for edge in EDGES]
    with Daemon(tmp_path, settings(packet_size)) as daemon, contextlib.ExitStack() as stack:
        port = daemon.port()
        clients = [stack.enter_context(connect(port)) for _ in EDGES]
        daemon.wait_for(lambda: [c.get("worker") for c in daemon.clients()] == [0] * len(EDGES), what="six streams")
        storer = daemon.pid_of("storer")
        if in_arena:
            os.kill(storer, signal.SIGSTOP)
        try:
            for client, content, edge in zip(clients, contents, EDGES, strict=True):
                client.sendall(content[:edge])
            daemon.wait_for(lambda: daemon.account("socket_bytes") == sum(EDGES), what="exactly so much")
            assert [client["bytes"] for client in daemon.clients()] == whole
            if not in_arena:
                daemon.wait_for_total("durable_bytes", sum(whole))
            for _ in range(KILLS):
                kill_its_worker(daemon)
            assert [client["bytes"] for client in daemon.clients()] == whole
            assert daemon.account("durable_bytes") == (0 if in_arena else sum(whole))
        finally:
            os.kill(storer, signal.SIGCONT)
        for client, content, edge in zip(clients, contents, EDGES, strict=True):
            client.sendall(content[edge:])
        daemon.wait_for_total("durable_bytes", len(EDGES) * CONTENT_BYTES)
        assert select.select(clients, [], [], 0)[0] == [], "nobody is told anything, not even an end"
        stack.close()
        daemon.wait_until_served(len(EDGES))
        assert daemon.counter("ended") == len(EDGES)
        assert stored_digests(daemon.spool) == sent_digests(contents, packet_size)
