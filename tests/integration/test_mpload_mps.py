"""mpload as an mps client: everything is acknowledged, whatever the server does, and found where it should be."""

from __future__ import annotations

import hashlib
import os
import pathlib
import re
import signal
import socket
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.integration.driver import Daemon
from tests.integration.mps_sink import Fault, MpsSink
from tests.integration.test_mpload import as_packets, finish, start

LISTENER = {"name": "mps", "address": "127.0.0.1:0", "protocol": "mps", "packet_size": 0}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def begin(port: int, *options: str) -> subprocess.Popen[str]:
    return start(port, "--protocol", "mps", *options)


def load(sink: MpsSink, *options: str, exit_code: int = 0) -> dict[str, Any]:
    return finish(begin(sink.port, *options), exit_code)


def numbers(sink: MpsSink, client_id: str, size: int = 16) -> list[int]:
    found: list[int] = as_packets(bytes(sink.streams[client_id].content), size)["sequence"].tolist()
    return found


def test_every_client_has_a_stream_of_its_own_and_ends_when_all_is_acknowledged() -> None:
    with MpsSink(ack_bytes=20_000) as sink:
        report = load(sink, "--clients", "3", "--packets", "2010", "--packet-size", "24", "--client-prefix", "a.b")
    assert sorted(sink.streams) == ["a.b-0", "a.b-1", "a.b-2"]
    assert all(numbers(sink, name, 24) == list(range(2010)) for name in sink.streams)
    assert (report["protocol"], report["level"], report["packets_acked"]) == ("mps", "durable", 6030)
    assert (report["success_rate"], report["packets_resent"], report["packets_withdrawn"]) == (1.0, 0, 0)
    assert report["ack_latency_ms"].keys() == {"p50", "p99", "p999", "max"}
    assert report["ack_latency_ms"]["max"] >= report["ack_latency_ms"]["p50"] >= report["lateness_ms"]["p50"]
    for client in report["per_client"]:
        assert client["client_id"] in sink.streams and client["packets_acked"] == 2010
        assert client["epoch"] == f"{sink.streams[client['client_id']].epoch:016x}"


def test_resets_and_goodbyes_lose_nothing_and_double_nothing() -> None:
    """The server forgets what it had not acknowledged; the client sends the same bytes again."""
    faults = [
        Fault("reset", 50_001, forget=True),
        Fault("bye", 30_003, "stopping"),
        Fault("bye", 30_000, "superseded retry=1", forget=True),
        Fault("err", text="busy come back"),
        Fault("close"),
        Fault("reset", 40_007),
    ]
    with MpsSink(faults, ack_bytes=100_000) as sink:
        options = ("--clients", "1", "--rate", "100000", "--duration", "2", "--max-reconnects", "2")
        report = load(sink, *options, "--min-rate-percent", "0")
    packets = as_packets(bytes(sink.streams["mpload-1-0"].content), 16)
    assert packets["sequence"].tolist() == list(range(200_000))
    assert (np.diff(packets["time"].astype(np.int64)) >= 0).all() and len(set(packets["time"].tolist())) == 249
    assert report["packets_acked"] == report["packets_sent"] == 200_000
    assert report["packets_resent"] > 0 and report["packets_withdrawn"] == 0
    assert report["errors_by_reason"] == {"ECONNRESET": 2, "refused_busy": 1, "hello_unanswered": 1}
    assert [record["bye"] for record in report["per_client"][0]["connections"]] == [
        None,
        "stopping",
        "superseded",
        None,
        None,
    ]
    assert report["ack_latency_ms"]["max"] >= 1000  # the pause that the server asked for is in it
    assert all(re.search(r" epoch=[0-9a-f]{16} first=\d+$", hello) for hello in sink.hellos[1:])


def test_flat_out_clients_resume_too() -> None:
    faults = [Fault("reset", 3_000_001, forget=True) for _ in range(3)]
    with MpsSink(faults, ack_bytes=1_000_000) as sink:
        report = load(sink, "--clients", "2", "--rate", "0", "--packets", "500000", "--max-reconnects", "3")
    assert all(numbers(sink, name) == list(range(500_000)) for name in sink.streams)
    assert report["packets_acked"] == 1_000_000 and report["acked_rate"] > 0
    assert report["reconnects"] == 3 and report["packets_resent"] > 0


def test_a_server_that_acknowledges_nothing_is_exit_code_1() -> None:
    with MpsSink(ack_bytes=None) as sink:
        report = load(sink, "--clients", "2", "--packets", "100", "--close-timeout", "0.3", exit_code=1)
    assert report["packets_sent"] == 200 and report["packets_acked"] == 0
    assert report["errors_by_reason"] == {"unacknowledged": 2}
    assert "200 packets that were sent are not acknowledged" in report["misses"]


