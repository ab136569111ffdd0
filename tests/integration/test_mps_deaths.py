"""mps clients through deaths of everything: each packet is stored once, in order, and nothing acknowledged is lost.

The clients are written from the grammar (mps_client.py); what they sent is compared with the segments byte for byte.
"""

from __future__ import annotations

import os
import pathlib
import random
import signal
import subprocess
import time
from collections.abc import Iterator

import numpy as np
import pytest

from tests.integration.driver import Daemon
from tests.integration.mps_client import MpsClient
from tests.integration.oracle import sha256, stored_streams
from tests.integration.test_supervisor_death import Unit

SEED = int(os.environ.get("MPSERVERD_TEST_SEED", str(time.time_ns() % 10_000)))
KILLS = int(os.environ.get("MPSERVERD_TEST_MPS_KILLS", "12"))
ROOT = pathlib.Path(__file__).parents[2]
MPS = {
    "server": {"restart_backoff_s_max": 0.1},
    "listener": {"name": "mps", "protocol": "mps", "packet_size": 0},
}
SIZES = (16, 24, 32, 1000)


@pytest.fixture
def clients() -> Iterator[list[MpsClient]]:
    running: list[MpsClient] = []
    yield running
    for client in running:
        client.abort()


def start_clients(running: list[MpsClient], port: int) -> None:
    running += [MpsClient(f"plc-{size}", port, size=size).start() for size in SIZES]


def finish_and_compare(running: list[MpsClient], spool: pathlib.Path, seed: int) -> None:
    for client in running:
        client.finish()
    found = {stream.name: stream for stream in stored_streams(spool)}
    for client in running:
        stream = found[client.client_id]
        assert stream.epoch == client.epoch, f"seed {seed}"
        assert stream.sha256 == sha256(client.content()), f"{client.client_id}: bytes differ, seed {seed}"


def test_killed_workers_and_storers_lose_double_and_disconnect_nothing(
    tmp_path: pathlib.Path, clients: list[MpsClient]
) -> None:
    chance = random.Random(SEED)
    with Daemon(tmp_path, MPS) as daemon:
        start_clients(clients, daemon.port("mps"))
        for _ in range(KILLS):
            time.sleep(chance.uniform(0.0, 0.15))  # the moment of death is the subject
            daemon.kill(chance.choice(["worker-0", "worker-1", "storer"]))
            daemon.wait_for(daemon.is_ready, what="the replacement")
        finish_and_compare(clients, daemon.spool, SEED)
        assert [client.reconnects for client in clients] == [0] * len(clients), f"seed {SEED}"
        daemon.wait_until_quiet()
        totals = daemon.ledger()
        assert totals["acked_bytes"] == totals["durable_bytes"] == sum(len(c.content()) for c in clients)
        assert totals["handshake_bytes"] > 0
        assert totals["lost_bytes"] == totals["dropped_bytes"] == 0


def test_reload_moves_mps_clients_without_their_notice(tmp_path: pathlib.Path, clients: list[MpsClient]) -> None:
    with Daemon(tmp_path, MPS) as daemon:
        start_clients(clients, daemon.port("mps"))
        for workers in (1, 3, 2):
            before = [client.acked for client in clients]
            daemon.settings["server"]["workers"] = workers
            daemon.reload()
            daemon.wait_for(lambda b=before: all(c.acked > a for c, a in zip(clients, b, strict=True)))
        finish_and_compare(clients, daemon.spool, SEED)
        assert [client.reconnects for client in clients] == [0] * len(clients)


def test_everything_killed_at_once_costs_a_reconnect_and_nothing_else(
    tmp_path: pathlib.Path, clients: list[MpsClient]
) -> None:
    chance = random.Random(SEED)
    daemon = Daemon(tmp_path, MPS)
    try:
        daemon.start()
        port = daemon.port("mps")
        daemon.settings["listener"][0]["address"] = f"127.0.0.1:{port}"
        start_clients(clients, port)
        for _ in range(4):
            time.sleep(chance.uniform(0.1, 0.5))  # the moment of death is the subject
            for pid in daemon.pids():
                os.kill(pid, signal.SIGKILL)
            assert daemon.process is not None
            daemon.process.wait()
            daemon.start()
        finish_and_compare(clients, daemon.spool, SEED)
        daemon.wait_until_quiet()
        daemon.ledger()
    finally:
        daemon.discard()


def test_supervisor_dies_and_mps_clients_go_on(tmp_path: pathlib.Path, clients: list[MpsClient]) -> None:
    chance = random.Random(SEED)
    with Unit(tmp_path, listener='protocol = "mps"') as unit:
        clients += [MpsClient(f"plc-{n}", unit.port).start() for n in range(4)]
        for _ in range(8):
            time.sleep(chance.uniform(0.0, 0.4))  # the moment of death is the subject
            unit.system.wait_ready(start=unit.system.kill())
        finish_and_compare(clients, unit.spool, SEED)
        assert [client.reconnects for client in clients] == [0] * len(clients), f"seed {SEED}"


def test_the_c_client_goes_on_through_kills_and_a_dead_daemon(tmp_path: pathlib.Path) -> None:
    program = tmp_path / "mps_client"
    subprocess.run(["gcc", "-O2", "-o", program, ROOT / "contrib" / "mps_client.c"], check=True)
    chance = random.Random(SEED)
    daemon = Daemon(tmp_path, MPS)
    try:
        daemon.start()
        port = daemon.port("mps")
        daemon.settings["listener"][0]["address"] = f"127.0.0.1:{port}"
        with subprocess.Popen([program, "-i", "c-1", "-n", "60000", "-r", "10050", f"127.0.0.1:{port}"]) as client:
            for name in ("worker-0", "storer", "worker-1"):
                time.sleep(chance.uniform(0.1, 0.5))  # the moment of death is the subject
                daemon.kill(name)
                daemon.wait_for(daemon.is_ready, what="the replacement")
            for pid in daemon.pids():
                os.kill(pid, signal.SIGKILL)
            assert daemon.process is not None
            daemon.process.wait()
            daemon.start()
            assert client.wait(30) == 0
        daemon.wait_until_quiet()
        (stream,) = stored_streams(daemon.spool)
        numbers = np.frombuffer(stream.content, "<u8")[::2]
        assert np.array_equal(numbers, np.arange(60_000, dtype=np.uint64)), f"seed {SEED}"
        daemon.ledger()
    finally:
        daemon.discard()


def test_stop_acknowledges_what_was_sent_and_says_goodbye(tmp_path: pathlib.Path, clients: list[MpsClient]) -> None:
    daemon = Daemon(tmp_path, MPS)
    try:
        daemon.start()
        port = daemon.port("mps")
        daemon.settings["listener"][0]["address"] = f"127.0.0.1:{port}"
        start_clients(clients, port)
        daemon.wait_for(lambda: all(client.acked > 500 for client in clients))
        daemon.stop()
        daemon.wait_for(lambda: all(client.reconnects >= 0 for client in clients))
        daemon.start()
        finish_and_compare(clients, daemon.spool, SEED)
        assert all(refusal.startswith("BYE stopping") for client in clients for refusal in client.refusals)
    finally:
        daemon.discard()
