"""A start after another supervisor comes to an end: with memory that nobody understands, or a storer that fails."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket
import sqlite3
from typing import Any

import pytest

from mpserverd.arena.layouts import HEAD, STREAMS, description
from mpserverd.arena.shared import VERSION_WORD, WORD_BYTES
from mpserverd.arena.state import Str, StreamState
from mpserverd.load.stand_in_spawn import session_pids
from mpserverd.supervisor.remembered import Remembered
from tests.integration.oracle import sha256
from tests.integration.senders import payload
from tests.integration.supervisor_driver import wait_for
from tests.integration.unit_driver import SEED, Unit

OTHER_VERSION = 99
FAR = 1 << 40


def column_beyond_the_row(table: str, column: str) -> dict[str, Any]:
    described = description()
    described["state"]["version"] = OTHER_VERSION
    described["state"]["rows"][table]["columns"][column] = FAR
    return described


@contextlib.contextmanager
def memfd_of(pid: int, name: str) -> Any:
    for number in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{number}"
        if f"memfd:mpserverd-{name}" in os.readlink(path):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                yield fd
            finally:
                os.close(fd)
            return
    raise AssertionError(f"pid {pid} has no {name}")


def claim_another_layout(unit: Unit, described: Any) -> None:
    pid = unit.system.state.pid
    os.kill(pid, signal.SIGSTOP)
    with memfd_of(pid, "facts") as fd:
        facts = Remembered(fd)
        facts.write({**facts.read(), "memory": described})
    with memfd_of(pid, "state") as fd:
        os.pwrite(fd, OTHER_VERSION.to_bytes(8, "little"), VERSION_WORD * WORD_BYTES)


@pytest.mark.parametrize(
    "described",
    [
        {"state": {"version": OTHER_VERSION}},
        "nonsense",
        column_beyond_the_row(HEAD, "LEFT"),
        column_beyond_the_row(STREAMS, "POSITION"),
    ],
    ids=["hardly anything", "no object", "beyond the header", "beyond a row"],
)
def test_memory_of_a_shape_that_nobody_knows_is_dropped_and_said(tmp_path: pathlib.Path, described: Any) -> None:
    """At once. An error there comes before the crash is counted, and would come at every start."""
    with Unit(tmp_path, crashes_count=True) as unit:
        with socket.create_connection(("127.0.0.1", unit.port)) as client:
            client.sendall(bytes(160))
            wait_for(lambda: unit.durable() == 160)
            claim_another_layout(unit, described)
            start = unit.system.kill()
            unit.system.wait_ready(start=start)
            assert unit.system.state.starts == start
            assert unit.log().count("stored sockets and state discarded") == 1
            client.settimeout(10)
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1) == b""
        with socket.create_connection(("127.0.0.1", unit.port)) as client:
            client.sendall(bytes(320))
        wait_for(lambda: unit.durable() == 480)


def put_a_strangers_catalog(unit: Unit) -> pathlib.Path:
    """Where the own one waits meanwhile. Nobody may run."""
    catalog, saved = unit.spool / "catalog.sqlite", unit.spool / "catalog.saved"
    with contextlib.closing(sqlite3.connect(catalog)) as own:  # its end folds the WAL in
        own.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    catalog.rename(saved)
    with contextlib.closing(sqlite3.connect(catalog)) as stranger:
        stranger.execute("CREATE TABLE theirs (x)")
    return saved


def test_a_storer_that_fails_after_a_takeover_keeps_no_client_waiting(tmp_path: pathlib.Path) -> None:
    content = payload(SEED, 400_000)
    with (
        Unit(tmp_path, server="restart_backoff_s_max = 0.5") as unit,
        socket.create_connection(("127.0.0.1", unit.port)) as client,
    ):
        client.sendall(content[:100_000])
        wait_for(lambda: unit.durable() == 100_000)
        with unit.system._changed:  # nobody starts it again meanwhile
            session = unit.system.state.pid
            start = unit.system.kill()
            wait_for(lambda: not session_pids(session))
            saved = put_a_strangers_catalog(unit)
        unit.system.wait_ready(start=start)
        assert unit.system.state.starts == start
        client.sendall(content[100_000:])
        with unit.tables() as state:
            wait_for(lambda: state.streams[state.streams[:, Str.STATE] == StreamState.OPEN, Str.POSITION] == [400_000])
        saved.replace(unit.spool / "catalog.sqlite")
        wait_for(lambda: unit.durable() == 400_000, 30)
        assert unit.stored() == [sha256(content)]