def test_acknowledged_packets_that_the_server_asks_for_again_are_exit_code_1() -> None:
    with MpsSink([Fault("reset", 30_000)], ack_bytes=1) as sink:
        process = begin(sink.port, "--clients", "1", "--duration", "1.5", "--max-reconnects", "1")
        sink.wait_until(lambda: len(sink.streams["mpload-1-0"].content) >= 30_000 if sink.streams else False)
        del sink.streams["mpload-1-0"].content[1600:]
        report = finish(process, exit_code=1)
    assert report["packets_withdrawn"] > 0 and report["packets_acked"] == report["packets_sent"]
    assert "asked for again" in " ".join(report["misses"])
    assert numbers(sink, "mpload-1-0") == list(range(report["packets_sent"]))


@pytest.mark.parametrize(("text", "word"), [("token who are you", "token"), ("epoch no", "epoch")])
def test_nobody_admitted_is_exit_code_3_and_one_line(text: str, word: str) -> None:
    with MpsSink([Fault("err", text=text)]) as sink:
        answer = load(sink, "--clients", "1", "--duration", "1", exit_code=3)
    assert answer["stderr"].endswith(f": the server refused the hello: {word}\n")
    assert answer["stderr"].count("\n") == 1


def test_one_client_that_is_refused_for_good_is_missed_and_the_others_go_on() -> None:
    with MpsSink([Fault("err", text="client-id not you")]) as sink:
        report = load(sink, "--clients", "3", "--packets", "500", exit_code=1)
    assert "1 of 3 clients never had a connection" in report["misses"]
    assert report["packets_acked"] == 1000 and len(sink.streams) == 2


@pytest.mark.parametrize("rate", ["50000", "0"])
def test_a_signal_ends_a_run_when_what_was_sent_is_acknowledged(rate: str) -> None:
    with MpsSink(ack_bytes=100_000) as sink:
        process = begin(sink.port, "--clients", "2", "--duration", "60", "--rate", rate)
        sink.wait_until(lambda: sum(len(stream.content) for stream in sink.streams.values()) > 500_000)
        process.send_signal(signal.SIGINT)
        report = finish(process)
    assert report["interrupted"] and report["misses"] == []
    assert report["packets_acked"] == report["packets_sent"] > 0
    assert sum(len(stream.content) for stream in sink.streams.values()) == 16 * report["packets_sent"]


def test_a_second_run_has_new_epochs_and_a_talkative_server_does_no_harm() -> None:
    with MpsSink([Fault("say", 100, "\n\nACK 0\nAC\n")]) as sink:
        for _ in range(2):
            report = load(sink, "--clients", "1", "--packets", "804")
    assert report["errors"] == 0 and len({epoch for _, epoch in sink.epochs}) == 2
    assert numbers(sink, "mpload-1-0") == list(range(804))


# -- the spool


def keep(sink: MpsSink, spool: pathlib.Path) -> None:
    """As the daemon's files: a stream is its packets."""
    for name, stream in sink.streams.items():
        (spool / "streams" / name).mkdir()
        (spool / "streams" / name / "00000000000000000000.seg").write_bytes(bytes(stream.content))


def flip(content: bytearray) -> None:
    content[16 * 300] ^= 1


def cut(content: bytearray) -> None:
    del content[-16:]


def swap(content: bytearray) -> None:
    content[16 * 5 : 16 * 7] = content[16 * 6 : 16 * 7] + content[16 * 5 : 16 * 6]


def double(content: bytearray) -> None:
    content += content[-16:]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (flip, "the first difference is at offset 4800, byte 0 of packet 300"),
        (cut, "1 acknowledged packets are missing at its end"),
        (swap, "byte 0 of packet 5"),
        (double, "the stream holds 32016 bytes, 32000 were sent"),
    ],
)
@pytest.mark.parametrize("rate", ["20000", "0"])
def test_what_the_spool_holds_is_compared_over_reconnects(
    tmp_path: pathlib.Path, rate: str, spoil: Callable[[bytearray], None], words: str
) -> None:
    for directory, damage in (("good", None), ("bad", spoil)):
        spool = tmp_path / directory
        (spool / "streams").mkdir(parents=True)
        with MpsSink([Fault("reset", 20_001, forget=True)], ack_bytes=15_000) as sink:
            options = ("--clients", "1", "--rate", rate, "--packets", "2000", "--max-reconnects", "1")
            process = begin(sink.port, *options, "--verify", str(spool))
            sink.wait_until(lambda: any(stream.acked == 2000 for stream in sink.streams.values()))
            if damage is not None:
                damage(sink.streams["mpload-1-0"].content)
            keep(sink, spool)
            report = finish(process, exit_code=0 if damage is None else 1)
        assert report["verify"]["stored_packets"] == 2000 - (damage is cut)
        assert (words in " ".join(report["verify"]["mismatches"])) is (damage is not None)


# -- the daemon


