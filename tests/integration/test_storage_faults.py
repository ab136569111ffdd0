"""Disks that are full, small, or of another kind. Real file systems: tmpfs, and ext4 and xfs images on loop devices."""

from __future__ import annotations

import pathlib

import pytest

from tests.integration import senders
from tests.integration.disks import MIB, fill, mounted, used_bytes
from tests.integration.driver import Daemon, connect
from tests.integration.oracle import sent_digests, stored_digests, stored_streams

pytestmark = pytest.mark.root


def on(spool: pathlib.Path, **more: object) -> dict[str, object]:
    return {"listener": {"on_full": "block"}, "spool": {"path": str(spool), **more}}


@pytest.mark.parametrize(("kind", "size_mib"), [("tmpfs", 64), ("ext4", 64), ("xfs", 320)])
def test_streams_are_stored_byte_for_byte_on(tmp_path: pathlib.Path, kind: str, size_mib: int) -> None:
    """Past the page cache where the file system does that, through it where not; two lives of one stream."""
    contents = [senders.payload(1, 3_000_016 - 3_000_016 % 16), senders.payload(2, 2_000_000)]
    client_table = {"client": [{"id": "press-7", "address": "127.0.0.1"}]}
    with mounted(tmp_path, kind, size_mib) as disk, Daemon(tmp_path, on(disk / "spool") | client_table) as daemon:
        for number, content in enumerate(contents, 1):
            with connect(daemon.port()) as client:
                client.sendall(content)
            daemon.wait_until_served(number)
        daemon.wait_for_total("durable_bytes", sum(map(len, contents)))
        (stream,) = stored_streams(daemon.spool)
        assert stream.content == b"".join(contents)
        daemon.stop()


def test_a_disk_that_is_full_at_the_start_is_named(tmp_path: pathlib.Path) -> None:
    with mounted(tmp_path, "tmpfs", 4) as disk:
        fill(disk)
        daemon = Daemon(tmp_path, on(disk / "spool"))
        try:
            assert daemon.run_to_its_end() == 1, daemon.log()
            assert daemon.log_contains(str(disk / "spool")), daemon.log()
            assert daemon.log_contains("full"), daemon.log()
            daemon.assert_nothing_left()
        finally:
            daemon.discard()


@pytest.mark.parametrize(("kind", "size_mib"), [("tmpfs", 32), ("ext4", 48)])
def test_a_disk_filled_by_somebody_else_delays_and_loses_nothing(
    tmp_path: pathlib.Path, kind: str, size_mib: int
) -> None:
    """Packets wait in memory and then in the sockets; when space is freed everything is stored."""
    content = senders.payload(3, 2_000_000)
    with mounted(tmp_path, kind, size_mib) as disk, Daemon(tmp_path, on(disk / "spool")) as daemon:
        with connect(daemon.port()) as client:
            client.sendall(content[:160_000])
            daemon.wait_for_total("durable_bytes", 160_000)
            ballast = fill(disk)
            client.sendall(content[160_000:])
            daemon.wait_for(lambda: daemon.account("socket_bytes") == len(content), what="all packets")
            daemon.wait_for(lambda: daemon.log_contains("full"), what="a line about the full disk")
            assert daemon.account("durable_bytes") < len(content)
            ballast.unlink()
        daemon.wait_until_quiet()
        daemon.wait_for_total("durable_bytes", len(content))
        assert stored_digests(daemon.spool) == sent_digests([content], 16)
        daemon.stop()


def test_retention_keeps_a_small_disk_from_filling(tmp_path: pathlib.Path) -> None:
    """Ten times as much as may be kept: the newest is there, the rest is counted as retired."""
    content = senders.payload(4, 40_000_000)
    limits = {"max_bytes": "4 MiB", "segment_bytes": "1 MiB"}
    with mounted(tmp_path, "tmpfs", 24) as disk, Daemon(tmp_path, on(disk / "spool", **limits)) as daemon:
        with connect(daemon.port()) as client:
            client.sendall(content)
        daemon.wait_until_quiet()
        daemon.wait_for_total("durable_bytes", len(content))
        daemon.wait_for(lambda: used_bytes(daemon.spool) <= 4 * MIB, what="retention, the last one")
        (stream,) = stored_streams(daemon.spool)
        assert stream.content == content[stream.first_offset :]
        assert len(stream.content) >= 2 * MIB
        total = daemon.ledger()
        assert total["retired_bytes"] == stream.first_offset
        daemon.stop()
