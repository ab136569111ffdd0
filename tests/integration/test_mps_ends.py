"""How mps connections end, who takes whose place, and what garbage leaves behind: nothing."""

from __future__ import annotations

import os
import pathlib
import random
import signal
import socket
import time
from collections.abc import Iterator

import pytest

from tests.integration.driver import Daemon
from tests.integration.mps_client import packets
from tests.integration.test_mps_lines import NOBODYS, Peer, listener, stream_of

SEED = int(os.environ.get("MPSERVERD_TEST_SEED", random.SystemRandom().randrange(2**32)))
GARBAGE_CONNECTIONS = 300


@pytest.fixture
def daemon(tmp_path: pathlib.Path) -> Iterator[Daemon]:
    settings = {
        "server": {"max_clients": 40},
        "buffers": {"bytes": "16 MiB"},
        "listener": [listener("mps"), listener("idle", idle_timeout_s=0.3), {"name": "raw", "address": "127.0.0.1:0"}],
    }
    with Daemon(tmp_path, settings) as running:
        yield running
        running.wait_until_quiet()
        running.ledger()


def connected(daemon: Daemon, client_id: str, count: int, *, said: str = "", name: str = "mps") -> Peer:
    """A client that was answered and sent so many packets from where OK says."""
    peer = Peer(daemon.port(name), f"MPS/1 {client_id} 16{said}\n".encode())
    index, _ = peer.ok()
    peer.send(packets(client_id, index, count, 16))
    return peer


def test_the_same_client_takes_its_own_place_and_rivals_stay_away_longer_each_time(daemon: Daemon) -> None:
    before = connected(daemon, "press-7", 100)
    for number in range(4):
        peer = Peer(daemon.port("mps"), b"MPS/1 press-7 16\n")
        index, _ = peer.ok()
        assert before.bye() == ("superseded", 2**number)
        assert index <= 100 * (number + 1)
        peer.send(packets("press-7", index, 100 * (number + 2) - index, 16))
        before = peer
    before.finish(500)
    assert stream_of(daemon, "press-7").content == packets("press-7", 0, 500, 16)
    assert daemon.stats()["counters"]["supervisor"]["superseded"] == 4
    assert daemon.counter("superseded") == 4


def test_a_hello_that_is_refused_takes_nobody_s_place(daemon: Daemon) -> None:
    """From the same address too: a program that was set up wrong does not disturb the one that is right."""
    peer = connected(daemon, "press-7", 10)
    peer.wait_for_ack(10)
    port = daemon.port("mps")
    for _ in range(2):
        assert Peer(port, b"MPS/1 press-7 32\n").err()[0] == "packet-size"
        assert Peer(port, f"MPS/1 press-7 16 epoch={NOBODYS}\n".encode()).err()[0] == "epoch"
    peer.send(packets("press-7", 10, 10, 16))
    peer.wait_for_ack(20)
    assert daemon.stats()["counters"]["supervisor"]["superseded"] == 0
    anew = Peer(port, b"MPS/1 press-7 32 new=1\n")
    assert anew.ok()[0] == 0
    assert peer.bye() == ("superseded", 1)
    anew.finish()


def test_a_client_that_lost_its_connection_comes_back_without_being_a_rival(daemon: Daemon) -> None:
    for _ in range(3):
        peer = connected(daemon, "press-7", 10)
        peer.sock.close()
    connected(daemon, "press-7", 0).finish()
    assert daemon.stats()["counters"]["supervisor"]["superseded"] == 0


def test_nobody_takes_a_place_from_another_address(daemon: Daemon) -> None:
    peer = connected(daemon, "press-7", 10)
    other = Peer(daemon.port("mps"), b"MPS/1 press-7 16\n", source="127.0.0.2")
    assert other.err()[0] == "in-use"
    peer.wait_for_ack(10)
    peer.finish()
    assert daemon.counter("hello-in-use") == 1


def test_who_is_kicked_or_silent_is_told_so_and_loses_nothing(daemon: Daemon) -> None:
    peer = connected(daemon, "press-7", 10)
    peer.wait_for_ack(10)
    daemon.ctl("kick", "press-7")
    assert peer.bye() == ("kicked", None)
    silent = connected(daemon, "press-8", 10, name="idle")
    assert silent.bye() == ("idle", None)
    assert stream_of(daemon, "press-8").content == packets("press-8", 0, 10, 16)


def test_a_daemon_that_drains_is_busy_for_newcomers_and_acknowledges_the_others(daemon: Daemon) -> None:
    """Newcomers wait with their hello here: unread, it would make the close a reset, which may overtake the answer."""
    peer, leaver = connected(daemon, "press-7", 10), connected(daemon, "press-8", 10)
    leaver.finish(10)
    daemon.ctl("drain")
    for _ in range(2):
        assert Peer(daemon.port("mps")).err() == ("busy", "nobody is let in now: draining")
    assert daemon.counter("refused-draining") == 2
    peer.wait_for_ack(10)
    peer.send(packets("press-7", 10, 10, 16))
    peer.wait_for_ack(20)
    daemon.ctl("undrain")
    assert [connected_index(daemon, client_id) for client_id in ("press-8", "press-9")] == [10, 0]
    peer.finish()
    assert stream_of(daemon, "press-7").content == packets("press-7", 0, 20, 16)


