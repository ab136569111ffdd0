"""A write or sync that fails costs the file, never a byte; a full disk costs time."""

from __future__ import annotations

import contextlib
import os
import pathlib
import resource
import shutil
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Iterator

import pytest

from mpserverd.arena.state import Gone, Str, StreamFlag, StreamState
from mpserverd.errors import StartError
from mpserverd.storer import syncing
from mpserverd.storer.failures import CATALOG_RETRY_S, FULL_OVER_S
from mpserverd.storer.space import BALLAST_FILE, Space
from tests.mounts import mounted
from tests.unit.storer.conftest import RigMaker
from tests.unit.storer.rig import CHUNK, Client, Rig, break_file, content

SEGMENT = 64 << 10


@pytest.mark.parametrize("durable", [1, 4095, CHUNK, 10_001])
def test_after_a_failed_write_everything_from_the_durable_offset_is_in_a_fresh_file(rig: Rig, durable: int) -> None:
    client = rig.fresh("peer", 1)
    client.send(durable)
    rig.step()
    bad = pathlib.Path(break_file(rig, client))
    before = bad.read_bytes()[:durable]
    client.send_all(20_000)
    rig.steps(3)
    assert rig.ask("SELECT first, end, state FROM segment ORDER BY first") == [
        (0, durable, "aside"),
        (durable, None, "open"),
    ]
    rig.assert_stored(client)
    client.send_all(2 * SEGMENT)
    rig.assert_stored(client, upto=client.word(Str.DURABLE))
    client.end()
    rig.steps(3)
    rig.assert_stored(client, "peer")
    assert bad.read_bytes()[:durable] == before
    firsts = [row[0] for row in rig.ask("SELECT first FROM segment ORDER BY first")]
    assert firsts == [0, durable, SEGMENT, 2 * SEGMENT], "after the fresh file the grid goes on"
    assert rig.counter("write_errors") == rig.counter("segments_aside") == 1
    assert rig.free_chunks() == rig.arena.count


