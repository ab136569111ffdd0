"""The supervisor's start, its ends, and the deaths of its children; real worker, small storer."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from mpserverd.arena.chunks import USED
from mpserverd.arena.counters import Role, column
from mpserverd.arena.state import SUPERVISOR_SLOT, Con, Slot
from tests.integration.supervisor_driver import RunningSupervisor, packets, wait_for


def only_stream(supervisor: RunningSupervisor, size_bytes: int) -> bytes:
    """The content of the one stream, once so much is stored."""
    wait_for(lambda: sum(map(len, supervisor.stored().values())) >= size_bytes)
    (content,) = supervisor.stored().values()
    return content


def alive(pid: int) -> bool:
    """Zombies do not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# -- start


def failed_start(directory: Path, fault: str = "", **settings: object) -> str:
    supervisor = RunningSupervisor(directory, fault=fault, **settings)
    try:
        assert supervisor.process.wait(20) == 1
        return supervisor.log()
    finally:
        supervisor.__exit__()


def test_a_taken_port_ends_the_start_with_the_holder(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        text = failed_start(tmp_path, port=port)
    assert f"cannot listen on 127.0.0.1:{port}" in text
    assert f"pid {os.getpid()}" in text
    assert "Traceback" not in text
    assert not (tmp_path / "control.sock").exists()


def test_a_storer_that_cannot_start_ends_the_start_with_its_reason(tmp_path: Path) -> None:
    text = failed_start(tmp_path, fault="refuses")
    assert "mpserverd: storer cannot start: spool is not writable" in text
    assert "Traceback" not in text


def test_a_second_daemon_does_not_start_and_the_first_goes_on(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path) as supervisor:
        (tmp_path / "second").mkdir()
        text = failed_start(tmp_path / "second", home=tmp_path)
        assert f"runs already: pid {supervisor.process.pid}" in text
        assert supervisor.answers()


def test_a_socket_that_a_killed_daemon_left_is_replaced(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path) as first:
        first.process.kill()
        first.process.wait()
    assert (tmp_path / "control.sock").exists()
    (tmp_path / "log").unlink()
    with RunningSupervisor(tmp_path) as second:
        assert second.ask("ping")["pid"] == second.process.pid


def test_clients_that_do_not_fit_are_lowered_loudly(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path, max_clients=100, buffers="16 MiB", descriptors=700) as supervisor:
        assert supervisor.facts()["max_clients"] == 84
        assert supervisor.log_contains("max_clients lowered max_clients=84")


def test_the_control_socket_is_for_the_owner_and_the_group(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path):
        assert (tmp_path / "control.sock").stat().st_mode & 0o777 == 0o660


def test_tables_that_are_passed_on_cannot_be_written(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path) as supervisor, supervisor.tables() as (_, state, _):
        with pytest.raises(ValueError, match="read-only"):
            state.slots[0, 0] = 1
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(state.fd, b"x")


# -- children


def test_a_child_holds_nothing_but_what_it_was_given(tmp_path: Path) -> None:
    """Listeners, connections, the control socket and other children's channels stay in the supervisor."""
    with RunningSupervisor(tmp_path) as supervisor, supervisor.connect(), supervisor.connect():
        wait_for(lambda: sum(worker["connections"] for worker in supervisor.workers()) == 2)
        facts = supervisor.facts()
        for child in [*facts["workers"], facts["storer"]]:
            links = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{child['pid']}/fd")]
            sockets = [link for link in links if link.startswith("socket:")]
            own = 1 + child["connections"]  # its channel and its connections
            assert len(sockets) == own, (child["name"], links)


def test_connections_spread_over_the_workers(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path, workers=3) as supervisor, contextlib.ExitStack() as clients:
        for _ in range(9):
            clients.enter_context(supervisor.connect())
        wait_for(lambda: [worker["connections"] for worker in supervisor.workers()] == [3, 3, 3])


def test_killed_workers_lose_no_byte(tmp_path: Path) -> None:
    body = packets(120_000)
    with RunningSupervisor(tmp_path, workers=2) as supervisor, supervisor.connect() as client:
        step = len(body) // 12
        for number, at in enumerate(range(0, len(body), step)):
            client.sendall(body[at : at + step])
            if number in (2, 5, 8):
                owner = wait_for(lambda: [each for each in supervisor.workers() if each["connections"]])[0]
                os.kill(owner["pid"], signal.SIGKILL)
                wait_for(lambda pid=owner["pid"]: pid not in [each["pid"] for each in supervisor.workers()])
        client.shutdown(socket.SHUT_WR)
        assert only_stream(supervisor, len(body)) == body
        assert supervisor.log().count("connections adopted") == 3
        assert supervisor.stop() == 0


def test_a_storm_of_deaths_and_reloads_loses_no_byte(tmp_path: Path) -> None:
    """Clients send all the while; workers are killed or stopped, and configurations reloaded, in a random order."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    chance = random.Random(seed)
    bodies = [packets(150_000, number) for number in range(4)]
    with RunningSupervisor(tmp_path, workers=3, heartbeat_timeout_s=2.5) as supervisor:
        over = threading.Event()

        def send(body: bytes) -> None:
            with supervisor.connect() as client:
                step = 8_008
                for at in range(0, len(body), step):
                    client.sendall(body[at : at + step])
                    over.wait(0.005)

        senders = [threading.Thread(target=send, args=(body,)) for body in bodies]
        for sender in senders:
            sender.start()
        try:
            for _ in range(10):
                storm(supervisor, chance)
                over.wait(chance.random() * 0.1)
        finally:
            over.set()
            for sender in senders:
                sender.join()
        wait_for(lambda: sum(map(len, supervisor.stored().values())) >= sum(map(len, bodies)), 30)
        assert sorted(supervisor.stored().values()) == sorted(bodies)
        wait_for(lambda: supervisor.word(Con.STATE) == [])
        with supervisor.tables() as (_, _, chunks):
            assert not ((chunks.words & 3) == USED).any(), "every chunk came back"
        assert supervisor.stop() == 0


def storm(supervisor: RunningSupervisor, chance: random.Random) -> None:
    workers = supervisor.workers()
    what = chance.choice(["kill", "kill", "stop", "reload"])
    if what == "reload" or not workers:
        supervisor.signal(signal.SIGHUP)
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(chance.choice(workers)["pid"], signal.SIGKILL if what == "kill" else signal.SIGSTOP)


def test_messages_that_do_not_fit_a_channel_wait(tmp_path: Path) -> None:
    """A socket's buffer holds about 278 messages; the worker is stopped while 400 connections come."""
    with (
        RunningSupervisor(tmp_path, workers=1, max_clients=500, buffers="64 MiB", heartbeat_timeout_s=60) as supervisor,
        contextlib.ExitStack() as clients,
    ):
        (worker,) = supervisor.workers()
        os.kill(worker["pid"], signal.SIGSTOP)
        sockets = [clients.enter_context(supervisor.connect()) for _ in range(400)]
        wait_for(lambda: supervisor.workers()[0]["connections"] == 400)
        os.kill(worker["pid"], signal.SIGCONT)
        for number, client in enumerate(sockets):
            client.sendall(packets(1, number))
        wait_for(lambda: len(supervisor.stored()) == 400 and all(supervisor.stored().values()))
        assert sorted(supervisor.stored().values()) == sorted(packets(1, number) for number in range(400))


def test_the_only_worker_killed_is_replaced_and_takes_up_its_connection(tmp_path: Path) -> None:
    body = packets(5_000)
    with RunningSupervisor(tmp_path, workers=1) as supervisor, supervisor.connect() as client:
        client.sendall(body[:40_000])
        wait_for(lambda: supervisor.workers()[0]["connections"] == 1)
        os.kill(supervisor.workers()[0]["pid"], signal.SIGKILL)
        client.sendall(body[40_000:])
        client.shutdown(socket.SHUT_WR)
        assert only_stream(supervisor, len(body)) == body
        assert supervisor.facts()["workers"][0]["restarts"] == 1


def test_a_stopped_worker_is_killed_and_only_then_its_connections_go_on(tmp_path: Path) -> None:
    body = packets(5_000)
    with RunningSupervisor(tmp_path, heartbeat_timeout_s=2.5) as supervisor, supervisor.connect() as client:
        client.sendall(body[:40_000])
        owner = wait_for(lambda: [each for each in supervisor.workers() if each["connections"]])[0]
        os.kill(owner["pid"], signal.SIGSTOP)
        client.sendall(body[40_000:])
        client.shutdown(socket.SHUT_WR)
        assert only_stream(supervisor, len(body)) == body
        log = supervisor.log()
        assert "gave no sign of life" in log
        assert log.index("child died") < log.index("connections adopted")
        assert not alive(owner["pid"])


def test_a_killed_storer_is_replaced_and_everything_is_stored(tmp_path: Path) -> None:
    body = packets(20_000)
    with RunningSupervisor(tmp_path) as supervisor, supervisor.connect() as client:
        client.sendall(body[:100_000])
        os.kill(supervisor.facts()["storer"]["pid"], signal.SIGKILL)
        client.sendall(body[100_000:])
        client.shutdown(socket.SHUT_WR)
        assert only_stream(supervisor, len(body)) == body
        assert supervisor.facts()["storer"]["restarts"] == 1


def test_a_stopped_storer_is_called_stuck_and_not_killed(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path, heartbeat_timeout_s=2.5) as supervisor:
        pid = supervisor.facts()["storer"]["pid"]
        os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: supervisor.facts()["storer"]["state"] == "stuck")
        os.kill(pid, signal.SIGCONT)
        wait_for(lambda: supervisor.facts()["storer"]["state"] == "running")
        assert supervisor.facts()["storer"]["pid"] == pid


