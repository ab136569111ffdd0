"""Full disks and quotas under ten clients of each protocol: nothing acknowledged is lost, and it ends by itself.

Real file systems: tmpfs, and ext4 and xfs on loop devices. The oracle is what the clients sent and were told
(crowd.py, which knows nothing of the project) against the bytes of the files (oracle.py).
"""

from __future__ import annotations

import contextlib
import pathlib
import sqlite3
from collections.abc import Iterator

import pytest

from tests.integration import senders
from tests.integration.crowd import Client, Crowd, MpsClient
from tests.integration.disks import MIB, fill, free_bytes, mounted, used_bytes
from tests.integration.driver import Daemon, connect
from tests.integration.oracle import StoredStream, sent_digests, sha256, stored_streams

pytestmark = pytest.mark.root

CLIENTS = 10
"""Of each protocol."""
DISKS = pytest.mark.parametrize(("kind", "size_mib"), [("tmpfs", 80), ("ext4", 80), ("xfs", 320)])
BEGIN, END = "spool full: nothing more is stored", "spool has room again"


def settings(disk: pathlib.Path, *, on_full: str = "block", **spool: object) -> dict[str, object]:
    return {
        "listener": [
            {"name": "raw", "address": "127.0.0.1:0", "packet_size": 16, "on_full": on_full},
            {"name": "mps", "address": "127.0.0.1:0", "protocol": "mps", "packet_size": 0},
        ],
        "spool": {"path": str(disk / "spool"), "max_bytes": 0, "min_free_bytes": 0, "segment_bytes": "1 MiB", **spool},
    }


class Site:
    """A daemon on a disk of its own, and its clients."""

    def __init__(self, disk: pathlib.Path, daemon: Daemon) -> None:
        self.disk, self.daemon = disk, daemon
        ports = {listener["name"]: listener["port"] for listener in daemon.stats()["listeners"]}
        self.raw = [Client(f"raw-{number}", ("127.0.0.1", ports["raw"])) for number in range(CLIENTS)]
        self.mps = [MpsClient(f"mps-{number}", ("127.0.0.1", ports["mps"])) for number in range(CLIENTS)]
        self.crowd = Crowd([*self.raw, *self.mps])

    @property
    def given_bytes(self) -> int:
        return sum(len(client.content) for client in self.crowd.clients)

    def catalog(self, question: str) -> int:
        """One number, without asking the daemon."""
        path = f"file:{self.daemon.spool}/catalog.sqlite?mode=ro"
        with contextlib.closing(sqlite3.connect(path, uri=True)) as catalog:
            return int(catalog.execute(question).fetchone()[0] or 0)

    def durable_bytes(self) -> int:
        return self.catalog("SELECT sum(durable) FROM stream")

    def run_until_durable(self) -> None:
        self.crowd.run(lambda: self.durable_bytes() == self.given_bytes, what="everything to be durable")
        self.crowd.run_until_done()

    def run_until_full(self) -> None:
        self.crowd.run(lambda: self.daemon.log_contains(BEGIN), what="a line about the full disk")
        stats = self.daemon.stats()["spool"]
        assert stats["full"] is True
        assert stats["time_to_full_s"] == 0

    def streams(self, *, live: bool = False) -> dict[str, StoredStream]:
        return {stream.name: stream for stream in stored_streams(self.daemon.spool, live=live)}

    def assert_acknowledged_is_stored(self) -> None:
        """At any moment: what a client was told is in the files."""
        told = {client.name: client.acked_bytes for client in self.mps}
        streams = self.streams(live=True)
        for client in self.mps:
            stream = streams[client.name]
            assert stream.durable >= told[client.name]
            assert stream.content == client.content[stream.first_offset : stream.durable], client.name

    def finish(self) -> None:
        """All clients leave; everything that they sent is in files, once."""
        self.crowd.__exit__()
        self.daemon.wait_until_quiet()
        streams = self.streams()
        for client in self.mps:
            assert streams.pop(client.name).sha256 == sha256(client.content), client.name
        found = sorted(stream.sha256 for stream in streams.values())
        assert found == sorted(sent_digests([client.content for client in self.raw], 16).elements())
        assert self.daemon.ledger()["durable_bytes"] == self.given_bytes

    def assert_one_episode(self) -> None:
        self.daemon.wait_for(lambda: self.daemon.log_contains(END), what="a line about the end")
        assert len(self.daemon.log_lines(BEGIN)) == len(self.daemon.log_lines(END)) == 1, self.daemon.log()
        (begin,) = self.daemon.log_lines(BEGIN)
        assert "free_bytes=" in begin
        assert "next=" in begin
        assert self.daemon.stats()["spool"]["full"] is False


@contextlib.contextmanager
def site(
    tmp_path: pathlib.Path, kind: str, size_mib: int, *, on_full: str = "block", **spool: object
) -> Iterator[Site]:
    with (
        mounted(tmp_path, kind, size_mib) as disk,
        Daemon(tmp_path, settings(disk, on_full=on_full, **spool)) as daemon,
    ):
        found = Site(disk, daemon)
        with found.crowd:
            yield found
        daemon.stop()


@DISKS
def test_a_disk_filled_by_a_stranger_loses_nothing_and_ends_by_itself(
    tmp_path: pathlib.Path, kind: str, size_mib: int
) -> None:
    with site(tmp_path, kind, size_mib) as found:
        found.crowd.give(160_000)
        found.run_until_durable()
        stranger = fill(found.disk)
        found.crowd.give(1_600_000)
        found.run_until_full()
        assert free_bytes(found.disk) < 4 * MIB
        found.assert_acknowledged_is_stored()
        assert found.durable_bytes() < found.given_bytes
        stranger.unlink()
        found.run_until_durable()
        found.finish()
        found.assert_one_episode()