def test_a_stop_makes_durable_what_the_kernel_holds_and_says_so(daemon: Daemon) -> None:
    peer = connected(daemon, "press-7", 1000)
    for pid in daemon.worker_pids():
        os.kill(pid, signal.SIGSTOP)
    peer.send(packets("press-7", 1000, 500, 16))  # nobody has read this when the stop comes
    assert daemon.process is not None
    daemon.process.terminate()
    for pid in daemon.pids():
        os.kill(pid, signal.SIGCONT)
    line, last = b"", -1
    while not line.startswith(b"BYE"):
        line = peer.line()
        assert line, "no goodbye"
        last = int(line.split()[1]) if line.startswith(b"ACK") else last
    assert (line, last) == (b"BYE stopping\n", 1500)
    daemon.stop()
    peer.sock.close()
    daemon.start()
    assert connected_index(daemon, "press-7") == 1500


def test_a_stop_in_the_middle_of_a_reload_acknowledges_everything(tmp_path: pathlib.Path) -> None:
    """The storer has been told to leave for a fresh one, and is gone when the stop begins: somebody must follow it."""
    settings = {"server": {"stop_timeout_s": 60.0}, "listener": [listener("mps")]}
    with Daemon(tmp_path, settings) as daemon:
        peer = connected(daemon, "press-7", 1000)
        peer.wait_for_ack(1000)
        workers, storer = daemon.worker_pids(), daemon.pid_of("storer")
        os.kill(storer, signal.SIGSTOP)
        daemon.reload()
        daemon.wait_for(lambda: not set(workers) & set(daemon.pids()), what="the old workers have left")
        peer.send(packets("press-7", 1000, 500, 16))
        assert daemon.process is not None
        daemon.process.terminate()
        daemon.wait_for(lambda: daemon.log_contains(" stopping why"))
        os.kill(storer, signal.SIGKILL)
        lines = [peer.line()]
        while lines[-1] and not lines[-1].startswith(b"BYE"):
            lines.append(peer.line())
        peer.sock.close()
        assert lines[-2:] == [b"ACK 1500\n", b"BYE stopping\n"]
        assert daemon.stop() == 0


def connected_index(daemon: Daemon, client_id: str) -> int:
    peer = Peer(daemon.port("mps"), f"MPS/1 {client_id} 16\n".encode())
    index, _ = peer.ok()
    peer.finish()
    return index


def test_packets_that_a_client_lost_are_a_hole_however_far_it_reaches(daemon: Daemon) -> None:
    peer = connected(daemon, "press-7", 100)
    peer.wait_for_ack(100)
    peer.finish()
    first = 1 << 50
    _, epoch = (again := Peer(daemon.port("mps"), b"MPS/1 press-7 16\n")).ok()
    again.finish()
    peer = connected(daemon, "press-7", 100, said=f" epoch={epoch} first={first}")
    peer.wait_for_ack(first + 100)
    peer.finish()
    stored = stream_of(daemon, "press-7").content
    assert stored == packets("press-7", 0, 100, 16) + packets("press-7", first, 100, 16)
    assert daemon.ledger()["lost_bytes"] == (first - 100) * 16


def test_a_raw_client_of_the_same_name_is_not_superseded(tmp_path: pathlib.Path) -> None:
    settings = {
        "listener": [listener("mps"), {"name": "raw", "address": "127.0.0.1:0"}],
        "client": [{"id": "press-7", "address": "127.0.0.9"}],
    }
    with Daemon(tmp_path, settings) as daemon:
        raw = Peer(daemon.port("raw"), packets("press-7", 0, 5, 16), source="127.0.0.9")
        daemon.wait_for(lambda: daemon.account("durable_bytes") == 80)
        assert Peer(daemon.port("mps"), b"MPS/1 press-7 16\n", source="127.0.0.9").err()[0] == "in-use"
        raw.sock.close()
        daemon.wait_until_quiet()
        assert connected_index(daemon, "press-7") == 5


def test_garbage_leaves_no_row_no_chunk_and_no_descriptor(daemon: Daemon) -> None:
    chance = random.Random(SEED)
    connected_index(daemon, "press-7")
    daemon.wait_until_quiet()
    before = resources(daemon)
    port = daemon.port("mps")
    for _ in range(GARBAGE_CONNECTIONS):
        said = chance.choice([b"", b"MPS/1 ", b"MPS/1 g 16 ", b"\n", b"MPS/1 g 16\n"])
        said += chance.randbytes(chance.choice([0, 1, 30, 600, 5000]))
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(said)
            if chance.random() < 0.3:
                sock.shutdown(socket.SHUT_WR)
    daemon.wait_until_quiet()
    daemon.wait_for(lambda: resources(daemon) == before, what=f"everything to be given back, seed {SEED}")
    assert connected_index(daemon, "press-7") == 0


def resources(daemon: Daemon) -> tuple[int, ...]:
    """Used chunks, rows, and descriptors of the processes."""
    stats = daemon.stats()
    pids = [stats["pid"], *daemon.worker_pids()]
    fds = [len(list(pathlib.Path(f"/proc/{pid}/fd").iterdir())) for pid in pids]
    return stats["buffers"]["chunks_used"], stats["active_connections"], *fds


def test_a_client_that_never_reads_its_answers_is_stored_all_the_same(daemon: Daemon) -> None:
    peer = Peer(daemon.port("mps"), b"MPS/1 press-7 16\n", receive_buffer=2048)
    deadline_s = time.monotonic() + 2
    count = 0
    while time.monotonic() < deadline_s:
        peer.send(packets("press-7", count, 50, 16))
        count += 50
        time.sleep(0.005)  # many small batches, so that there are many acknowledgements
    peer.half_close()
    index, _ = peer.ok()
    assert index == 0
    peer.wait_for_ack(count)
    peer.sock.close()
    assert stream_of(daemon, "press-7").content == packets("press-7", 0, count, 16)
