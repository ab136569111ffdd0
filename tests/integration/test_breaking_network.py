"""A network that splits, delays, stalls and cuts connections costs an mps client time, and nothing else.

Every client's packets are compared with the bytes of the files: each once, in order. ``MPSERVERD_TEST_SEED`` repeats a
run, ``MPSERVERD_TEST_NETWORK_SEEDS`` gives more of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

import mpserverd
from tests.integration import senders
from tests.integration.breaking_network import CUTS, HARMLESS, Network
from tests.integration.driver import BIN, DEADLINE_S, SLOWNESS, Daemon
from tests.integration.mps_client import MpsClient, packets
from tests.integration.oracle import sent_digests, sha256, stored_digests, stored_streams

FIRST_SEED = int(os.environ.get("MPSERVERD_TEST_SEED", random.SystemRandom().randrange(2**32)))
SEEDS = [FIRST_SEED + number for number in range(int(os.environ.get("MPSERVERD_TEST_NETWORK_SEEDS", "1")))]
SETTINGS = {
    "server": {"restart_backoff_s_max": 0.1},
    "listener": [
        {"name": "raw", "address": "127.0.0.1:0", "packet_size": 16, "on_full": "block"},
        {"name": "mps", "address": "127.0.0.1:0", "protocol": "mps", "packet_size": 0, "handshake_timeout_s": 5.0},
    ],
}
LONG_S = 6 * DEADLINE_S * SLOWNESS
each_seed = pytest.mark.parametrize("seed", SEEDS)


def content_of(daemon: Daemon, name: str) -> bytes:
    """Of the only stream of that name: no client had to begin anew."""
    (stream,) = [stream for stream in stored_streams(daemon.spool) if stream.name == name]
    return stream.content


@contextlib.contextmanager
def deaths(daemon: Daemon, seed: int) -> Iterator[None]:
    """Meanwhile workers and the storer die, about twice a second."""
    over = threading.Event()

    def kill() -> None:
        choose = random.Random(seed)
        while not over.wait(0.5):
            name = choose.choice(("worker-0", "worker-1", "storer"))
            with contextlib.suppress(AssertionError, KeyError, ProcessLookupError):  # it may be dead as it is
                os.kill(daemon.pid_of(name), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield
    finally:
        over.set()
        killer.join()


@pytest.mark.slow
@each_seed
@pytest.mark.parametrize("dying", [False, True], ids=["everybody lives", "workers and storer die"])
def test_ten_mps_clients_lose_and_double_nothing(tmp_path: pathlib.Path, seed: int, dying: bool) -> None:
    with Daemon(tmp_path, SETTINGS) as daemon, Network(daemon.port("mps"), seed) as network:
        clients = [MpsClient(f"press-{n}", network.port, size=(16, 7 + 8, 24, 1000)[n % 4]) for n in range(10)]
        try:
            with deaths(daemon, seed) if dying else contextlib.nullcontext():
                for client in clients:
                    client.start()
                wanted = {*HARMLESS, *CUTS}
                daemon.wait_for(
                    lambda: wanted <= set(+network.happened) and min(c.reconnects for c in clients) > 0,
                    what="every kind of break, and one for each client",
                    deadline_s=LONG_S,
                )
            network.calm_down()
            for client in clients:
                client.finish(LONG_S)
        finally:
            for client in clients:
                client.abort()
        daemon.wait_until_quiet()
        assert daemon.ledger()["acked_bytes"] == sum(client.sent * client.size for client in clients)
        for client in clients:
            assert sha256(content_of(daemon, client.client_id)) == sha256(client.content()), f"seed {seed}"


@pytest.mark.slow
@each_seed
def test_both_stream_clients_go_on(tmp_path: pathlib.Path, seed: int) -> None:
    count = 40_000

    async def send_from_asyncio(server: str) -> None:
        async with mpserverd.AsyncStreamClient(server, "press-a", 16, backoff_s=(0.02, 0.2)) as client:
            for first in range(0, count, 100):
                await client.send(packets("press-a", first, 100, 16))
                await asyncio.sleep(0.002)
            await client.flush(LONG_S)

    with Daemon(tmp_path, SETTINGS) as daemon, Network(daemon.port("mps"), seed) as network:
        server = f"127.0.0.1:{network.port}"
        twin = threading.Thread(target=lambda: asyncio.run(send_from_asyncio(server)))
        twin.start()
        try:
            with mpserverd.StreamClient(server, "press-b", 16, backoff_s=(0.02, 0.2)) as client:
                for first in range(0, count, 100):
                    client.send(packets("press-b", first, 100, 16))
                    time.sleep(0.002)
                client.flush(LONG_S)
        finally:
            twin.join()
        daemon.wait_until_quiet()
        daemon.ledger()
        for name in ("press-a", "press-b"):
            assert content_of(daemon, name) == packets(name, 0, count, 16), f"{name}, seed {seed}"
        assert sum(network.happened[cut] for cut in CUTS) > 0, f"seed {seed}"


@pytest.mark.slow
@each_seed
def test_the_c_client_and_mpload_go_on(tmp_path: pathlib.Path, seed: int) -> None:
    senders.needs("gcc")
    program, report = tmp_path / "mps_client", tmp_path / "load.json"
    subprocess.run(["gcc", "-O2", "-o", program, senders.ROOT / "contrib" / "mps_client.c"], check=True)
    with Daemon(tmp_path, SETTINGS) as daemon, Network(daemon.port("mps"), seed) as network:
        load = [BIN / "mpload", "--protocol", "mps", "--host", "127.0.0.1", "--port", str(network.port)]
        load += ["--clients", "4", "--duration", "4", "--drain-timeout", "60", "--close-timeout", "120"]
        load += ["--max-reconnects", "1000", "--min-rate-percent", "1", "--quiet"]
        load += ["--verify", daemon.spool, "--json", report]
        with (
            subprocess.Popen([program, "-i", "c-1", "-n", "60000", "-r", "10050", f"127.0.0.1:{network.port}"]) as c,
            subprocess.Popen(load) as loading,
        ):
            assert c.wait(LONG_S) == 0
            assert loading.wait(LONG_S) == 0, report.read_text()[:2000]
        found = json.loads(report.read_text())
        assert found["packets_acked"] == found["packets_sent"] > 0
        assert found["verify"]["mismatches"] == []
        daemon.wait_until_quiet()
        daemon.ledger()
        numbers = np.frombuffer(content_of(daemon, "c-1"), "<u8")[::2]
        assert np.array_equal(numbers, np.arange(60_000, dtype=np.uint64)), f"seed {seed}"


@each_seed
def test_raw_clients_behind_a_slow_network_lose_nothing(tmp_path: pathlib.Path, seed: int) -> None:
    contents = [senders.payload(seed + number, 320_000 + number) for number in range(10)]
    with Daemon(tmp_path, SETTINGS) as daemon, Network(daemon.port("raw"), seed, HARMLESS) as network:
        senders.finish([senders.nc(path, network.port) for path in senders.files(tmp_path, contents)])
        daemon.wait_until_quiet()
        assert stored_digests(daemon.spool) == sent_digests(contents, 16), f"seed {seed}"
        totals = daemon.ledger()
        assert totals["truncated_bytes"] == sum(len(content) % 16 for content in contents)
        assert all(network.happened[kind] for kind in HARMLESS)
