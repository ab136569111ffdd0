"""INVARIANT 21: a sync of everything reaches the device's cache, also where a stranger has just synced.

The device says so itself: it counts the flushes that it was asked for. On xfs the stranger's fsync leaves a clean log
behind, and ``syncfs`` alone then flushes nothing.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator

import pytest

from mpserverd.storer import filesystem
from mpserverd.storer.syncing import WHOLE_SYNC_FILES
from tests.integration.disks import mounted
from tests.unit.storer.conftest import RigMaker
from tests.unit.storer.rig import Rig

STREAMS = WHOLE_SYNC_FILES + 2
STEPS = 12
PACKET, PACKETS = 16, 10
DISK_MIB = 320
_FLUSHES_AT = 15

pytestmark = [pytest.mark.root, pytest.mark.parametrize("kind", ["ext4", "xfs"])]


class Device:
    """Below the streams; the catalog is elsewhere. Every ``syncfs`` meets a stranger who has just synced a file."""

    def __init__(self, disk: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
        number = disk.stat().st_dev
        self._statistics = pathlib.Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/stat")
        self._stranger = disk / "stranger"
        self._real = filesystem.syncfs
        self._before: list[int] = []
        monkeypatch.setattr(filesystem, "syncfs", self._syncfs)

    def _syncfs(self, descriptor: int) -> None:
        with self._stranger.open("ab", buffering=0) as file:
            for _ in range(2):
                file.write(b"stranger")
                os.fsync(file.fileno())
        self._before.append(self._flushes())
        self._real(descriptor)

    def _flushes(self) -> int:
        return int(self._statistics.read_text().split()[_FLUSHES_AT])

    def require_flush(self) -> None:
        """After one ``syncfs``."""
        (before,) = self._before
        self._before.clear()
        assert self._flushes() > before, "the device was not asked to flush"


@pytest.fixture
def disk(kind: str, tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    with mounted(tmp_path, kind, DISK_MIB) as disk:
        yield disk


@pytest.fixture
def rig(disk: pathlib.Path, tmp_path: pathlib.Path, make_rig: RigMaker) -> Rig:
    """After the disk, so that it is closed before that is unmounted."""
    (disk / "streams").mkdir()
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool" / "streams").symlink_to(disk / "streams")
    return make_rig()


@pytest.fixture
def device(kind: str, rig: Rig, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    for number in range(STREAMS):
        rig.fresh(f"peer-{number}", PACKET).send(PACKET * PACKETS)
    rig.step()
    return Device(tmp_path / kind, monkeypatch)


def test_what_a_cycle_wrote_is_flushed_by_the_device(rig: Rig, device: Device) -> None:
    for _ in range(STEPS):
        for client in rig.clients:
            client.send(PACKET * PACKETS)
        rig.step()
        device.require_flush()


def test_files_of_streams_that_end_are_cut_on_the_device(rig: Rig, device: Device) -> None:
    for client in rig.clients:
        client.leave()
    rig.step()
    device.require_flush()


def test_files_of_streams_that_were_live_at_a_power_cut_are_cut_on_the_device(
    rig: Rig, device: Device, make_rig: RigMaker
) -> None:
    make_rig()
    device.require_flush()