def test_children_die_with_the_supervisor(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path) as supervisor:
        facts = supervisor.facts()
        pids = [each["pid"] for each in [*facts["workers"], facts["storer"]]]
        supervisor.process.kill()
        wait_for(lambda: not any(map(alive, pids)))


def test_a_signal_to_the_group_is_for_the_supervisor_alone(tmp_path: Path) -> None:
    """Ctrl-C reaches the children too; they must not leave before they are told."""
    body = packets(5_000)
    with RunningSupervisor(tmp_path) as supervisor, supervisor.connect() as client:
        client.sendall(body)
        wait_for(supervisor.taken)
        os.killpg(supervisor.process.pid, signal.SIGINT)
        assert supervisor.process.wait(15) == 0
        assert list(supervisor.stored().values()) == [body]
        assert not supervisor.log_contains("child died")


def test_counters_of_a_slot_go_on_when_its_process_is_replaced(tmp_path: Path) -> None:
    body = packets(1_000)
    with RunningSupervisor(tmp_path, workers=1) as supervisor:
        for _ in range(2):
            with supervisor.connect() as client:
                client.sendall(body)
            wait_for(lambda: supervisor.word(Con.STATE) == [])
            pid = supervisor.workers()[0]["pid"]
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda gone=pid: [each["pid"] for each in supervisor.workers()] not in ([], [gone]))
        with supervisor.tables() as (_, state, _):
            assert int(state.slots[2:, Slot.RECEIVED_BYTES].sum()) == 2 * len(body)