@DISKS
def test_a_disk_that_the_daemon_fills_goes_on_when_a_limit_makes_room(
    tmp_path: pathlib.Path, kind: str, size_mib: int
) -> None:
    """The new limit comes with a reload, and so with another storer: still one episode, and no position goes back."""
    with site(tmp_path, kind, size_mib) as found:
        if size_mib > 100:
            fill(found.disk, leave_bytes=50 * MIB)
        found.crowd.give(4_800_000)
        found.run_until_full()
        found.crowd.run(lambda: found.catalog("SELECT count(*) FROM segment WHERE state = 'sealed'"), what="segments")
        found.assert_acknowledged_is_stored()
        reached = found.durable_bytes()
        assert reached < found.given_bytes
        found.daemon.settings["spool"]["max_bytes"] = "30 MiB"
        found.daemon.reload()
        found.run_until_durable()
        found.crowd.__exit__()
        found.daemon.wait_until_quiet()
        found.daemon.wait_for(lambda: used_bytes(found.daemon.spool) <= 30 * MIB, what="retention")
        found.assert_acknowledged_is_stored()
        found.assert_one_episode()
        ledger = found.daemon.ledger()
        assert ledger["durable_bytes"] == found.given_bytes
        assert ledger["retired_bytes"] == found.catalog(
            "SELECT (SELECT sum(retired) FROM stream) + "
            "coalesce((SELECT value FROM total WHERE name = 'retired_bytes'), 0)"
        )
        assert ledger["retired_bytes"] > 0
        assert ledger["dropped_bytes"] == ledger["lost_bytes"] == 0


def test_a_daemon_starts_on_a_full_disk_and_makes_room(tmp_path: pathlib.Path) -> None:
    """Stopped, then a stranger takes all that is left; what must stay free is made from the oldest segments."""
    with mounted(tmp_path, "tmpfs", 80) as disk:
        settled = settings(disk, min_free_bytes="8 MiB")
        content = senders.payload(1, 24 * MIB)
        with Daemon(tmp_path, settled) as daemon:
            with connect(daemon.port("raw")) as client:
                client.sendall(content)
            daemon.wait_until_served(1)
            daemon.wait_for_total("durable_bytes", len(content))
            daemon.stop()
        fill(disk)
        with Daemon(tmp_path, settled) as daemon:
            daemon.wait_for(lambda: free_bytes(disk) >= 8 * MIB, what="room")
            with connect(daemon.port("raw")) as client:
                client.sendall(content[: 2 * MIB])
            daemon.wait_for_total("durable_bytes", len(content) + 2 * MIB)
            assert 8 * MIB <= daemon.ledger()["retired_bytes"] <= 20 * MIB
            daemon.stop()


def test_free_space_out_of_reach_costs_no_segment_and_more_than_the_disk_is_refused(tmp_path: pathlib.Path) -> None:
    with mounted(tmp_path, "tmpfs", 80) as disk:
        settled = settings(disk, min_free_bytes="81 MiB")
        refused = Daemon(tmp_path, settled)
        try:
            assert refused.run_to_its_end() == 1, refused.log()
            assert refused.log_contains(f"min_free_bytes is {81 * MIB}, the file system of {disk} has {80 * MIB}")
        finally:
            refused.discard()
        settled["spool"]["min_free_bytes"] = 0
        content = senders.payload(2, 8 * MIB)
        with Daemon(tmp_path, settled) as daemon:
            with connect(daemon.port("raw")) as client:
                client.sendall(content)
            daemon.wait_for_total("durable_bytes", len(content))
            spool = daemon.settings["spool"]
            spool["min_free_bytes"] = "81 MiB"
            daemon.write_config()
            assert daemon.ctl("reload", check=False).returncode != 0
            assert daemon.log_contains("reload refused")
            spool["min_free_bytes"] = "40 MiB"
            fill(disk, leave_bytes=8 * MIB)
            daemon.reload()
            daemon.wait_for(lambda: daemon.log_contains(BEGIN), what="a line about the full disk")
            assert daemon.ledger()["retired_bytes"] == 0
            spool["min_free_bytes"] = 0
            daemon.reload()
            daemon.wait_for(lambda: daemon.log_contains(END), what="a line about the end")
            assert daemon.ledger()["retired_bytes"] == 0
            (stream,) = stored_streams(daemon.spool)
            assert stream.content == content
            daemon.stop()


@DISKS
def test_clients_that_may_be_dropped_are_never_stalled_by_a_full_disk(
    tmp_path: pathlib.Path, kind: str, size_mib: int
) -> None:
    """Every byte is stored or counted as dropped, in whole packets; those of mps wait."""
    with site(tmp_path, kind, size_mib, on_full="drop-oldest") as found:
        found.crowd.give(160_000)
        found.run_until_durable()
        stranger = fill(found.disk)
        found.crowd.give(1_600_000)
        found.run_until_full()
        found.crowd.run(lambda: all(client.is_done for client in found.raw), what="raw clients to be rid of all")
        found.crowd.run(lambda: found.daemon.account("dropped_bytes"), what="dropped packets")
        stranger.unlink()
        found.crowd.run(lambda: all(client.acked_bytes == len(client.content) for client in found.mps), what="acks")
        found.crowd.__exit__()
        found.daemon.wait_until_quiet()
        ledger = found.daemon.ledger()
        assert ledger["dropped_bytes"] > 0
        assert ledger["dropped_bytes"] % 16 == 0
        assert ledger["durable_bytes"] + ledger["dropped_bytes"] == found.given_bytes
        streams = found.streams()
        for client in found.mps:
            assert streams[client.name].sha256 == sha256(client.content), client.name
        found.assert_one_episode()
