"""kill -9 and SIGSTOP of children, while plain programs go on sending as if nothing had happened."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
from collections.abc import Callable

from tests.integration import senders
from tests.integration.driver import Daemon, connect
from tests.integration.oracle import sent_digests, stored_digests, stored_streams

EXACT = {"listener": {"on_full": "block"}}
PIECE_BYTES = 160_000


def write_pieces(sender: subprocess.Popen[bytes], content: bytes, between: Callable[[int], object]) -> None:
    """Feed ``content`` to a sender and call ``between(bytes so far)`` after every piece."""
    assert sender.stdin is not None
    for at in range(0, len(content), PIECE_BYTES):
        sender.stdin.write(content[at : at + PIECE_BYTES])
        sender.stdin.flush()
        between(at + PIECE_BYTES)
    sender.stdin.close()
    assert sender.wait(60) == 0, "the sender noticed"


def test_killed_workers_lose_no_byte_of_a_raw_stream(tmp_path: pathlib.Path) -> None:
    """socat streams 8 MB while the worker that reads it is killed five times."""
    senders.needs("socat")
    content = senders.payload(11, 50 * PIECE_BYTES)
    killed: list[int] = []

    with Daemon(tmp_path, EXACT) as daemon:

        def kill_its_worker(sent: int) -> None:
            if sent % (10 * PIECE_BYTES) or not (clients := daemon.clients()):
                return
            index = clients[0]["worker"]
            (pid,) = [w["pid"] for w in daemon.stats()["worker_list"] if w["index"] == index]
            if pid > 0:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

        with senders.socat_from_pipe(daemon.port()) as sender:
            write_pieces(sender, content, kill_its_worker)
        daemon.wait_until_quiet()
        daemon.wait_for_total("durable_bytes", len(content))
        assert len(killed) >= 3
        assert stored_digests(daemon.spool) == sent_digests([content], 16)
        daemon.wait_for(lambda: len(set(daemon.worker_pids()) - {0}) == 2, what="both workers to be back")
        assert not set(killed) & set(daemon.worker_pids())


def test_all_workers_killed_at_once_lose_nothing_of_thirty_clients(tmp_path: pathlib.Path) -> None:
    """Bytes that arrive between the death and the successor wait in the sockets."""
    contents = [senders.payload(seed, 48_000 + seed) for seed in range(30)]
    with Daemon(tmp_path, EXACT) as daemon:
        port = daemon.port()
        clients = [connect(port) for _ in contents]
        for client, content in zip(clients, contents, strict=True):
            client.sendall(content[:20_001])
        for pid in daemon.worker_pids():
            os.kill(pid, signal.SIGKILL)
        for client, content in zip(clients, contents, strict=True):
            client.sendall(content[20_001:])
            client.close()
        daemon.wait_until_quiet()
        daemon.wait_for_total("durable_bytes", sum(len(content) // 16 * 16 for content in contents))
        assert stored_digests(daemon.spool) == sent_digests(contents, 16)


def test_a_worker_that_hangs_is_replaced_and_nothing_is_lost(tmp_path: pathlib.Path) -> None:
    content = senders.payload(12, 320_000)
    settings = EXACT | {"server": {"workers": 1, "heartbeat_timeout_s": 2.5}}
    with Daemon(tmp_path, settings) as daemon:
        (hung,) = daemon.worker_pids()
        with connect(daemon.port()) as client:
            client.sendall(content[:100_000])
            daemon.wait_for_total("received_bytes", 100_000)
            os.kill(hung, signal.SIGSTOP)
            client.sendall(content[100_000:])
            daemon.wait_for(lambda: daemon.worker_pids() not in ([hung], [0]), what="a new worker")
        daemon.wait_until_quiet()
        daemon.wait_for_total("durable_bytes", len(content))
        assert stored_digests(daemon.spool) == sent_digests([content], 16)


def test_a_killed_storer_loses_nothing_and_ingest_goes_on(tmp_path: pathlib.Path) -> None:
    senders.needs("socat")
    content = senders.payload(13, 40 * PIECE_BYTES)
    killed: list[int] = []
    with Daemon(tmp_path, EXACT) as daemon:

        def kill_the_storer(sent: int) -> None:
            if sent % (10 * PIECE_BYTES) == 0:
                daemon.wait_for(lambda: daemon.pid_of("storer") > 0, what="a storer")
                killed.append(daemon.kill("storer"))

        with senders.socat_from_pipe(daemon.port()) as sender:
            write_pieces(sender, content, kill_the_storer)
        daemon.wait_until_quiet()
        daemon.wait_for_total("durable_bytes", len(content))
        assert len(set(killed)) >= 3
        assert stored_digests(daemon.spool) == sent_digests([content], 16)


def test_while_the_storer_stands_still_packets_are_received(tmp_path: pathlib.Path) -> None:
    """Slow I/O is no reason to kill it: the same storer goes on."""
    content = senders.payload(14, 2_000_000)
    with Daemon(tmp_path, EXACT) as daemon:
        with connect(daemon.port()) as client:
            client.sendall(content[:16])
            daemon.wait_for_total("durable_bytes", 16)
            storer = daemon.kill("storer", signal.SIGSTOP)
            try:
                client.sendall(content[16:])
                daemon.wait_for(lambda: daemon.account("socket_bytes") == len(content), what="all packets")
                assert daemon.account("durable_bytes") == 16
            finally:
                os.kill(storer, signal.SIGCONT)
        daemon.wait_until_quiet()
        daemon.wait_for_total("durable_bytes", len(content))
        assert daemon.pid_of("storer") == storer
        assert stored_digests(daemon.spool) == sent_digests([content], 16)


def test_a_blocked_stream_waits_for_a_storer_that_stands_still(tmp_path: pathlib.Path) -> None:
    """More than the memory holds: TCP pushes back, and later everything is there."""
    senders.needs("socat")
    content = senders.payload(15, 24_000_000)
    (path,) = senders.files(tmp_path, [content])
    with Daemon(tmp_path, EXACT) as daemon:
        storer = daemon.kill("storer", signal.SIGSTOP)
        try:
            sender = senders.socat(path, daemon.port(), 65_536)
            daemon.wait_for(lambda: daemon.account("received_bytes") > 1_000_000, what="the first megabyte")
            blocked = daemon.wait_for(
                lambda: [c for c in daemon.clients() if c.get("blocked")], what="a blocked client"
            )
            assert blocked[0]["bytes"] <= 8 << 20
        finally:
            os.kill(storer, signal.SIGCONT)
        senders.finish([sender])
        daemon.wait_until_quiet()
        daemon.wait_for_total("durable_bytes", len(content))
        assert stored_digests(daemon.spool) == sent_digests([content], 16)


def test_a_stream_that_may_drop_never_stalls_its_client_and_counts_what_it_dropped(tmp_path: pathlib.Path) -> None:
    """drop-oldest with the storer standing still: whole packets go, the ledger names every byte of them."""
    senders.needs("socat")
    content = senders.payload(16, 24_000_000)
    (path,) = senders.files(tmp_path, [content])
    with Daemon(tmp_path, {"listener": {"on_full": "drop-oldest"}}) as daemon:
        storer = daemon.kill("storer", signal.SIGSTOP)
        try:
            senders.finish([senders.socat(path, daemon.port(), 65_536)])
            daemon.wait_for(lambda: daemon.account("socket_bytes") == len(content), what="all packets")
        finally:
            os.kill(storer, signal.SIGCONT)
        daemon.wait_until_quiet()
        total = daemon.ledger()
        assert total["received_bytes"] == len(content)
        assert total["dropped_bytes"] >= len(content) - (8 << 20)
        assert total["durable_bytes"] == len(content) - total["dropped_bytes"]
        assert total["dropped_bytes"] % 16 == 0
        (stored,) = stored_pieces(daemon)
        assert is_subsequence_of_packets(stored, content, 16)


def stored_pieces(daemon: Daemon) -> list[bytes]:
    return [stream.content for stream in stored_streams(daemon.spool)]


def is_subsequence_of_packets(part: bytes, whole: bytes, packet_size: int) -> bool:
    """Every packet of ``part`` is one of ``whole``, in the same order."""
    rest = iter([whole[at : at + packet_size] for at in range(0, len(whole), packet_size)])
    return all(part[at : at + packet_size] in rest for at in range(0, len(part), packet_size))


def test_a_client_with_a_name_is_read_although_the_storer_stands_still(tmp_path: pathlib.Path) -> None:
    """Its stream cannot be opened, so its packets go to one of their own; TCP does not hold it up for long."""
    content = senders.payload(4, 320_000)
    settings = EXACT | {"client": [{"id": "press-7", "address": "127.0.0.1"}]}
    with Daemon(tmp_path, settings) as daemon:
        storer = daemon.kill("storer", signal.SIGSTOP)
        try:
            with connect(daemon.port()) as client:
                client.sendall(content)
                daemon.wait_for(lambda: daemon.account("socket_bytes") == len(content), what="all packets")
                assert daemon.clients()[0]["stream"].startswith("press-7.")
        finally:
            os.kill(storer, signal.SIGCONT)
        daemon.wait_until_quiet()
        daemon.wait_for_total("durable_bytes", len(content))
        (stored,) = stored_pieces(daemon)
        assert stored == content


def test_the_last_line_says_that_packets_were_dropped(tmp_path: pathlib.Path) -> None:
    with Daemon(tmp_path, {"listener": {"on_full": "drop-oldest"}, "buffers": {"bytes": "8 MiB"}}) as daemon:
        storer = daemon.kill("storer", signal.SIGSTOP)
        try:
            with connect(daemon.port()) as client:
                client.sendall(b"x" * 32_000_000)
            daemon.wait_for(lambda: daemon.account("dropped_bytes") > 0, what="a drop")
        finally:
            os.kill(storer, signal.SIGCONT)
        daemon.wait_until_quiet()
        assert daemon.stop() == 0
        (line,) = daemon.log_lines("stopped connections")
        assert "were dropped because the memory was full" in line
        assert "nothing was lost" not in line