def test_deaths_are_counted_over_reloads_and_a_reload_is_none(tmp_path: Path) -> None:
    def restarts(supervisor: RunningSupervisor) -> list[int]:
        facts = supervisor.facts()
        return [each["restarts"] for each in (*facts["workers"], facts["storer"])]

    with RunningSupervisor(tmp_path, workers=2) as supervisor:
        for deaths in (1, 2):
            facts = supervisor.facts()
            for child in (facts["workers"][1], facts["storer"]):
                os.kill(child["pid"], signal.SIGKILL)
            wait_for(lambda: supervisor.log().count("child died") == 2 * deaths)  # noqa: B023
            wait_for(lambda: len(supervisor.workers()) == 2 and supervisor.facts()["storer"]["state"] == "running")
            supervisor.ask("reload")
            wait_for(lambda: supervisor.log().count("processes replaced") == deaths)  # noqa: B023
            wait_for(lambda: (supervisor.facts()["storer"] or {}).get("state") == "running")
            assert restarts(supervisor) == [0, deaths, deaths]
        with supervisor.tables() as (_, state, _):
            assert int(state.slots[SUPERVISOR_SLOT, column(Role.SUPERVISOR, "child_deaths")]) == 4


def test_the_kernel_would_kill_workers_first_and_the_supervisor_last(tmp_path: Path) -> None:
    """For want of memory: a worker's place is taken over at once."""
    with RunningSupervisor(tmp_path) as supervisor:
        pids = [supervisor.process.pid, supervisor.facts()["storer"]["pid"], supervisor.workers()[0]["pid"]]
        own, storer, worker = (int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in pids)
        assert own < storer < worker or own == 1000