def test_the_daemon_acknowledges_everything_through_the_deaths_of_its_processes(tmp_path: pathlib.Path) -> None:
    with Daemon(tmp_path, {"listener": [LISTENER]}) as daemon:
        options = ("--clients", "5", "--rate", "10050", "--duration", "4", "--verify", str(daemon.spool))
        process = begin(daemon.port("mps"), *options)
        for death in range(6):
            daemon.wait_for(
                lambda: daemon.account("acked_bytes") > 300_000 * (death + 1),  # noqa: B023 - used at once
                what="acknowledgements",
            )
            name = ("storer", "worker")[death % 2]
            pid = daemon.pid_of("storer") if name == "storer" else int(daemon.stats()["worker_list"][0]["pid"])
            os.kill(pid, signal.SIGKILL)
        report = finish(process)
        daemon.ledger()
        content = b"".join(
            path.read_bytes() for path in sorted((daemon.spool / "streams" / "mpload-1-0").glob("*.seg"))
        )
    assert report["packets_acked"] == 5 * 40_200 and report["verify"]["mismatches"] == []
    assert report["reconnects"] == report["errors"] == report["packets_resent"] == 0
    assert as_packets(content, 16)["sequence"].tolist() == list(range(40_200))
    client = report["per_client"][0]
    assert hashlib.sha256(content).hexdigest() == client["sha256"]


def test_clients_says_what_each_one_is_promised_and_what_is_at_risk(tmp_path: pathlib.Path) -> None:
    """With the storer standing still an mps client keeps what it sent, and a raw one may lose it."""
    listeners = [LISTENER, {"name": "raw", "address": "127.0.0.1:0"}]
    with Daemon(tmp_path, {"listener": listeners}) as daemon:
        storer = daemon.pid_of("storer")
        mps = begin(daemon.port("mps"), "--clients", "1", "--duration", "3")
        raw = start(daemon.port("raw"), "--clients", "1", "--duration", "3")
        daemon.wait_for(lambda: daemon.account("acked_bytes") > 0 and len(daemon.clients()) == 2)
        os.kill(storer, signal.SIGSTOP)
        try:
            daemon.wait_for(
                lambda: all(
                    (client["unacked_bytes"] or client["at_risk_bytes"]) > 20_000 for client in daemon.clients()
                ),
                what="packets that are not durable",
            )
            found = {client["listener"]: client for client in daemon.clients()}
            table = daemon.ctl("clients").stdout
        finally:
            os.kill(storer, signal.SIGCONT)
        reports = finish(mps), finish(raw)
    kept = found["mps"]["unacked_bytes"]
    assert (found["mps"]["level"], found["mps"]["at_risk_bytes"]) == ("durable", 0) and kept > 0
    assert found["mps"]["at_risk"] == f"0: the client keeps {kept} bytes"
    assert (found["raw"]["level"], found["raw"]["unacked_bytes"]) == ("raw", None)
    assert found["raw"]["at_risk"] == f"raw: up to {found['raw']['at_risk_bytes']} bytes"
    assert found["raw"]["at_risk_bytes"] > 0 and "0: the client keeps " in table and "raw: up to " in table
    assert reports[0]["packets_acked"] == 30_150 and reports[0]["ack_latency_ms"]["max"] > 100


def test_clients_go_on_after_a_stop_and_a_start(tmp_path: pathlib.Path) -> None:
    """The daemon says goodbye, and finds the streams again: not a packet is lost, none is there twice."""
    listener = {**LISTENER, "address": f"127.0.0.1:{free_port()}"}
    with Daemon(tmp_path, {"listener": [listener]}) as daemon:
        options = ("--clients", "4", "--duration", "4", "--verify", str(daemon.spool), "--min-rate-percent", "0")
        process = begin(daemon.port("mps"), *options)
        for round_ in range(2):
            daemon.wait_until_connected(4)
            daemon.wait_for(lambda: daemon.account("acked_bytes") > 500_000 * (round_ + 1))  # noqa: B023 - at once
            daemon.stop()
            daemon.start()
        report = finish(process)
    assert report["packets_acked"] == 4 * 40_200 and report["packets_withdrawn"] == 0
    assert report["verify"]["mismatches"] == [] and report["verify"]["connections"] == 12
    byes = [record["bye"] for client in report["per_client"] for record in client["connections"]]
    assert byes.count("stopping") == 8 and byes.count(None) == 4


def test_300_clients_are_acknowledged(tmp_path: pathlib.Path) -> None:
    settings = {"listener": [LISTENER], "server": {"max_clients": 300}, "buffers": {"bytes": "64 MiB"}}
    with Daemon(tmp_path, settings) as daemon:
        options = ("--clients", "300", "--rate", "804", "--duration", "3", "--verify", str(daemon.spool))
        report = finish(begin(daemon.port("mps"), *options))
    assert report["packets_acked"] == 300 * 2412 and report["verify"]["mismatches"] == []
