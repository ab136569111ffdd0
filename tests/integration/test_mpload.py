"""mpload against a plain TCP server: everything arrives as it was counted, at the rate that was asked for."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.integration.driver import Daemon
from tests.integration.sink import Received, Sink

MPLOAD = pathlib.Path(sys.executable).parent / "mpload"
DEADLINE_S = 60


def start(sink_port: int, *options: str) -> subprocess.Popen[str]:
    command = [str(MPLOAD), "--port", str(sink_port), "--json", "-", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], exit_code: int = 0) -> dict[str, Any]:
    output, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == exit_code, errors
    assert "Traceback" not in errors
    report: dict[str, Any] = json.loads(output) if output else {"stderr": errors}
    return report


def load(sink: Sink, *options: str, exit_code: int = 0) -> dict[str, Any]:
    return finish(start(sink.port, *options), exit_code)


def as_packets(content: bytes, size: int) -> np.ndarray[Any, Any]:
    words = {"names": ["sequence", "time"], "formats": ["<u8", "<u8"], "offsets": [0, 8], "itemsize": size}
    return np.frombuffer(content, np.dtype(words))  # type: ignore[call-overload]


def test_every_client_sends_its_numbered_packets_at_the_scheduled_times() -> None:
    with Sink() as sink:
        report = load(sink, "--clients", "3", "--packets", "2010", "--rate", "10050", "--packet-size", "32")
    assert (report["packets_sent"], report["bytes_sent"]) == (6030, 6030 * 32)
    content = sink.by_peer()
    for client in report["per_client"]:
        packets = as_packets(content[client["local_address"]], 32)
        assert packets["sequence"].tolist() == list(range(2010))
        steps = np.diff(packets["time"][::804].astype(np.int64))
        assert steps.tolist() == [80_000_000, 80_000_000]
        assert len(set(packets["time"][:804].tolist())) == 1


@pytest.mark.parametrize("size", [1, 7, 15, 16, 1500, 65_536])
def test_what_arrives_is_what_was_hashed(size: int, tmp_path: pathlib.Path) -> None:
    """The spool of the test is made of what the sink received; mpload finds its own bytes in it."""
    streams = tmp_path / "streams"
    streams.mkdir()
    with Sink() as sink:
        packets = ("--packets", "40", "--rate", "2000", "--batch", "13", "--packet-size", str(size))
        process = start(sink.port, "--clients", "2", *packets, "--verify", str(tmp_path))
        sink.wait_for_bytes(2 * 40 * size)
        for received in sink.connections:
            store(streams, received)
        report = finish(process)
    assert report["verify"]["mismatches"] == [] and report["success_rate"] == 1.0
    for client in report["per_client"]:
        assert client["sha256"] == hashlib.sha256(sink.by_peer()[client["local_address"]]).hexdigest()


def test_a_bit_that_was_flipped_on_the_way_is_found(tmp_path: pathlib.Path) -> None:
    (tmp_path / "streams").mkdir()
    with Sink() as sink:
        process = start(sink.port, "--clients", "1", "--packets", "1000", "--rate", "0", "--verify", str(tmp_path))
        sink.wait_for_bytes(16_000)
        sink.connections[0].content[16 * 300] ^= 1
        store(tmp_path / "streams", sink.connections[0])
        report = finish(process, exit_code=1)
    assert "the first difference is at offset 4800, byte 0 of packet 300" in report["verify"]["mismatches"][0]


def store(streams: pathlib.Path, received: Received) -> None:
    """As the daemon names an unnamed client, accepted now."""
    now = time.time()
    moment = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now)) + f".{int(now % 1 * 1e6):06d}Z"
    aside = streams.parent / "aside"
    aside.mkdir()
    (aside / "00000000000000000000.seg").write_bytes(bytes(received.content))
    aside.rename(streams / f"{received.peer.replace(':', '-')}-{moment}")


def test_ten_clients_keep_their_rate_within_a_thousandth() -> None:
    with Sink() as sink:
        report = load(sink, "--clients", "10", "--duration", "4", "--rate", "10050")
    assert report["packets_sent"] == 10 * 10_050 * 4
    for received in sink.connections:
        times = np.array([at for at, _ in received.times[:-1]])
        packets = np.array([count / 16 for _, count in received.times[:-1]])
        assert np.polyfit(times, packets, 1)[0] == pytest.approx(10_050, rel=0.01)
    spans = [received.times[-2][0] - received.times[0][0] for received in sink.connections]
    assert np.median(spans) == pytest.approx(49 * 0.08, rel=0.001)
    assert report["rate"] == pytest.approx(report["target_rate"], rel=0.001)


def test_flat_out_the_time_is_spent_in_the_kernel() -> None:
    with Sink() as sink:
        report = load(sink, "--clients", "1", "--rate", "0", "--packets", "6000000", "--packet-size", "16")
    assert report["packets_sent"] == 6_000_000
    packets = as_packets(bytes(sink.connections[0].content), 16)
    assert np.array_equal(packets["sequence"], np.arange(6_000_000, dtype=np.uint64))
    assert report["target_rate"] is None


def test_a_stalled_server_makes_batches_late_and_loses_none() -> None:
    """What could not be sent in time is counted as unsent; what was sent carries the time it was due."""
    with Sink() as sink:
        options = ("--clients", "1", "--rate", "1000000", "--duration", "1.5", "--drain-timeout", "0.3")
        process = start(
            sink.port, *options, "--close-timeout", "0.3", "--send-buffer", "20000", "--packet-size", "1000"
        )
        sink.wait_for_bytes(1_000_000)
        sink.pause()
        report = finish(process, exit_code=1)
    assert report["packets_unsent"] > 0
    assert report["packets_sent"] + report["packets_unsent"] == 1_500_000
    assert report["errors_by_reason"].keys() <= {"stalled", "close_timeout"}
    assert report["misses"]


def test_a_reset_costs_the_torn_packet_only_and_the_client_comes_back() -> None:
    with Sink(reset_after_bytes=50_001, resets=2) as sink:
        options = ("--clients", "2", "--rate", "100000", "--duration", "2", "--packet-size", "24")
        report = load(sink, *options, "--max-reconnects", "2")
    assert report["reconnects"] == 2 and report["errors"] == 2
    assert len(sink.connections) == 4
    connections = [record for client in report["per_client"] for record in client["connections"]]
    for record in connections:
        content = sink.by_peer()[record["local_address"]]
        packets = as_packets(content[: len(content) // 24 * 24], 24)
        first = record["first_index"]
        assert packets["sequence"].tolist() == list(range(first, first + len(packets)))
        if record["broken"] is None:
            assert len(content) == record["sent_bytes"] and len(content) % 24 == 0


def test_lost_connections_miss_the_threshold() -> None:
    with Sink(reset_after_bytes=1000, resets=1) as sink:
        report = load(sink, "--clients", "1", "--duration", "0.5", exit_code=1)
    assert report["misses"][0] == "1 connections were lost, at most 0 may be"


def test_nobody_there_is_exit_code_3_and_one_line() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        answer = finish(start(unused.getsockname()[1], "--duration", "1"), exit_code=3)
    assert answer["stderr"].startswith("mpload: no client could connect to 127.0.0.1 port ")
    assert answer["stderr"].endswith(": connection refused\n")
    assert answer["stderr"].count("\n") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--clients", "0"], "out of bounds"),
        (["--rate", "-1"], "out of bounds"),
        (["--rate", "fast"], "is no number"),
        (["--packet-size", "70000"], "out of bounds"),
        (["--protocol", "udp"], "is not offered"),
        (["--client-prefix", "a b"], "client id"),
        (["--source-addresses", "x"], "source addresses"),
        (["--hots", "x"], "unrecognized"),
        (["--host", "no.such.name.invalid"], "--host"),
    ],
)
def test_bad_usage_is_exit_code_2(options: Sequence[str], words: str) -> None:
    answer = finish(start(1, *options), exit_code=2)
    assert words in answer["stderr"]


def test_a_spool_that_is_none_is_said_before_anything_is_sent(tmp_path: pathlib.Path) -> None:
    with Sink() as sink:
        answer = load(sink, "--verify", str(tmp_path), exit_code=1)
        assert "is no spool" in answer["stderr"] and not sink.connections


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_early_with_figures_and_whole_packets(number: signal.Signals) -> None:
    with Sink() as sink:
        process = start(sink.port, "--clients", "4", "--duration", "60", "--rate", "50000")
        sink.wait_for_bytes(500_000)
        process.send_signal(number)
        report = finish(process)
    assert report["interrupted"] and report["misses"] == []
    received = sum(len(content) for content in sink.by_peer().values())
    assert received == report["bytes_sent"] == 16 * report["packets_sent"]
    assert report["rate"] == pytest.approx(report["target_rate"], rel=0.05)


def test_ctrl_c_of_a_whole_group_loses_no_figures() -> None:
    with Sink() as sink:
        command = [str(MPLOAD), "--port", str(sink.port), "--json", "-", "--rate", "0", "--clients", "3"]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        sink.wait_for_bytes(10_000_000)
        os.killpg(process.pid, signal.SIGINT)
        report = finish(process)
    received = sum(len(content) for content in sink.by_peer().values())
    assert received == report["bytes_sent"] == 16 * report["packets_sent"]


def test_a_dead_sender_process_fails_the_run() -> None:
    with Sink() as sink:
        process = start(sink.port, "--clients", "2", "--processes", "2", "--duration", "60")
        sink.wait_for_bytes(100_000)
        children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        answer = finish(process, exit_code=1)
    assert "a sender process died" in answer["stderr"]


def test_senders_end_when_mpload_is_killed() -> None:
    with Sink() as sink:
        process = start(sink.port, "--clients", "2", "--processes", "2", "--duration", "60")
        sink.wait_for_bytes(100_000)
        process.kill()
        process.communicate(timeout=DEADLINE_S)
        deadline = time.monotonic() + DEADLINE_S
        while any(received.ended is None for received in sink.connections):
            assert time.monotonic() < deadline, "a connection is open still"
            time.sleep(0.01)


def test_source_addresses_are_spread_over_the_clients() -> None:
    with Sink() as sink:
        load(sink, "--clients", "6", "--packets", "10", "--source-addresses", "127.0.0.1-127.0.0.3")
    hosts = sorted(received.peer.partition(":")[0] for received in sink.connections)
    assert hosts == ["127.0.0.1", "127.0.0.1", "127.0.0.2", "127.0.0.2", "127.0.0.3", "127.0.0.3"]


def test_ipv6_works_and_is_named_with_brackets() -> None:
    with Sink("::1") as sink:
        report = load(sink, "--host", "::1", "--clients", "1", "--packets", "100")
    assert list(sink.by_peer()) == [report["per_client"][0]["local_address"]]
    assert report["per_client"][0]["local_address"].startswith("[::1]:")


def test_300_clients_in_two_processes_send_everything() -> None:
    with Sink() as sink:
        report = load(sink, "--clients", "300", "--packets", "100", "--rate", "200", "--batch", "10")
    assert len(sink.connections) == 300
    assert {len(content) for content in sink.by_peer().values()} == {1600}
    assert report["connect_ms"]["max"] > 0 and len(report["per_client"]) == 300


def test_figures_go_to_standard_output_and_a_file(tmp_path: pathlib.Path) -> None:
    with Sink() as sink:
        command = [str(MPLOAD), "run", "--port", str(sink.port), "--packets", "10", "--json", str(tmp_path / "r.json")]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "sent        100 packets, 1,600 bytes" in answer.stdout
    assert json.loads((tmp_path / "r.json").read_text())["packets_sent"] == 100


def test_quiet_says_nothing() -> None:
    with Sink() as sink:
        command = [str(MPLOAD), "--port", str(sink.port), "--packets", "10", "--quiet"]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stdout == answer.stderr == ""


def test_a_server_that_talks_is_not_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        process = start(server.getsockname()[1], "--clients", "1", "--packets", "1000", "--rate", "0")
        sock, _ = server.accept()
        with sock:
            sock.sendall(b"hello" * 5000)
            while sock.recv(1 << 16):
                pass
        report = finish(process)
    assert report["errors"] == 0


def test_a_server_that_resets_at_the_end_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        process = start(server.getsockname()[1], "--clients", "1", "--packets", "1000", "--rate", "0")
        sock, _ = server.accept()
        while sock.recv(1 << 16):
            pass
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        report = finish(process, exit_code=1)
    assert report["errors_by_reason"] == {"ECONNRESET": 1}
    assert report["packets_sent"] == 1000


def test_packets_that_the_daemon_dropped_are_no_success(tmp_path: pathlib.Path) -> None:
    """The storer stands still until memory is full, so that the oldest packets are dropped."""
    with Daemon(tmp_path) as daemon:
        storer = int(daemon.stats()["storer"]["pid"])
        os.kill(storer, signal.SIGSTOP)
        try:
            options = ("--clients", "2", "--rate", "0", "--packets", "1000000")
            process = start(daemon.port(), *options, "--control-socket", str(daemon.socket_path))
            daemon.wait_for(lambda: daemon.ctl_json("ledger")["totals"]["dropped_bytes"] > 0, what="dropped packets")
        finally:
            os.kill(storer, signal.SIGCONT)
        report = finish(process)
        totals = daemon.ctl_json("ledger")["totals"]
    assert report["packets_sent"] == report["packets_delivered"] == 2_000_000
    assert report["daemon"]["received_bytes"] == 32_000_000
    assert report["daemon"]["dropped_bytes"] == totals["dropped_bytes"] > 0
    assert report["success_rate"] == report["daemon"]["stored_bytes"] / 32_000_000
    assert report["daemon"]["stored_bytes"] == 32_000_000 - totals["dropped_bytes"]


def test_nobody_who_did_not_look_calls_it_a_success() -> None:
    with Sink() as sink:
        report = load(sink, "--clients", "1", "--packets", "100")
    assert (report["success_rate"], report["packets_delivered"]) == (None, 100)