# -- stop


def test_a_stop_reads_what_the_kernel_holds(tmp_path: Path) -> None:
    """Paused, so that the bytes are in the kernel when the stop begins."""
    body = packets(3_000)
    with RunningSupervisor(tmp_path) as supervisor, supervisor.connect() as client:
        wait_for(lambda: supervisor.word(Con.STATE) == [2])
        supervisor.ask("pause", target="all")
        client.sendall(body)
        assert supervisor.stop() == 0
        assert list(supervisor.stored().values()) == [body]
        last = supervisor.log().splitlines()[-1]
        assert "stopped" in last
        assert f"received_bytes={len(body)} durable_bytes={len(body)}" in last
        assert 'verdict="nothing was lost"' in last
        assert not (tmp_path / "control.sock").exists()


def test_connections_that_were_not_accepted_yet_are_read_too(tmp_path: Path) -> None:
    body = packets(100)
    with RunningSupervisor(tmp_path) as supervisor:
        supervisor.signal(signal.SIGSTOP)
        with supervisor.connect() as client:
            client.sendall(body)
            supervisor.signal(signal.SIGTERM)
            supervisor.signal(signal.SIGCONT)
            assert supervisor.process.wait(15) == 0
        assert list(supervisor.stored().values()) == [body]


def test_what_is_at_risk_at_the_deadline_is_named_and_the_exit_code_says_so(tmp_path: Path) -> None:
    body = packets(500)
    with RunningSupervisor(tmp_path, fault="never done", stop_timeout_s=1.5) as supervisor:
        with supervisor.connect() as client:
            client.sendall(body)
            wait_for(lambda: supervisor.taken() == [len(body)])
            began_s = time.monotonic()
            assert supervisor.stop() == 1
            assert time.monotonic() - began_s < 5
        assert f"at_risk_bytes={len(body)}" in supervisor.log().splitlines()[-1]


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with (
        RunningSupervisor(tmp_path, fault="never done", stop_timeout_s=60) as supervisor,
        supervisor.connect() as client,
    ):
        client.sendall(packets(10))
        wait_for(lambda: supervisor.taken() == [160])
        supervisor.signal(signal.SIGTERM)
        wait_for(lambda: supervisor.log_contains("stopping why=SIGTERM"))
        supervisor.signal(signal.SIGTERM)
        assert supervisor.process.wait(5) == 1
        assert supervisor.log_contains("stopping by force")


def test_a_worker_that_dies_during_the_stop_is_replaced_for_its_last_work(tmp_path: Path) -> None:
    body = packets(4_000)
    with RunningSupervisor(tmp_path, workers=1) as supervisor, supervisor.connect() as client:
        wait_for(lambda: supervisor.word(Con.STATE) == [2])
        (worker,) = supervisor.workers()
        os.kill(worker["pid"], signal.SIGSTOP)
        client.sendall(body)
        supervisor.signal(signal.SIGTERM)
        wait_for(lambda: supervisor.log_contains("stopping why=SIGTERM"))
        os.kill(worker["pid"], signal.SIGKILL)
        assert supervisor.process.wait(15) == 0, supervisor.log()
        assert list(supervisor.stored().values()) == [body]


def test_a_client_is_told_by_a_regular_end(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path) as supervisor, supervisor.connect() as client:
        client.sendall(packets(10))
        wait_for(lambda: supervisor.taken() == [160])
        assert supervisor.stop() == 0
        assert client.recv(1) == b""
