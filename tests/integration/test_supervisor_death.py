"""The supervisor dies, or leaves, while plain programs send; a stand-in for systemd keeps what it stored.

What was sent is compared with what is stored by its hash; the senders (socat, the C program) know nothing of us.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import pathlib
import random
import resource
import signal
import socket
import struct
import time
from collections.abc import Sequence

import pytest

from mpserverd.arena.live import open_state
from mpserverd.arena.report import ledger
from mpserverd.arena.state import (
    FIRST_WORKER_SLOT,
    CloseReason,
    Con,
    ConnectionState,
    Slot,
    Str,
    StreamState,
)
from mpserverd.control.client import DaemonRefusedError
from mpserverd.load.stand_in_spawn import session_pids
from mpserverd.net.fdlimit import DESCRIPTORS_PER_CLIENT, RESERVED_DESCRIPTORS
from mpserverd.supervisor.carrier import SINGLES_MAX
from tests.integration import senders
from tests.integration.oracle import sha256, stored_streams
from tests.integration.supervisor_driver import RunningSupervisor, wait_for
from tests.integration.unit_driver import SEED, Unit

CLIENTS = 5000
UNPRIVILEGED = ("setpriv", "--bounding-set=-sys_admin,-sys_resource", "--")
"""Root with these is not held to RLIMIT_NOFILE by the kernel for what is in flight; the unit's user is."""
EXCHANGE_KILLS = int(os.environ.get("MPSERVERD_TEST_EXCHANGE_KILLS", "4"))


