"""``mpserverd.StreamClient`` and its asyncio twin against the real daemon: every packet once, whatever dies.

The oracle is the bytes that the program handed over, compared with the segments.
"""

from __future__ import annotations

import asyncio
import os
import pathlib
import random
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

import mpserverd
from mpserverd.client.errors import BufferFullError, EpochError, NotAcknowledgedError, PacketLengthError, RefusedError
from tests.integration.driver import Daemon
from tests.integration.mps_client import packets
from tests.integration.oracle import sha256, stored_streams

SEED = int(os.environ.get("MPSERVERD_TEST_SEED", random.SystemRandom().randrange(2**32)))
ROOT = pathlib.Path(__file__).parents[2]
MPS = {
    "server": {"restart_backoff_s_max": 0.1},
    "listener": {"name": "mps", "protocol": "mps", "packet_size": 0},
}


def address(daemon: Daemon) -> str:
    return f"127.0.0.1:{daemon.port('mps')}"


def content_of(daemon: Daemon, name: str) -> bytes:
    daemon.wait_until_quiet()
    daemon.ledger()
    return [stream for stream in stored_streams(daemon.spool) if stream.name == name][-1].content


def test_bytes_packets_and_arrays_arrive_in_the_order_of_the_calls(tmp_path: pathlib.Path) -> None:
    whole = packets("press-7", 0, 2000, 16)
    layout = np.dtype([("sequence", "<u8"), ("time", "<u8")])
    acknowledged: list[int] = []
    with Daemon(tmp_path, MPS) as daemon:
        with mpserverd.StreamClient(address(daemon), "press-7", 16, on_ack=acknowledged.append) as client:
            assert client.send(whole[: 500 * 16]) == 500
            assert client.send(whole[at * 16 : (at + 1) * 16] for at in range(500, 1000)) == 500
            assert client.send(np.frombuffer(whole[1000 * 16 : 1500 * 16], np.uint64)) == 500
            assert client.send(np.frombuffer(whole[1500 * 16 :], layout)) == 500
            client.flush()
            assert (client.acked, client.held, client.level) == (2000, 0, "durable")
            with pytest.raises(PacketLengthError):
                client.send(b"seventeen bytes..")
        assert acknowledged == sorted(acknowledged)
        assert acknowledged[-1] == 2000
        assert content_of(daemon, "press-7") == whole


def test_deaths_of_workers_and_of_the_whole_daemon_cost_a_client_nothing(tmp_path: pathlib.Path) -> None:
    chance = random.Random(SEED)
    daemon = Daemon(tmp_path, MPS)
    try:
        daemon.start()
        daemon.settings["listener"][0]["address"] = address(daemon)
        sent = 0
        with mpserverd.StreamClient(address(daemon), "press-7", 16, backoff_s=(0.05, 0.2)) as client:
            for number in range(12):
                for _ in range(20):
                    client.send(packets("press-7", sent, 100, 16))
                    sent += 100
                    time.sleep(chance.uniform(0.0, 0.01))  # the moment of death is the subject
                if number == 6:
                    for pid in daemon.pids():
                        os.kill(pid, signal.SIGKILL)
                    assert daemon.process is not None
                    daemon.process.wait()
                    daemon.start()
                else:
                    daemon.kill(chance.choice(["worker-0", "worker-1", "storer"]))
                    daemon.wait_for(daemon.is_ready)
            client.flush()
            assert client.acked == sent
        assert sha256(content_of(daemon, "press-7")) == sha256(packets("press-7", 0, sent, 16)), f"seed {SEED}"
    finally:
        daemon.discard()


PROGRAM = """
import sys
import mpserverd
from tests.integration.mps_client import packets

server, file = sys.argv[1:]
client = mpserverd.StreamClient(server, "press-7", 16, buffer_file=file, backoff_s=(0.05, 0.2))
while True:
    index = client.next_index if client.acked or client.held else 0
    client.send(packets("press-7", index, 100, 16))
    print(index + 100, flush=True)
"""


def test_a_program_that_is_killed_goes_on_from_its_buffer_file(tmp_path: pathlib.Path) -> None:
    chance = random.Random(SEED)
    with Daemon(tmp_path, MPS) as daemon:
        arguments = [address(daemon), str(tmp_path / "buffer")]
        for _ in range(4):
            with subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(PROGRAM), *arguments],
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            ) as program:
                assert program.stdout is not None
                for _ in range(chance.randrange(5, 60)):
                    handed_over = int(program.stdout.readline())
                program.kill()
                handed_over = max([handed_over, *(int(line) for line in program.stdout if line.endswith("\n"))])
        with mpserverd.StreamClient(arguments[0], "press-7", 16, buffer_file=arguments[1]) as client:
            client.flush()
            end = client.next_index
        assert end >= handed_over
        assert content_of(daemon, "press-7") == packets("press-7", 0, end, 16), f"seed {SEED}"