def test_a_fresh_file_that_fails_at_once_is_renamed_and_another_takes_its_name(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = rig.fresh("peer", 1)
    client.send(5000)
    real = os.fdatasync
    failed = []

    def fail_once(descriptor: int) -> None:
        if not failed:
            failed.append(descriptor)
            raise OSError(5, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fdatasync", fail_once)
    rig.step()
    assert client.word(Str.DURABLE) == 0
    rig.step()
    rig.assert_stored(client)
    assert [name for name in rig.files() if "aside" in name] == ["peer/00000000000000000000.seg.aside"]


def test_a_file_whose_sync_failed_is_never_synced_or_written_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second fdatasync would return 0 although data are gone."""
    client = rig.fresh("peer", 1)
    client.send(5000)
    rig.step()
    real, path = os.fdatasync, str(rig.spool / "streams" / "peer" / "00000000000000000000.seg")
    calls: list[str] = []

    def fail(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        calls.append(name)
        if name == path:
            raise OSError(5, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fdatasync", fail)
    for _ in range(4):
        client.send(5000)
        rig.step()
    assert calls.count(path) == 1
    client.end()
    rig.steps(2)
    assert calls.count(path) == 1
    rig.assert_stored(client, "peer")


def test_a_failed_syncfs_counts_for_every_file_that_it_covered(
    make_rig: RigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig(chunks=128)
    if rig.desk.filesystem.whole_sync.value == "none":
        pytest.skip(f"the file system {rig.desk.filesystem.name} has no safe syncfs")
    clients = [rig.fresh(f"peer-{number}", 1) for number in range(syncing.WHOLE_SYNC_FILES + 1)]
    for client in clients:
        client.send(5000)
    rig.step()

    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    for client in clients[:-1]:
        client.send(100)
    with monkeypatch.context() as patch:
        patch.setattr(syncing.filesystem, "syncfs", fail)
        rig.step()
    assert all(client.word(Str.DURABLE) == 5000 for client in clients)
    rig.steps(2)
    assert rig.one("SELECT count(*) FROM segment WHERE state = 'aside'") == len(clients) - 1
    for client in clients:
        rig.assert_stored(client)


def test_files_behind_a_link_to_another_file_system_are_synced_by_themselves(
    make_rig: RigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A syncfs of the spool's knows nothing of them."""
    rig = make_rig(chunks=128)
    if rig.desk.filesystem.whole_sync.value == "none" or os.stat("/dev/shm").st_dev == os.fstat(rig.desk.root).st_dev:
        pytest.skip("needs a spool with a safe syncfs, and /dev/shm")
    count = syncing.WHOLE_SYNC_FILES + 1
    for number in range(count):
        client = rig.named(f"one-{number}", 1, seed=number)
        client.send(5000)
        client.end()
        rig.steps(2)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        home = rig.spool / "streams" / "one-0"
        shutil.move(home, f"{elsewhere}/one-0")
        home.symlink_to(f"{elsewhere}/one-0")
        clients = [rig.named(f"one-{number}", 1, seed=number) for number in range(count)]
        for client in clients:
            client.send(5000)
        synced: list[str] = []
        real = os.fdatasync

        def note(descriptor: int) -> None:
            synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
            real(descriptor)

        monkeypatch.setattr(os, "fdatasync", note)
        rig.step()
        assert all(client.word(Str.DURABLE) == 10_000 for client in clients)
        segments = [name for name in synced if name.endswith(".seg")]
        assert segments == [f"{elsewhere}/one-0/00000000000000000000.seg"], "the others were synced at once"


def test_a_stream_that_failed_for_days_is_still_tried_again_every_few_seconds(rig: Rig) -> None:
    client = rig.fresh("peer", 16)
    client.send(16_000)
    rig.step()
    rig.desk.streams[client.row].failures = 2000
    break_file(rig, client)
    client.send(16_000)
    rig.step()
    assert rig.counter("write_errors") == 1


def test_a_failing_stream_does_not_stop_the_others(make_rig: RigMaker) -> None:
    rig = make_rig(chunks=128)
    clients = [rig.fresh(f"peer-{number}", 1) for number in range(6)]
    for client in clients:
        client.send(3000)
    rig.step()
    break_file(rig, clients[2])
    for client in clients:
        client.send(3000)
    rig.step()
    assert [client.word(Str.DURABLE) for client in clients] == [6000, 6000, 3000, 6000, 6000, 6000]
    rig.step()
    for client in clients:
        rig.assert_stored(client)


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (4, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("missing", ["next", "early", "present"])
def test_too_many_open_files_finish_no_segment(make_rig: RigMaker, missing: str) -> None:
    """The next one could not be made or opened, or the present one not be opened again: it is as good as ever, and is
    gone on with."""
    rig = make_rig(chunks=64, segment_bytes=SEGMENT)
    client = rig.fresh("peer", 1)
    client.send(SEGMENT - 5000)
    rig.step()
    if missing == "early":
        rig.store.tick(rig.now_s)
        assert rig.files("**/*.new")
    file = rig.desk.streams[client.row].segment
    assert file is not None
    client.send(6000)
    if missing == "present":
        rig.desk.files.close(file)
    with no_descriptors():
        rig.step()
    assert client.word(Str.DURABLE) == SEGMENT - 5000
    assert rig.counter("write_errors") == 1
    rig.steps(3)
    rig.assert_stored(client)
    assert rig.ask("SELECT first, end, state FROM segment ORDER BY first") == [
        (0, SEGMENT, "sealed"),
        (SEGMENT, None, "open"),
    ]
    assert rig.counter("segments_aside") == 0


def test_a_file_that_was_begun_is_not_set_aside_for_want_of_a_descriptor(make_rig: RigMaker) -> None:
    """It was begun by a cycle that was not committed, and is to be opened again."""
    rig = make_rig(chunks=64, segment_bytes=SEGMENT)
    client = rig.fresh("peer", 1)
    client.send(SEGMENT - 5000)
    rig.step()
    rig.desk.catalog._connection.execute("PRAGMA busy_timeout = 0")
    stranger = sqlite3.connect(rig.spool / "catalog.sqlite", isolation_level=None)
    stranger.execute("BEGIN IMMEDIATE")
    client.send(6000)
    rig.step()
    stranger.execute("ROLLBACK")
    stranger.close()
    assert len(rig.files("**/*.seg")) == 2
    with no_descriptors():
        rig.step()
    assert client.word(Str.DURABLE) == SEGMENT - 5000
    rig.steps(3)
    rig.assert_stored(client)
    assert rig.counter("segments_aside") == 0


def test_an_early_file_that_somebody_took_away_costs_nothing(make_rig: RigMaker) -> None:
    rig = make_rig(chunks=64, segment_bytes=SEGMENT)
    client = rig.fresh("peer", 1)
    client.send(SEGMENT - 5000)
    rig.step()
    rig.store.tick(rig.now_s)
    (early,) = rig.files("**/*.new")
    (rig.spool / "streams" / early).unlink()
    client.send(6000)
    rig.step()
    assert rig.counter("write_errors") == rig.counter("segments_aside") == 0
    rig.assert_stored(client)


def test_a_file_that_may_not_grow_is_left_for_the_next_one(make_rig: RigMaker) -> None:
    """EFBIG, by the limit on the length of files."""
    rig = make_rig(chunks=200, chunk_bytes=16 << 10, segment_bytes=8 << 20)
    client = rig.fresh("peer", 1)
    client.send(1 << 20)
    rig.step()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        client.send(900_000)
        rig.steps(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert client.word(Str.DURABLE) == client.sent
    rig.assert_stored(client)
    assert rig.one("SELECT count(*) FROM segment WHERE state = 'aside'") == 1


def test_while_the_catalog_is_locked_nothing_is_acknowledged(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    client = rig.fresh("peer", 1)
    client.send(5000)
    rig.step()
    rig.desk.catalog._connection.execute("PRAGMA busy_timeout = 10")
    client.send(5000)
    stranger = sqlite3.connect(rig.spool / "catalog.sqlite", isolation_level=None)
    stranger.execute("BEGIN IMMEDIATE")
    rig.step()
    assert client.word(Str.DURABLE) == 5000
    stranger.execute("ROLLBACK")
    stranger.close()
    rig.step()
    assert client.word(Str.DURABLE) == 10_000
    rig.assert_stored(client)


def test_a_client_that_comes_back_while_the_catalog_is_locked_waits_and_disturbs_nothing(rig: Rig) -> None:
    """Tried again a few times a second, and each time from the same books."""
    first = rig.named("one")
    first.send(16_000)
    first.end()
    rig.step()
    rested = rig.desk.resting_bytes
    rig.desk.catalog._connection.execute("PRAGMA busy_timeout = 0")
    stranger = sqlite3.connect(rig.spool / "catalog.sqlite", isolation_level=None)
    stranger.execute("BEGIN IMMEDIATE")
    began_s = time.monotonic()
    row = rig.take_row("one", 16, StreamFlag.STORE | StreamFlag.NAMED, StreamState.OPENING)
    while (tries := rig.counter("write_errors")) < 3:
        assert time.monotonic() < began_s + 60
        rig.store.open_streams(time.monotonic())
        assert rig.desk.resting_bytes == rested
        assert rig.store.retention.spool_bytes() == rested
    assert tries <= 1 + (time.monotonic() - began_s) / CATALOG_RETRY_S
    stranger.execute("ROLLBACK")
    stranger.close()
    while rig.state.streams[row, Str.STATE] != StreamState.OPEN:
        assert time.monotonic() < began_s + 60
        rig.store.open_streams(time.monotonic())
    again = Client(rig, row, first.seed)
    again.send(16_000)
    rig.step()
    assert rig.store.retention.content_bytes() == 32_000
    rig.assert_stored(again)


def test_a_stream_that_ends_while_the_catalog_is_locked_is_seen_off_later(rig: Rig) -> None:
    client = rig.fresh("peer")
    client.send(16_000)
    rig.step()
    client.end()
    rig.desk.catalog._connection.execute("PRAGMA busy_timeout = 0")
    stranger = sqlite3.connect(rig.spool / "catalog.sqlite", isolation_level=None)
    stranger.execute("BEGIN IMMEDIATE")
    began_s = time.monotonic()
    while (tries := rig.counter("write_errors")) < 3:
        assert time.monotonic() < began_s + 60
        assert rig.store.see_off(time.monotonic()) == 0
    assert tries <= 1 + (time.monotonic() - began_s) / CATALOG_RETRY_S
    stranger.execute("ROLLBACK")
    stranger.close()
    while not rig.store.see_off(time.monotonic()):
        assert time.monotonic() < began_s + 60
    assert rig.store.retention.content_bytes() == 16_000


# -- real file systems


def tmpfs(path: pathlib.Path, size: str) -> contextlib.AbstractContextManager[pathlib.Path]:
    return mounted(path, "-t", "tmpfs", "-o", f"size={size}", "mpserverd-test")


def ext4(image: pathlib.Path, path: pathlib.Path, size: str) -> contextlib.AbstractContextManager[pathlib.Path]:
    subprocess.run(["truncate", "-s", size, str(image)], check=True)
    made = subprocess.run(
        ["mkfs.ext4", "-q", "-F", "-b", "4096", "-O", "^has_journal", "-e", "continue", str(image)],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("mkfs.ext4 does not work here")
    return mounted(path, "-o", "loop", str(image))


root_only = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


@pytest.mark.root
@root_only
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_full_disk_is_waited_for_and_nothing_is_lost(tmp_path: pathlib.Path, kind: str) -> None:
    size = "24M"
    place = tmpfs(tmp_path / "disk", size) if kind == "tmpfs" else ext4(tmp_path / "image", tmp_path / "disk", size)
    with place as disk:
        rig = Rig(disk, chunks=256, segment_bytes=1 << 20)
        try:
            _fill_and_relieve(rig, disk)
        finally:
            rig.close()


def _fill_and_relieve(rig: Rig, disk: pathlib.Path) -> None:
    client = rig.fresh("peer", 24)
    client.send(24 * 1000)
    rig.step()
    take_all_space(disk / "stranger")
    while client.receive(24 * 2000):
        client.offer()
        rig.steps(4)
        assert client.sent < 64 << 20, "the disk never filled"
    assert rig.counter("full") == 1
    assert not (rig.spool / BALLAST_FILE).exists(), "the ballast went first"
    at = client.word(Str.DURABLE)
    rig.steps(6)
    assert at <= client.word(Str.DURABLE) < client.sent
    (disk / "stranger").unlink()
    rig.steps(10)
    assert client.word(Str.DURABLE) == client.sent - client.sent % 24
    rig.store.tick(rig.now_s)
    assert rig.counter("full") == 1, "it may be full again at once"
    end_episode(rig)
    assert rig.counter("full") == 0
    rig.assert_stored(client)
    client.end()
    rig.steps(2)
    assert client.state() is StreamState.FREE
    assert not [name for name in rig.files() if "aside" in name]
    events = [message.payload["event"] for message in rig.desk.outbox if message.payload]
    assert [event for event in events if event.startswith("spool")] == [
        "spool full: nothing more is stored",
        "spool has room again",
    ]


def end_episode(rig: Rig) -> None:
    """As if nothing had been refused for a while."""
    rig.store.failures._refused_s -= FULL_OVER_S
    rig.store.tick(rig.now_s)


def take_all_space(path: pathlib.Path) -> None:
    size, at = 4 << 20, 0
    with path.open("wb") as file:
        while size >= 4096:
            try:
                os.posix_fallocate(file.fileno(), at, size)
                at += size
            except OSError:
                size //= 2


@pytest.mark.root
@root_only
def test_a_device_that_fails_writes_loses_nothing_once_it_works_again(tmp_path: pathlib.Path) -> None:
    """The image lies on a tmpfs that is full: writes to the device fail. The catalog is elsewhere."""
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool" / "streams").symlink_to(tmp_path / "disk")
    with tmpfs(tmp_path / "below", "20M") as below, ext4(below / "image", tmp_path / "disk", "64M"):
        rig = Rig(tmp_path, chunks=256, segment_bytes=1 << 20)
        try:
            assert (tmp_path / "disk" / "lost+found").is_dir()
            client = rig.fresh("peer", 1)
            client.send(2 * CHUNK)  # the loop device calls a short write a success: the next one begins where none was
            rig.step()
            take_all_space(below / "filler")
            client.send(240_000)
            rig.steps(8)
            assert client.word(Str.DURABLE) == 2 * CHUNK
            (below / "filler").unlink()
            rig.steps(60)
            assert client.word(Str.DURABLE) == client.sent
            rig.assert_stored(client)
        finally:
            rig.close()


def test_min_free_bytes_is_kept_as_if_the_disk_were_full(make_rig: RigMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig(chunks=64)
    client = rig.fresh("peer", 16)
    client.send(1600)
    rig.desk.space.min_free_bytes = rig.desk.space.free_bytes
    rig.step()
    assert client.word(Str.DURABLE) == 0
    assert rig.counter("full") == 0, "retention may make room"
    rig.store.tick(rig.now_s)
    assert rig.counter("full") == 1, "it has nothing to remove"
    rig.desk.space.min_free_bytes = 0
    rig.steps(6)
    rig.assert_stored(client)
    assert rig.gone(Gone.DURABLE_BYTES) == 0


def test_retention_makes_room_below_min_free_bytes_and_nothing_is_called_full(make_rig: RigMaker) -> None:
    """A stream that goes round in what the disk has: nobody waits, and the journal stays quiet."""
    rig = make_rig(chunks=200, segment_bytes=SEGMENT)
    client = rig.fresh("peer", 16)
    space = rig.desk.space
    disk_bytes = 12 * SEGMENT
    real = space.measure

    def measure() -> None:
        space.free_bytes = disk_bytes - sum(path.stat().st_size for path in rig.spool.rglob("*.seg"))

    space.measure = measure  # type: ignore[method-assign]
    space.min_free_bytes = 4 * SEGMENT
    for _ in range(40):
        client.send_all(SEGMENT // 2)
        rig.step()
        rig.store.tick(rig.now_s)
        deadline = time.monotonic() + 5
        while rig.store.background._paths and time.monotonic() < deadline:
            os.sched_yield()
        assert rig.counter("full") == 0
        assert client.word(Str.DURABLE) == client.sent
    assert client.word(Str.FIRST_OFFSET) > 8 * SEGMENT
    measure()
    assert space.free_bytes >= space.min_free_bytes
    space.measure = real  # type: ignore[method-assign]


def test_a_successor_goes_on_with_the_episode_of_a_full_disk(make_rig: RigMaker) -> None:
    """One line when it begins and one when it is over, whoever dies in between."""
    rig = make_rig()
    client = rig.fresh("peer", 16)
    client.send(1600)
    rig.desk.space.min_free_bytes = 1 << 60
    rig.step()
    rig.store.tick(rig.now_s)
    (begun,) = events(rig, "spool")
    assert begun == "spool full: nothing more is stored"
    rig.restart()
    rig.desk.space.min_free_bytes = 1 << 60
    client.adopt()
    rig.step()
    rig.store.tick(rig.now_s)
    assert events(rig, "spool") == []
    rig.desk.space.min_free_bytes = 0
    rig.steps(6)
    end_episode(rig)
    assert events(rig, "spool") == ["spool has room again"]
    rig.assert_stored(client)


def events(rig: Rig, beginning: str) -> list[str]:
    found = [str(message.payload["event"]) for message in rig.desk.outbox if message.payload]
    return [event for event in found if event.startswith(beginning)]


def test_the_catalog_is_written_while_segments_get_no_byte_more(tmp_path: pathlib.Path) -> None:
    """What the ballast gave back is the catalog's: segments do not take it."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    with tmpfs(tmp_path / "disk", "24M") as disk:
        rig = Rig(disk, chunks=256, segment_bytes=1 << 20)
        try:
            client = rig.fresh("peer", 16)
            while rig.counter("full") == 0:
                assert client.receive(64_000)
                client.offer()
                rig.steps(4)
            assert not (rig.spool / BALLAST_FILE).exists()
            rig.steps(10)
            left = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            assert left >= 200_000, f"{left} bytes are left for the catalog"
            with rig.desk.catalog.transaction():
                rig.desk.catalog.add_totals((f"test-{number}", 1) for number in range(500))
        finally:
            rig.close()


def test_a_file_grows_by_what_there_is_when_the_whole_step_does_not_fit(tmp_path: pathlib.Path) -> None:
    """A step doubles the file: with one of 8 MiB and 7 MiB left the disk is not full."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    with tmpfs(tmp_path / "disk", "16M") as disk:
        rig = Rig(disk, chunks=256, segment_bytes=64 << 20)
        try:
            client = rig.fresh("peer", 16)
            while rig.counter("full") == 0:
                assert client.receive(64_000)
                client.offer()
                rig.steps(4)
            assert client.word(Str.DURABLE) > 14 << 20
            rig.assert_stored(client, upto=client.word(Str.DURABLE))
        finally:
            rig.close()


def spool_on_a_full_disk(disk: pathlib.Path) -> tuple[Rig, Client]:
    """Stopped properly, with some MiB of finished segments and the ballast; then a stranger takes all that is left."""
    rig = Rig(disk, chunks=256, segment_bytes=1 << 20, min_free_bytes=4 << 20)
    client = rig.named("one")
    client.send_all(20 << 20)
    rig.steps(2)
    client.end()
    rig.steps(2)
    assert rig.store.put_everything_away()
    rig.store.close()
    assert (rig.spool / BALLAST_FILE).stat().st_size
    take_all_space(disk / "stranger")
    assert os.statvfs(disk).f_bavail == 0
    return rig, client


@pytest.mark.root
@root_only
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_start_on_a_full_disk_gives_up_the_ballast_and_makes_room(tmp_path: pathlib.Path, kind: str) -> None:
    size = "48M"
    place = tmpfs(tmp_path / "disk", size) if kind == "tmpfs" else ext4(tmp_path / "image", tmp_path / "disk", size)
    with place as disk:
        rig, before = spool_on_a_full_disk(disk)
        rig.store = rig.open()
        try:
            again = rig.named("one", seed=before.seed)
            assert again.word(Str.DURABLE) == before.sent
            again.send(64_000)
            deadline_s = time.monotonic() + 30
            while again.word(Str.DURABLE) < again.sent or rig.desk.space.free_bytes < 4 << 20:
                assert time.monotonic() < deadline_s
                rig.step()
                rig.store.tick(rig.now_s)
            first = again.word(Str.FIRST_OFFSET)
            assert 0 < first < 16 << 20
            assert rig.stored("one") == content(again.seed, first, again.sent)
        finally:
            rig.close()


@pytest.mark.root
@root_only
def test_a_start_on_a_full_disk_without_a_ballast_says_what_to_do(tmp_path: pathlib.Path) -> None:
    with tmpfs(tmp_path / "disk", "48M") as disk:
        rig, _ = spool_on_a_full_disk(disk)
        (rig.spool / BALLAST_FILE).unlink()
        take_all_space(disk / "stranger-2")
        with pytest.raises(StartError, match="not full"):
            rig.open()
        (disk / "stranger-2").unlink()
        rig.store = rig.open()
        rig.close()


@pytest.mark.root
@root_only
def test_room_is_made_at_once_with_the_ballast_s_place(tmp_path: pathlib.Path) -> None:
    """Before a stranger takes it: in the same look, not in the next one."""
    with tmpfs(tmp_path / "disk", "48M") as disk:
        rig, _ = spool_on_a_full_disk(disk)
        (disk / "stranger").unlink()
        rig.store = rig.open()
        try:
            rig.desk.catalog._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            take_all_space(disk / "stranger")
            rig.desk.space.look()
            assert rig.store.retention.apply(rig.now_s, time.time_ns()) >= 4 << 20
            assert not (rig.spool / BALLAST_FILE).exists()
        finally:
            rig.close()


@pytest.mark.root
@root_only
def test_an_error_of_the_catalog_is_a_full_disk_only_where_nothing_more_can_be_written(tmp_path: pathlib.Path) -> None:
    """A quota, or a log's index that cannot grow, is an I/O error to SQLite."""
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR_SHMSIZE
    with tmpfs(tmp_path / "disk", "4M") as disk:
        space = Space(str(disk), 0, ballast_in=str(disk))
        assert not space.is_reason_of(error)
        take_all_space(disk / "stranger")
        assert space.is_reason_of(error)
        assert not space.is_reason_of(sqlite3.OperationalError("database is locked"))
