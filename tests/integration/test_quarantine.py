"""Workers that die on one stream; the death is made by hand, where a fault of the program would be."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpserverd.arena.state import FIRST_WORKER_SLOT, CloseReason, Con, ConnectionState, RefuseReason, Slot, StateTable
from mpserverd.control.client import DaemonRefusedError
from tests.integration.driver import BIN, DEADLINE_S, SLOWNESS
from tests.integration.oracle import stored_streams
from tests.integration.supervisor_driver import RunningSupervisor, packets, wait_for
from tests.integration.test_mps_lines import Peer
from tests.integration.test_supervisor_clients import CLIENT, closed_at_once, refused


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[RunningSupervisor]:
    more = CLIENT.replace("127.0.0.0/8", "127.0.0.7")
    with RunningSupervisor(tmp_path, workers=1, more=more) as running:
        yield running


def writable_state(pid: int) -> StateTable:
    for name in os.listdir(f"/proc/{pid}/fd"):
        if "mpserverd-state" in os.readlink(f"/proc/{pid}/fd/{name}"):
            return StateTable(os.open(f"/proc/{pid}/fd/{name}", os.O_RDWR | os.O_CLOEXEC))
    raise AssertionError(f"process {pid} has no state table")


def die_of(
    supervisor: RunningSupervisor,
    row: int,
    number: signal.Signals = signal.SIGSEGV,
    state_wanted: ConnectionState = ConnectionState.ASSIGNED,
) -> None:
    """The worker dies of ``number`` with connection ``row`` in hand, and its successor takes up what it had."""
    (worker,) = wait_for(supervisor.workers)
    pid = int(worker["pid"])
    wait_for(lambda: supervisor.word(Con.STATE) == [state_wanted])
    time.sleep(0.1)  # it takes its connections up before it dies
    state = writable_state(pid)
    os.kill(pid, signal.SIGSTOP)
    state.words[state.slot_base(FIRST_WORKER_SLOT) + Slot.IN_HAND] = row + 1
    os.kill(pid, number)
    with contextlib.suppress(ProcessLookupError):  # dead of SIGKILL, and reaped
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: [w["pid"] for w in supervisor.workers() if w["pid"] != pid])
    os.close(state.fd)


def row_of(supervisor: RunningSupervisor) -> int:
    with supervisor.tables() as (_, state, _):
        (row,) = (state.connections[:, Con.STATE] != 0).nonzero()[0].tolist()
    return int(row)


def reasons(supervisor: RunningSupervisor, reason: CloseReason) -> int:
    with supervisor.tables() as (_, state, _):
        return int(state.slots[FIRST_WORKER_SLOT:, Slot.REASONS + reason].sum())


def connect_from(supervisor: RunningSupervisor, address: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", supervisor.port), source_address=(address, 0))


@pytest.mark.parametrize("address", ["127.0.0.7", "127.0.0.9"])
def test_three_deaths_on_one_stream_quarantine_it_and_its_client(supervisor: RunningSupervisor, address: str) -> None:
    """What it had sent is stored; it is refused until it is released, and others are served."""
    with connect_from(supervisor, address) as client:
        client.sendall(packets(50))
        wait_for(lambda: supervisor.taken() == [800])
        row = row_of(supervisor)
        for _ in range(3):
            die_of(supervisor, row) if supervisor.word(Con.STATE) else None
        assert client.recv(1) == b""
    wait_for(lambda: list(supervisor.stored().values()) == [packets(50)])
    assert reasons(supervisor, CloseReason.QUARANTINED) == 1
    (entry,) = supervisor.ask("quarantine")
    assert entry["client"] == ("pump" if address == "127.0.0.7" else address)
    with connect_from(supervisor, address) as again:
        assert closed_at_once(again)
    assert refused(supervisor, RefuseReason.QUARANTINED) == 1
    with connect_from(supervisor, "127.0.0.8") as other:
        other.sendall(packets(2))
        wait_for(lambda: supervisor.taken() == [32])
    assert supervisor.ask("release", target=entry["client"]) == {"released": [entry["client"]]}
    with connect_from(supervisor, address) as back:
        back.sendall(packets(2))
        wait_for(supervisor.taken)
    with pytest.raises(DaemonRefusedError, match="nobody"):
        supervisor.ask("release", target="nobody-else")


def ctl(supervisor: RunningSupervisor, *arguments: str) -> str:
    """What the real program prints."""
    command = [BIN / "mpserverctl", "--socket", f"{supervisor.directory}/control.sock", *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S * SLOWNESS, check=False)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_three_deaths_on_one_mps_stream_tell_its_client_which_comes_back_once_it_is_released(tmp_path: Path) -> None:
    """With the real storer: what was acknowledged before is there, and the stream goes on behind it."""
    hello, content = b"MPS/1 press-7 16\n", packets(80)
    with RunningSupervisor(tmp_path, workers=1, listener='protocol = "mps"', real_storer=True) as supervisor:
        peer = Peer(supervisor.port, hello)
        index, epoch = peer.ok()
        assert index == 0
        peer.send(content[:800])
        peer.wait_for_ack(50)
        row = row_of(supervisor)
        for _ in range(3):
            die_of(supervisor, row)
        line = peer.line()
        while line in (b"\n", b"ACK 50\n"):  # each successor begins anew
            line = peer.line()
        assert (line, peer.line()) == (b"BYE quarantined\n", b"")
        peer.sock.close()
        assert reasons(supervisor, CloseReason.QUARANTINED) == 1
        assert ctl(supervisor, "quarantine", "list").startswith("press-7  stream press-7, since ")
        assert Peer(supervisor.port, hello).err()[0] == "quarantined"
        assert Peer(supervisor.port, hello, source="127.0.0.8").err()[0] == "quarantined", "it is the client, not where"
        other = Peer(supervisor.port, b"MPS/1 press-8 16\n")
        assert other.ok()[0] == 0
        other.finish()
        assert ctl(supervisor, "quarantine", "release", "press-7") == "released press-7\n"
        assert ctl(supervisor, "quarantine", "list") == "nobody is in quarantine\n"
        back = Peer(supervisor.port, hello)
        assert back.ok() == (50, epoch)
        back.send(content[800:])
        back.finish(80)
        wait_for(lambda: supervisor.word(Con.STATE) == [])
        assert supervisor.stop() == 0
    assert {stream.name: stream.content for stream in stored_streams(supervisor.spool)}["press-7"] == content


def test_a_worker_that_somebody_kills_leaves_no_suspicion(supervisor: RunningSupervisor) -> None:
    with supervisor.connect() as client:
        client.sendall(packets(50))
        wait_for(lambda: supervisor.taken() == [800])
        row = row_of(supervisor)
        for _ in range(4):
            die_of(supervisor, row, signal.SIGKILL)
        client.sendall(packets(50))
        wait_for(lambda: supervisor.taken() == [1600])
    assert supervisor.ask("quarantine") == []


def test_a_stream_that_gets_on_between_deaths_is_innocent(supervisor: RunningSupervisor) -> None:
    with supervisor.connect() as client:
        client.sendall(packets(50))
        wait_for(lambda: supervisor.taken() == [800])
        row = row_of(supervisor)
        for turn in range(4):
            die_of(supervisor, row)
            client.sendall(packets(50))
            wait_for(lambda: supervisor.taken()[0] % 1600 == 800 * (turn % 2))  # noqa: B023
    assert supervisor.ask("quarantine") == []


def test_three_deaths_on_a_hello_refuse_the_hellos_of_its_address(tmp_path: Path) -> None:
    def answer(client: socket.socket) -> bytes:
        with client.makefile("rb") as lines:
            return lines.readline()

    with RunningSupervisor(tmp_path, workers=1, listener='protocol = "mps"') as supervisor:
        with supervisor.connect() as client:
            client.sendall(b"MPS/1 half-a-hel")
            wait_for(lambda: supervisor.word(Con.STATE) == [ConnectionState.HELLO])
            row = row_of(supervisor)
            for _ in range(3):
                die_of(supervisor, row, state_wanted=ConnectionState.HELLO)
            assert answer(client).startswith(b"ERR quarantined ")
        assert [entry["client"] for entry in supervisor.ask("quarantine")] == ["hello@127.0.0.1"]
        with supervisor.connect() as again:
            assert answer(again).startswith(b"ERR quarantined "), "before it has said a word"
        with connect_from(supervisor, "127.0.0.8") as other:
            other.sendall(b"MPS/1 another 16\n")
            assert answer(other).startswith(b"OK 0 ")
        supervisor.ask("release", target="hello@127.0.0.1")
        with supervisor.connect() as back:
            back.sendall(b"MPS/1 half-a-hello 16\n")
            assert answer(back).startswith(b"OK 0 ")
