"""A disk that fails writes: the other streams go on, nothing acknowledged is lost, and it recovers by itself.

The daemon is the real one on a real file system; chosen system calls of it fail on command (failing_disk.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import pathlib
import socket
import sqlite3
from collections.abc import Iterator

import pytest

from tests.integration import senders
from tests.integration.driver import Daemon, connect
from tests.integration.failing_disk import CHANGES, Call, FailingDisk
from tests.integration.oracle import stored_streams

PIECE_BYTES = 240_000
NAMES = ("odd", *(f"calm-{number}" for number in range(5)))
"""Six streams: so many are synced by one syncfs."""
CLIENTS = {"client": [{"id": name, "address": f"127.0.1.{number}"} for number, name in enumerate(NAMES, 1)]}
SETTINGS = {"listener": {"on_full": "block"}, **CLIENTS}


class Crowd:
    """Raw clients that stay connected; ``sent`` is what each has given."""

    def __init__(self, daemon: Daemon, names: tuple[str, ...] = NAMES) -> None:
        self.daemon = daemon
        self.names = names
        port = daemon.port()
        self._sockets: dict[str, socket.socket] = {
            name: connect(port, source=f"127.0.1.{NAMES.index(name) + 1}") for name in names
        }
        self.sent = dict.fromkeys(names, b"")

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for client in self._sockets.values():
            client.close()

    def send(self) -> None:
        """Another piece from each, taken into memory by the daemon."""
        for number, (name, client) in enumerate(self._sockets.items()):
            piece = senders.payload(1000 * number + len(self.sent[name]), PIECE_BYTES)
            client.sendall(piece)
            self.sent[name] += piece

    def durable(self) -> dict[str, int]:
        """What the catalog says of each, without asking the daemon."""
        with contextlib.closing(
            sqlite3.connect(f"file:{self.daemon.spool}/catalog.sqlite?mode=ro", uri=True)
        ) as catalog:
            return dict(catalog.execute("SELECT name, durable FROM stream"))

    def promised(self) -> dict[str, int]:
        """What the daemon says of each: this is what it acknowledges."""
        return {stream["name"]: int(stream["durable_bytes"]) for stream in self.daemon.streams()}

    def wait_until_durable(self, *names: str) -> None:
        wanted = {name: len(self.sent[name]) for name in names or self.names}
        self.daemon.wait_for(
            lambda: {name: self.durable().get(name, 0) for name in wanted} == wanted,
            what=f"{', '.join(wanted)} to be durable",
        )

    def assert_stored(self) -> None:
        """Everything of everybody is on disk, byte for byte, in the one epoch that each began with."""
        assert {stream.name: stream.content for stream in stored_streams(self.daemon.spool)} == self.sent

    def assert_durable_is_stored(self) -> None:
        """What the catalog says is durable is in the files, whatever happened to the rest."""
        streams = stored_streams(self.daemon.spool)
        assert {stream.name for stream in streams} == set(self.names)
        for stream in streams:
            assert stream.content == self.sent[stream.name][: stream.durable], stream.name


@contextlib.contextmanager
def failing(tmp_path: pathlib.Path, **settings: object) -> Iterator[tuple[FailingDisk, Daemon]]:
    with FailingDisk(tmp_path) as disk, Daemon(tmp_path, SETTINGS | settings, prefix=disk.prefix) as daemon:
        yield disk, daemon


@dataclasses.dataclass(frozen=True)
class Fault:
    """``paths`` are pieces of paths; ``spares`` says that streams other than ``odd`` go on while it lasts."""

    name: str
    calls: Call
    error: int
    paths: tuple[str, ...]
    spares: bool


FAULTS = (
    Fault("writes of one file", Call.WRITE, errno.EIO, ("/streams/odd/",), spares=True),
    Fault("short writes of one file", Call.SHORT, 0, ("/streams/odd/",), spares=True),
    Fault("writes of all files", Call.WRITE, errno.EIO, ("/streams/",), spares=False),
    Fault("short writes of all files", Call.SHORT, 0, ("/streams/",), spares=False),
    Fault("syncs of all files", Call.SYNC | Call.SYNCFS, errno.EIO, ("/streams",), spares=False),
    Fault("writes of the catalog", Call.WRITE, errno.EIO, ("/catalog.sqlite",), spares=False),
    Fault("syncs of the catalog", Call.SYNC, errno.EIO, ("/catalog.sqlite",), spares=False),
    Fault("everything", CHANGES | Call.SYNC | Call.SYNCFS, errno.EIO, ("/spool/",), spares=False),
    Fault("every change", CHANGES, errno.EROFS, ("/spool/",), spares=False),
)


@pytest.mark.parametrize("faults", [FAULTS[:3], FAULTS[3:6], FAULTS[6:]], ids=["files", "catalog", "everything"])
def test_nothing_is_lost_while_the_disk_refuses(tmp_path: pathlib.Path, faults: tuple[Fault, ...]) -> None:
    """What cannot be stored is not acknowledged and waits; when the disk works again everything is stored."""
    with failing(tmp_path) as (disk, daemon), Crowd(daemon) as crowd:
        crowd.send()
        crowd.wait_until_durable()
        storer = daemon.pid_of("storer")
        for fault in faults:
            _fail_and_heal(crowd, disk, fault)
        assert daemon.pid_of("storer") == storer, "the storer died over it"
        crowd.close()
        daemon.wait_until_quiet()
        crowd.assert_stored()
        assert daemon.ledger()["durable_bytes"] == sum(map(len, crowd.sent.values()))
        daemon.stop()


def _fail_and_heal(crowd: Crowd, disk: FailingDisk, fault: Fault) -> None:
    before = crowd.durable()
    rules = [disk.fail(fault.calls, path, fault.error) for path in fault.paths]
    crowd.send()
    crowd.daemon.wait_for(lambda: all(disk.refused(rule) >= 3 for rule in rules), what=f"refusals: {fault.name}")
    if fault.spares:
        crowd.wait_until_durable(*NAMES[1:])
    promised = crowd.promised()
    for name in ("odd",) if fault.spares else NAMES:
        assert promised[name] == before[name], f"acknowledged in spite of {fault.name}"
    disk.heal()
    crowd.send()
    crowd.wait_until_durable()