def hashes(contents: Sequence[bytes]) -> list[str]:
    return sorted(sha256(content[: len(content) // 16 * 16]) for content in contents)


@pytest.mark.parametrize("how", ["kill", "leave", "restart"])
def test_a_client_streams_on_when_the_supervisor_is_gone_for_a_moment(tmp_path: pathlib.Path, how: str) -> None:
    content = senders.payload(SEED, 4_000_000)
    with Unit(tmp_path) as unit:
        port = unit.port
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(content[:1_000_001])
            wait_for(lambda: unit.active() == 1)
            getattr(unit, how)()
            client.sendall(content[1_000_001:])
        wait_for(lambda: unit.durable() == len(content))
        assert unit.port == port
        assert unit.stored() == hashes([content])
        assert unit.system.stop() == 0
        assert unit.system.stored_names() == []


def test_twenty_kills_at_random_moments_lose_no_byte_of_any_sender(tmp_path: pathlib.Path) -> None:
    """socat sends files while the supervisor is killed; others come and go."""
    senders.needs("socat")
    chance = random.Random(SEED)
    contents = [senders.payload(SEED + number, 3_000_000 + 16 * number + number) for number in range(6)]
    with Unit(tmp_path, workers=2) as unit:
        with contextlib.ExitStack() as stack:
            running = [stack.enter_context(senders.socat_from_pipe(unit.port)) for _ in contents]
            pieces = [[content[at : at + 150_000] for at in range(0, len(content), 150_000)] for content in contents]
            kills = 0
            for turn in range(max(map(len, pieces))):
                for process, parts in zip(running, pieces, strict=True):
                    if turn < len(parts) and process.stdin is not None:
                        process.stdin.write(parts[turn])
                        process.stdin.flush()
                if kills < 20:
                    time.sleep(chance.uniform(0, 0.05))  # any moment of the start and of the service will do
                    start = unit.system.kill()
                    if chance.random() < 0.7:
                        unit.system.wait_ready(start=start)
                    kills += 1
            for process in running:
                assert process.stdin is not None
                process.stdin.close()
                assert process.wait(30) == 0, "the sender noticed"
        unit.system.wait_ready(start=unit.system.state.starts)
        wait_for(lambda: unit.durable() == sum(len(content) // 16 * 16 for content in contents), 30)
        assert unit.stored() == hashes(contents)
        assert unit.system.stop() == 0


def test_a_client_that_leaves_while_nobody_is_there_loses_nothing(tmp_path: pathlib.Path) -> None:
    """Its last bytes and its FIN wait in the kernel, also a packet that was cut."""
    content = senders.payload(SEED, 300_007)
    with Unit(tmp_path) as unit:
        with socket.create_connection(("127.0.0.1", unit.port)) as client:
            client.sendall(content[:100_000])
            wait_for(lambda: unit.active() == 1)
            start = unit.system.kill()
            client.sendall(content[100_000:])
        with socket.create_connection(("127.0.0.1", unit.port)) as newcomer:  # the backlog outlives it too
            newcomer.sendall(content[:160])
        unit.system.wait_ready(start=start)
        wait_for(lambda: unit.durable() == 300_000 + 160)
        wait_for(lambda: unit.active() == 0)
        assert unit.stored() == hashes([content, content[:160]])


@pytest.mark.parametrize("who", ["worker", "supervisor"])
def test_a_client_whose_worker_died_just_before_it_hung_up_is_told_at_once(tmp_path: pathlib.Path, who: str) -> None:
    """The row says ENDED; who is left closes the connection, although a carrier holds another descriptor of it."""
    with Unit(tmp_path, workers=1) as unit, socket.create_connection(("127.0.0.1", unit.port), timeout=15) as client:
        client.sendall(bytes(16))
        wait_for(lambda: unit.durable() == 16)
        state = unit.own_state()
        (row,) = (state.connections[:, Con.STATE] != 0).nonzero()[0].tolist()
        worker_pid = int(state.slots[FIRST_WORKER_SLOT, Slot.PID])
        os.kill(unit.system.state.pid if who == "supervisor" else worker_pid, signal.SIGSTOP)
        state.connections[row, Con.REASON] = CloseReason.KICKED
        state.words[state.connection_base(row) + Con.STATE] = ConnectionState.ENDED
        unit.kill() if who == "supervisor" else os.kill(worker_pid, signal.SIGKILL)
        assert client.recv(1) == b""
        wait_for(lambda: unit.active() == 0)
        os.close(state.fd)


def test_supervisors_killed_inside_the_exchange_of_carriers_lose_nobody(tmp_path: pathlib.Path) -> None:
    """systemd takes nothing for a while, so the exchange lasts; newcomers come and others go, and then kill -9.

    Those who stay come first: the kernel hands connections over in their order, so when one that came later has ended
    they have been carried.
    """
    chance = random.Random(SEED)
    contents: list[bytes] = []
    with (
        Unit(tmp_path, max_clients=2 * SINGLES_MAX + 100, buffers="64 MiB") as unit,
        contextlib.ExitStack() as stack,
    ):
        clients: list[socket.socket] = []

        def come_and_stay() -> None:
            client = stack.enter_context(socket.create_connection(("127.0.0.1", unit.port)))
            contents.append(senders.payload(SEED + len(contents), 1600))
            client.sendall(contents[-1][:800])
            clients.append(client)

        for _ in range(EXCHANGE_KILLS):
            come_and_stay()
            wait_for(lambda: unit.active() == len(clients), 30)  # whoever queued before is over
            with unit.system._changed:
                ended = unit.log().count("connection ended") + SINGLES_MAX // 2
                for number in range(2 * SINGLES_MAX):
                    if number < SINGLES_MAX // 2 and number % 5 == 0:
                        come_and_stay()
                    else:
                        socket.create_connection(("127.0.0.1", unit.port)).close()
                ended += chance.randrange(SINGLES_MAX)
                wait_for(lambda ended=ended: unit.log().count("connection ended") >= ended, 30)
                start = unit.system.kill()
            unit.system.wait_ready(start=start)
        for client, content in zip(clients, contents, strict=True):
            client.sendall(content[800:])
            client.shutdown(socket.SHUT_WR)
        wait_for(lambda: unit.durable() >= sum(map(len, contents)), 60)
        assert unit.stored() == hashes(contents)


def test_many_live_connections_are_kept_through_a_kill_and_a_restart(tmp_path: pathlib.Path) -> None:
    """Every one of them still reaches its own stream afterwards, with no more open files than are asked for."""
    count = CLIENTS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = DESCRIPTORS_PER_CLIENT * (count + 10) + RESERVED_DESCRIPTORS
    if hard < needed:
        pytest.skip(f"needs {needed} open files, the hard limit is {hard}")
    senders.needs("setpriv", "prlimit")
    prefix = ("prlimit", f"--nofile={needed}:{needed}", "--", *(UNPRIVILEGED if os.geteuid() == 0 else ()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with (
            Unit(tmp_path, prefix=prefix, max_clients=count + 10, buffers=f"{count // 8 + 32} MiB") as unit,
            contextlib.ExitStack() as stack,
        ):
            port = unit.port
            clients = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(count)]
            for number, client in enumerate(clients):
                client.sendall(number.to_bytes(16, "little"))
            wait_for(lambda: unit.active() == count, 60)
            began_s = time.monotonic()
            unit.kill()
            kill_s = time.monotonic() - began_s
            for number, client in enumerate(clients):
                client.sendall((number << 64).to_bytes(16, "little"))
            began_s = time.monotonic()
            unit.leave()
            leave_s = time.monotonic() - began_s
            for client in clients:
                client.sendall(b"\xff" * 16)
                client.shutdown(socket.SHUT_WR)
            wait_for(lambda: unit.durable() == 48 * count, 120)
            wanted = sorted(
                hashlib.sha256(n.to_bytes(16, "little") + (n << 64).to_bytes(16, "little") + b"\xff" * 16).hexdigest()
                for n in range(count)
            )
            assert unit.stored() == wanted
            assert "without a carrier" not in unit.log()
            print(f"{count} connections: kill {kill_s * 1000:.0f} ms, leave {leave_s * 1000:.0f} ms")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_counters_and_ledger_go_on(tmp_path: pathlib.Path) -> None:
    content = senders.payload(SEED, 160_000)
    with Unit(tmp_path) as unit:
        for _ in range(2):
            with socket.create_connection(("127.0.0.1", unit.port)) as client:
                client.sendall(content)
        wait_for(lambda: unit.durable() == 320_000)
        unit.kill()
        wait_for(lambda: ledger(open_state(f"{tmp_path}/control.sock"), every_stream=False)["holds"])
        totals = ledger(open_state(f"{tmp_path}/control.sock"), every_stream=False)["totals"]
        assert totals["received_bytes"] == totals["durable_bytes"] == 320_000


def test_five_crashes_within_a_minute_lead_to_a_clean_start(tmp_path: pathlib.Path) -> None:
    with Unit(tmp_path, crashes_count=True) as unit:
        with socket.create_connection(("127.0.0.1", unit.port)) as client:
            client.sendall(bytes(160))
            wait_for(lambda: unit.durable() == 160)
            for _ in range(4):
                unit.kill()
            assert unit.active() == 1
            unit.kill()
            assert "stored sockets and state discarded" in unit.log()
            assert "crashed 5 times" in unit.log()
            client.settimeout(10)
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1) == b""
        with socket.create_connection(("127.0.0.1", unit.port)) as client:
            client.sendall(bytes(320))
            wait_for(lambda: unit.active() == 1)
        wait_for(lambda: unit.durable() == 480)


def test_leaving_on_purpose_is_no_crash(tmp_path: pathlib.Path) -> None:
    with Unit(tmp_path, crashes_count=True) as unit, socket.create_connection(("127.0.0.1", unit.port)) as client:
        client.sendall(bytes(160))
        wait_for(lambda: unit.active() == 1)
        for _ in range(7):
            unit.leave()
        assert unit.active() == 1
        assert "discarded" not in unit.log()


def test_settings_of_a_listener_that_is_gone_still_hold_for_its_connections(tmp_path: pathlib.Path) -> None:
    """The restart reads a file in which the listener has another packet size."""
    with Unit(tmp_path) as unit, socket.create_connection(("127.0.0.1", unit.port)) as client:
        client.sendall(bytes(range(160)))
        wait_for(lambda: unit.active() == 1)
        text = (tmp_path / "mpserverd.toml").read_text()
        (tmp_path / "mpserverd.toml").write_text(text.replace("packet_size = 16", "packet_size = 32"))
        unit.leave()
        client.sendall(bytes(range(160)))
        client.shutdown(socket.SHUT_WR)
        with socket.create_connection(("127.0.0.1", unit.port)) as other:
            other.sendall(bytes(64))
        wait_for(lambda: unit.durable() == 384)
        assert [stream.packet_size for stream in stored_streams(unit.spool)] == [16, 32]


def test_a_state_of_another_layout_is_dropped_and_said(tmp_path: pathlib.Path) -> None:
    with Unit(tmp_path) as unit:
        with socket.create_connection(("127.0.0.1", unit.port)) as client:
            client.sendall(bytes(160))
            wait_for(lambda: unit.durable() == 160)
            pid = unit.system.state.pid
            for name in os.listdir(f"/proc/{pid}/fd"):
                if "mpserverd-state" in os.readlink(f"/proc/{pid}/fd/{name}"):
                    with open(f"/proc/{pid}/fd/{name}", "r+b", buffering=0) as state:
                        os.pwrite(state.fileno(), (99).to_bytes(8, "little"), 8)
                    break
            unit.kill()
            assert "layout 99" in unit.log()
            assert unit.active() == 0
        with socket.create_connection(("127.0.0.1", unit.port)) as client:
            client.sendall(bytes(320))
        wait_for(lambda: unit.durable() == 480)


def test_nothing_can_be_left_where_nobody_keeps_it(tmp_path: pathlib.Path) -> None:
    with RunningSupervisor(tmp_path) as supervisor:
        with pytest.raises(DaemonRefusedError, match="no descriptor store"):
            supervisor.ask("leave")
        assert supervisor.facts()["pid"] > 0


def test_a_row_whose_socket_is_lost_keeps_its_whole_packets(tmp_path: pathlib.Path) -> None:
    """The carrier did not come back: the client is gone, what it had sent is on disk."""
    content = senders.payload(SEED, 100_004)
    with Unit(tmp_path) as unit:
        with socket.create_connection(("127.0.0.1", unit.port)) as client:
            client.sendall(content)
            wait_for(lambda: unit.active() == 1)
            with unit.tables() as state:
                wait_for(
                    lambda: (
                        int(state.streams[state.streams[:, Str.STATE] == StreamState.OPEN, Str.POSITION][0]) == 100_004
                    )
                )
            for name in [name for name in unit.system.stored_names() if name.startswith("carrier-")]:
                with unit.system._changed:
                    unit.system._store.remove(name)
            unit.kill()
            wait_for(lambda: unit.active() == 0)
        wait_for(lambda: unit.durable() == 100_000)
        assert unit.stored() == hashes([content])
        assert f"reason={CloseReason.FAILED.word}" in unit.log()


def test_a_connection_that_is_carried_and_has_no_row_is_a_fresh_one(tmp_path: pathlib.Path) -> None:
    """As if the supervisor had died between the two; a connection that is over is not taken for one."""
    with Unit(tmp_path) as unit, socket.create_connection(("127.0.0.1", unit.port)) as client:
        with socket.create_connection(("127.0.0.1", unit.port)) as over:
            over.sendall(bytes(160))
            wait_for(lambda: unit.active() == 2)
        wait_for(lambda: unit.active() == 1)
        state = unit.own_state()
        os.kill(unit.system.state.pid, signal.SIGSTOP)
        row = int((state.connections[:, Con.STATE] != 0).nonzero()[0][0])
        state.words[state.connection_base(row) + Con.STATE] = 0
        os.close(state.fd)
        unit.kill()
        assert "count=0 lost=0 unknown=1" in unit.log()
        client.sendall(bytes(range(16)))
        client.shutdown(socket.SHUT_WR)
        wait_for(lambda: unit.durable() == 160 + 16)


def test_a_client_that_was_carried_without_a_row_and_reset_it_keeps_what_it_sent(tmp_path: pathlib.Path) -> None:
    """As if the supervisor had died right after the accept; what the client had sent can still be read."""
    content = senders.payload(SEED, 1600)
    with Unit(tmp_path) as unit:
        client = socket.create_connection(("127.0.0.1", unit.port))
        wait_for(lambda: unit.active() == 1)
        state = unit.own_state()
        for pid in session_pids(unit.system.state.pid):
            os.kill(pid, signal.SIGSTOP)
        client.sendall(content)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        row = int((state.connections[:, Con.STATE] != 0).nonzero()[0][0])
        state.words[state.connection_base(row) + Con.STATE] = 0
        os.close(state.fd)
        unit.kill()
        assert "count=0 lost=0 unknown=1" in unit.log()
        wait_for(lambda: unit.durable() == len(content))
        wait_for(lambda: unit.active() == 0)
        assert unit.stored() == hashes([content])


def test_a_storer_that_hangs_keeps_no_client_waiting(tmp_path: pathlib.Path) -> None:
    """Its lock on the spool is held here, as by a process that the kernel does not let die."""
    content = senders.payload(SEED, 400_000)
    with Unit(tmp_path) as unit, socket.create_connection(("127.0.0.1", unit.port)) as client:
        client.sendall(content[:100_000])
        wait_for(lambda: unit.durable() == 100_000)
        held = _copy_of_spool_lock(unit)
        unit.kill()
        client.sendall(content[100_000:])
        client.shutdown(socket.SHUT_WR)
        with unit.tables() as state:
            wait_for(lambda: int(state.streams[:, Str.POSITION].max()) == 400_000)
        assert unit.durable() == 100_000
        wait_for(lambda: "spool is locked" in unit.log())
        os.close(held)
        wait_for(lambda: unit.durable() == 400_000)
        assert unit.stored() == hashes([content])


def _copy_of_spool_lock(unit: Unit) -> int:
    """A dup of the supervisor's own descriptor (pidfd_getfd), which shares the lock."""
    pid = unit.system.state.pid
    numbers = [int(name) for name in os.listdir(f"/proc/{pid}/fd") if _leads_to(f"/proc/{pid}/fd/{name}", unit.spool)]
    pidfd = os.pidfd_open(pid)
    try:
        copy = ctypes.CDLL(None, use_errno=True).syscall(438, pidfd, numbers[0], 0)
    finally:
        os.close(pidfd)
    assert copy >= 0, os.strerror(ctypes.get_errno())
    return int(copy)


def _leads_to(path: str, target: pathlib.Path) -> bool:
    try:
        return os.readlink(path) == str(target)
    except OSError:
        return False
