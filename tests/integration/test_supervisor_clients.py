"""Admission, names of streams, commands on connections, and reloads; real worker, small storer."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import threading
from pathlib import Path

import pytest

from mpserverd.arena.state import SUPERVISOR_SLOT, Con, Head, Phase, RefuseReason, Slot
from mpserverd.control.client import DaemonRefusedError
from tests.integration.supervisor_driver import RunningSupervisor, packets, wait_for

CLIENT = """
[[client]]
id = "pump"
address = "127.0.0.0/8"
"""
PEER = r"127\.0\.0\.1-\d+-\d{8}T\d{6}\.\d{6}Z"


def closed_at_once(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def refused(supervisor: RunningSupervisor, reason: RefuseReason) -> int:
    with supervisor.tables() as (_, state, _):
        return int(state.slots[SUPERVISOR_SLOT, Slot.REASONS + reason])


# -- admission


@pytest.mark.parametrize(
    ("listener", "reason"),
    [
        ("max_connections = 2", RefuseReason.LISTENER_LIMIT),
        ("max_connections_per_address = 2", RefuseReason.ADDRESS_LIMIT),
    ],
)
def test_connections_over_a_limit_are_closed_and_counted(tmp_path: Path, listener: str, reason: RefuseReason) -> None:
    with RunningSupervisor(tmp_path, listener=listener) as supervisor, supervisor.connect():
        with supervisor.connect():
            for _ in range(3):
                with supervisor.connect() as third:
                    assert closed_at_once(third)
            assert refused(supervisor, reason) == 3
            assert supervisor.log().count("connection refused") == 1, "one line, the others are counted"
        wait_for(lambda: len(supervisor.word(Con.STATE)) == 1)
        with supervisor.connect() as fourth:
            fourth.sendall(packets(1))
            wait_for(lambda: len(supervisor.word(Con.STATE)) == 2)


def test_max_clients_holds(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path, max_clients=3) as supervisor, contextlib.ExitStack() as clients:
        for _ in range(3):
            clients.enter_context(supervisor.connect())
        with supervisor.connect() as fourth:
            assert closed_at_once(fourth)
        assert refused(supervisor, RefuseReason.MAX_CLIENTS) == 1


def test_a_denied_address_is_refused_while_others_are_served(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path, listener='deny = ["127.0.0.2"]') as supervisor:
        with socket.create_connection(("127.0.0.1", supervisor.port), source_address=("127.0.0.2", 0)) as stranger:
            assert closed_at_once(stranger)
        with supervisor.connect() as client:
            client.sendall(packets(3))
            wait_for(lambda: supervisor.taken() == [48])
        assert refused(supervisor, RefuseReason.DENIED) == 1


# -- names


def test_a_stream_is_named_after_its_peer(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path) as supervisor:
        for _ in range(2):
            with supervisor.connect() as client:
                client.sendall(packets(1))
        wait_for(lambda: len(supervisor.stored()) == 2)
        assert all(re.fullmatch(PEER, name) for name in supervisor.stored())


def test_a_known_client_goes_on_with_its_stream(tmp_path: Path) -> None:
    body = packets(300)
    with RunningSupervisor(tmp_path, more=CLIENT) as supervisor:
        for at in range(0, len(body), 1600):
            with supervisor.connect() as client:
                client.sendall(body[at : at + 1600])
        wait_for(lambda: len(supervisor.stored().get("pump", b"")) == len(body), 30)
        assert supervisor.stored() == {"pump": body}


def test_a_second_connection_of_a_client_gets_a_stream_of_its_own(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path, more=CLIENT) as supervisor:
        with supervisor.connect() as first, supervisor.connect() as second:
            first.sendall(packets(5, seed=1))
            second.sendall(packets(5, seed=2))
            wait_for(lambda: len(supervisor.stored()) == 2)
        stored = supervisor.stored()
        assert stored.pop("pump") == packets(5, seed=1)
        ((name, content),) = stored.items()
        assert re.fullmatch(rf"pump\.{PEER}", name)
        assert content == packets(5, seed=2)


def test_a_connection_waits_unread_until_its_stream_is_open(tmp_path: Path) -> None:
    body = packets(1_000)
    with RunningSupervisor(tmp_path, fault="opens late", more=CLIENT) as supervisor:
        (supervisor.spool / "hold").touch()
        with supervisor.connect() as client:
            client.sendall(body)
            wait_for(lambda: supervisor.word(Con.STATE) == [1])
            assert supervisor.taken() == []
            (supervisor.spool / "hold").unlink()
            wait_for(lambda: supervisor.taken() == [len(body)])
        wait_for(lambda: supervisor.stored() == {"pump": body})


def test_a_connection_kicked_while_it_waits_leaves_the_row_to_the_storer(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path, fault="opens late", more=CLIENT) as supervisor:
        (supervisor.spool / "hold").touch()
        with supervisor.connect() as client:
            wait_for(lambda: supervisor.word(Con.STATE) == [1])
            supervisor.ask("kick", target="pump")
            assert closed_at_once(client)
        (supervisor.spool / "hold").unlink()
        with supervisor.connect() as again:
            again.sendall(packets(2))
            wait_for(lambda: supervisor.stored().get("pump") == packets(2))


def test_a_stop_does_not_wait_for_a_stream_that_does_not_open(tmp_path: Path) -> None:
    body = packets(100)
    with RunningSupervisor(tmp_path, fault="opens late", more=CLIENT, stop_timeout_s=4) as supervisor:
        (supervisor.spool / "hold").touch()
        with supervisor.connect() as client:
            client.sendall(body)
            wait_for(lambda: supervisor.word(Con.STATE) == [1])
            supervisor.stop()
        ((name, content),) = supervisor.stored().items()
        assert name.startswith("pump.127")
        assert content == body


# -- commands


def test_kick_ends_the_connection_that_is_named_and_no_other(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path) as supervisor, supervisor.connect() as one, supervisor.connect() as other:
        wait_for(lambda: supervisor.word(Con.STATE) == [2, 2])
        host, port = one.getsockname()
        told = supervisor.ask("kick", target=f"{host}:{port}")["connections"]
        assert [each["peer"] for each in told] == [f"{host}:{port}"]
        assert closed_at_once(one)
        other.sendall(packets(1))
        wait_for(lambda: supervisor.taken() == [16])
        assert supervisor.log_contains("reason=kicked")


def test_a_paused_connection_stays_paused_when_its_worker_dies(tmp_path: Path) -> None:
    """The one worker reads the other connection, whose bytes came later, and leaves the paused one alone."""
    with RunningSupervisor(tmp_path, workers=1) as supervisor, supervisor.connect() as paused:
        wait_for(lambda: supervisor.word(Con.STATE) == [2])
        host, port = paused.getsockname()
        supervisor.ask("pause", target=f"{host}:{port}")
        os.kill(supervisor.workers()[0]["pid"], signal.SIGKILL)
        wait_for(lambda: supervisor.word(Con.ADOPTIONS) == [1])
        paused.sendall(packets(10))
        with supervisor.connect() as other:
            other.sendall(packets(3))
            wait_for(lambda: sorted(supervisor.taken()) == [0, 48])
            supervisor.ask("resume", target="all")
            wait_for(lambda: sorted(supervisor.taken()) == [48, 160])


def test_what_nobody_is_called_is_a_plain_no(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path) as supervisor:
        with pytest.raises(DaemonRefusedError, match="no connection is called") as error:
            supervisor.ask("kick", target="nobody")
        assert error.value.exit_code == 1
        with pytest.raises(DaemonRefusedError) as usage:
            supervisor.ask("loglevel", level="loud")
        assert usage.value.exit_code == 2
        with pytest.raises(DaemonRefusedError, match="unknown command"):
            supervisor.ask("dance")


def test_nonsense_on_the_control_socket_harms_nobody(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path) as supervisor, contextlib.ExitStack() as stack:
        for _ in range(40):  # more than there are places
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(str(tmp_path / "control.sock"))
            with contextlib.suppress(BrokenPipeError):
                client.sendall(b"{nonsense\n" + b"\x00" * 100)
        wait_for(supervisor.answers, 10)
        with supervisor.connect() as fine:
            fine.sendall(packets(1))
            wait_for(lambda: supervisor.taken() == [16])


def test_pipelined_requests_are_answered_in_order(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "control.sock"))
        client.sendall(b'{"command": "ping"}\n{"command": "nothing"}\n{"command": "config"}\n')
        with client.makefile("rb") as replies:
            answers = [json.loads(replies.readline()) for _ in range(3)]
        assert [answer["ok"] for answer in answers] == [True, False, True]
        assert answers[2]["result"]["server"]["workers"] == 2


def test_events_tell_of_deaths_and_reloads(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path) as supervisor:
        supervisor.ask("reload")
        events = supervisor.ask("events", since=0)
        kinds = [event["kind"] for event in events]
        assert kinds[0] == "ready"
        assert "configuration reloaded" in kinds
        assert supervisor.ask("events", since=events[-1]["number"]) == [] or len(kinds) > 1


# -- reload


def wait_for_fresh_workers(supervisor: RunningSupervisor, old: set[int], count: int) -> None:
    def fresh() -> bool:
        pids = {worker["pid"] for worker in supervisor.facts()["workers"]}
        return len(pids) == count and not pids & old and len(supervisor.workers()) == count

    wait_for(fresh)


def test_a_reload_under_load_moves_every_connection_without_a_gap(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path) as supervisor:
        bodies = [packets(40_000, seed) for seed in range(3)]

        def send(body: bytes) -> None:
            with supervisor.connect() as client:
                for at in range(0, len(body), 3200):
                    client.sendall(body[at : at + 3200])
                    finished.wait(0.002)

        finished = threading.Event()
        senders = [threading.Thread(target=send, args=(body,)) for body in bodies]
        for sender in senders:
            sender.start()
        wait_for(lambda: len(supervisor.word(Con.STATE)) == 3)
        old = {worker["pid"] for worker in supervisor.workers()}
        storer = supervisor.facts()["storer"]["pid"]
        supervisor.configure(workers=3)
        supervisor.signal(signal.SIGHUP)
        wait_for_fresh_workers(supervisor, old, 3)
        wait_for(lambda: (supervisor.facts()["storer"] or {}).get("pid") not in (None, storer))
        finished.set()
        for sender in senders:
            sender.join()
        wait_for(lambda: sorted(supervisor.stored().values()) == sorted(bodies))
        assert not supervisor.log_contains("child died")
        assert supervisor.stop() == 0


def test_a_wrong_configuration_changes_nothing_and_says_why(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path) as supervisor, supervisor.connect() as client:
        pids = {worker["pid"] for worker in supervisor.workers()}
        supervisor.config_path.write_text("[server]\nworkerz = 3\n")
        with pytest.raises(DaemonRefusedError, match="workerz") as error:
            supervisor.ask("reload")
        assert error.value.exit_code == 2
        supervisor.signal(signal.SIGHUP)
        wait_for(lambda: supervisor.log().count("reload refused") == 2)
        client.sendall(packets(1))
        wait_for(lambda: supervisor.taken() == [16])
        assert {worker["pid"] for worker in supervisor.workers()} == pids


def test_listeners_come_and_go_and_connections_of_a_closed_one_go_on(tmp_path: Path) -> None:
    second = '[[listener]]\nname = "second"\naddress = "127.0.0.1:0"\npacket_size = 32\n'
    with RunningSupervisor(tmp_path, more=second) as supervisor:
        ports = {each["name"]: each["address"] for each in supervisor.facts()["listeners"].values()}
        with supervisor.connect(int(ports["second"].rpartition(":")[2])) as client:
            client.sendall(packets(2))
            wait_for(lambda: supervisor.taken() == [32])
            supervisor.configure(more="")
            assert "listener second closed; its connections go on" in supervisor.ask("reload")["changed"]
            with pytest.raises(ConnectionRefusedError):
                supervisor.connect(int(ports["second"].rpartition(":")[2]))
            client.sendall(packets(2))
            wait_for(lambda: supervisor.taken() == [64])
        wait_for(lambda: list(supervisor.stored().values()) == [packets(2) * 2])
        with supervisor.connect() as other:
            other.sendall(packets(1))
            wait_for(lambda: supervisor.taken() == [16])


@pytest.mark.parametrize(
    ("protocol", "hello", "answer"), [("raw", "", b""), ("mps", "MPS/1 plc-{} {}\n", b"OK 0 durable ")]
)
def test_who_comes_during_a_reload_is_served_by_workers_that_know_the_listener(
    tmp_path: Path, protocol: str, hello: str, answer: bytes
) -> None:
    """Accepted at once, while only workers of the old configuration run: those have never heard of the listener."""
    second = '[[listener]]\nname = "second"\naddress = "127.0.0.1:0"\non_full = "block"\n'
    bodies = [packets(10, seed) for seed in range(4)]
    with RunningSupervisor(tmp_path) as supervisor:
        for number, body in enumerate(bodies):
            size = (16, 32)[number % 2]  # with another packet size it is another listener
            supervisor.configure(more=f'{second}protocol = "{protocol}"\npacket_size = {size}\n')
            supervisor.ask("reload")
            ports = {each["name"]: each["address"] for each in supervisor.facts()["listeners"].values()}
            with supervisor.connect(int(ports["second"].rpartition(":")[2])) as client:
                sent = hello.format(number, size).encode() + body
                client.sendall(sent)
                wait_for(lambda: supervisor.taken() == [len(sent)])  # noqa: B023
                assert client.recv(len(answer)) == answer
            wait_for(lambda: supervisor.log().count("processes replaced") == number + 1)  # noqa: B023
        assert not supervisor.log_contains("child died")
        wait_for(lambda: sorted(supervisor.stored().values()) == bodies)


def test_keys_that_need_a_restart_are_named_and_kept(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path) as supervisor:
        supervisor.configure(buffers="16 MiB", max_clients=9)
        answer = supervisor.ask("reload")
        assert answer["needs_restart"] == ["buffers.bytes"]
        assert supervisor.facts()["max_clients"] == 9
        assert supervisor.log_contains("needs a restart")


def test_a_listener_that_cannot_be_opened_refuses_the_reload(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path) as supervisor, socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        supervisor.configure(more=f'[[listener]]\nname = "second"\naddress = "127.0.0.1:{port}"\n', max_clients=3)
        with pytest.raises(DaemonRefusedError, match=f"cannot listen on 127.0.0.1:{port}"):
            supervisor.ask("reload")
        assert supervisor.facts()["max_clients"] == 10


def test_a_status_summary_is_logged_on_request(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path) as supervisor:
        supervisor.signal(signal.SIGUSR1)
        wait_for(lambda: supervisor.log().count("status of a child") == 3)


# -- drain


def test_a_daemon_that_drains_lets_nobody_in_and_goes_on_with_the_others(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path) as supervisor, supervisor.connect() as client:
        client.sendall(packets(5))
        wait_for(lambda: supervisor.taken() == [80])
        assert supervisor.ask("drain") == {"draining": True, "connections": 1}
        with supervisor.connect() as newcomer:
            assert closed_at_once(newcomer)
        client.sendall(packets(5))
        wait_for(lambda: supervisor.taken() == [160])
        assert refused(supervisor, RefuseReason.DRAINING) == 1
        with supervisor.tables() as (_, state, _):
            assert state.words[Head.PHASE] == Phase.DRAINING
        assert supervisor.ask("undrain")["draining"] is False
        with supervisor.connect() as newcomer:
            newcomer.sendall(packets(2))
            wait_for(lambda: sorted(supervisor.taken()) == [32, 160])