def test_a_full_buffer_waits_raises_or_drops_as_it_was_told(tmp_path: pathlib.Path) -> None:
    with Daemon(tmp_path, MPS) as daemon:
        server = address(daemon)
        os.kill(daemon.pid_of("storer"), signal.SIGSTOP)  # nothing is acknowledged meanwhile
        small = packets("a", 0, 100, 16)
        client = mpserverd.StreamClient(server, "a", 16, buffer_bytes=1600, on_full="raise")
        client.send(small)
        with pytest.raises(BufferFullError):
            client.send(small)
        with pytest.raises(NotAcknowledgedError):
            client.flush(0.2)
        with pytest.raises(NotAcknowledgedError):
            client.close(0.1)
        with mpserverd.StreamClient(server, "b", 16, buffer_bytes=1600, on_full="drop-oldest") as dropping:
            for first in range(0, 500, 100):
                dropping.send(packets("b", first, 100, 16))
            assert 50 < dropping.held <= 100  # whole pieces are given up
            os.kill(daemon.pid_of("storer"), signal.SIGCONT)
            dropping.flush()
            assert dropping.dropped > 0
        assert content_of(daemon, "b").endswith(packets("b", 450, 50, 16))


def test_a_server_that_has_another_stream_is_an_error_or_a_new_beginning(tmp_path: pathlib.Path) -> None:
    with Daemon(tmp_path, MPS) as daemon:
        server, file = address(daemon), tmp_path / "buffer"
        with mpserverd.StreamClient(server, "press-7", 16, buffer_file=file) as client:
            client.send(packets("press-7", 0, 10, 16))
        with pytest.raises(RefusedError, match="packet-size"), mpserverd.StreamClient(server, "press-7", 32) as wrong:
            wrong.send(bytes(32))
            wrong.flush()
        daemon.wait_until_quiet()
        daemon.ctl("streams", "delete", "press-7", check=False)
    with Daemon(tmp_path, {**MPS, "spool": {"path": str(tmp_path / "other")}}) as daemon:
        server = address(daemon)
        with pytest.raises(EpochError), mpserverd.StreamClient(server, "press-7", 16, buffer_file=file) as client:
            client.send(packets("press-7", 10, 10, 16))
            client.flush()
        with mpserverd.StreamClient(server, "press-7", 16, buffer_file=file, on_epoch="new") as client:
            client.flush()
        assert content_of(daemon, "press-7") == packets("press-7", 10, 10, 16)


def test_the_asyncio_client_does_the_same_without_a_thread(tmp_path: pathlib.Path) -> None:
    """With a buffer file, and deaths of what serves it."""

    async def send_all(daemon: Daemon) -> None:
        server, file = address(daemon), tmp_path / "buffer"
        async with mpserverd.AsyncStreamClient(
            server, "press-7", 16, buffer_file=file, backoff_s=(0.05, 0.2)
        ) as client:
            for first in range(0, 5000, 100):
                await client.send(packets("press-7", first, 100, 16))
                if first in (1500, 3000):
                    daemon.kill("worker-0" if first == 1500 else "storer")
            await client.flush()
            assert client.acked == 5000

    with Daemon(tmp_path, MPS) as daemon:
        asyncio.run(send_all(daemon))
        assert content_of(daemon, "press-7") == packets("press-7", 0, 5000, 16)


def test_the_client_imports_nothing_that_only_linux_has() -> None:
    program = """
        import sys
        for name in ("termios", "resource", "grp", "pwd", "syslog", "pty", "tty", "numpy"):
            sys.modules[name] = None
        import select
        for name in ("epoll", "poll", "EPOLLIN"):
            if hasattr(select, name):
                delattr(select, name)
        import mpserverd
        client = mpserverd.StreamClient("127.0.0.1:1", "press-7", 16, backoff_s=(0.01, 0.02))
        client.send(bytes(16))
        assert client.held == 1
        try:
            client.close(0.1)
        except TimeoutError:
            print("fine")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.stdout == "fine\n", done.stderr
