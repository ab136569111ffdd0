"""What is done beside the cycles: checksums, files made early, ballast, time index, streams by the hundred."""

from __future__ import annotations

import hashlib
import os
import pathlib
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from mpserverd.arena.state import Gone, Str, StreamState
from mpserverd.storer import cycle as cycle_module
from mpserverd.storer import filesystem, leaving
from mpserverd.storer import space as space_module
from mpserverd.storer.background import Background
from mpserverd.storer.early import phase_of
from mpserverd.storer.segment_file import INDEX_PAIR, mend_index
from mpserverd.storer.space import BALLAST_FILE, Space
from tests.unit.storer.conftest import RigMaker
from tests.unit.storer.rig import Rig

SEGMENT = 64 << 10


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_sealed_segments_get_the_checksum_of_their_file(rig: Rig) -> None:
    client = rig.fresh("peer", 7)
    client.send_all(3 * SEGMENT + 700)
    rig.steps(2)
    client.end()
    rig.steps(2)
    rig.store.tick(rig.now_s)
    wait_until(lambda: len(rig.store.background.sums) == 4)
    rig.store.tick(rig.now_s)
    rows = rig.ask("SELECT first, sha256 FROM segment WHERE state = 'sealed' ORDER BY first")
    assert len(rows) == 4
    for first, digest in rows:
        file = rig.spool / "streams" / "peer" / f"{first:020d}.seg"
        assert hashlib.sha256(file.read_bytes()).hexdigest() == digest


def test_no_checksum_is_made_while_much_is_written(rig: Rig) -> None:
    client = rig.fresh("peer", 7)
    client.send_all(2 * SEGMENT + 14)
    rig.steps(2)
    rig.store.cycle.written_bytes += 10 << 40
    rig.store.tick(rig.now_s)
    assert rig.store.background.busy
    assert not rig.store.background.has_sums_to_make
    rig.store.tick(rig.now_s + 1)
    wait_until(lambda: len(rig.store.background.sums) == 2)


def test_a_stop_waits_for_no_more_than_the_file_that_is_being_unlinked(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time is over at once here; what is left is the successor's."""
    background, real, begun = Background(), os.unlink, threading.Event()

    def slowly(path: str) -> None:
        begun.set()
        wait_until(lambda: background._closed)
        real(path)

    monkeypatch.setattr(os, "unlink", slowly)
    paths = [tmp_path / str(number) for number in range(20)]
    for path in paths:
        path.touch()
        background.unlink(str(path), 0)
    assert begun.wait(5)
    background.finish([], time.monotonic())
    assert sum(path.exists() for path in paths) == 19


def test_place_and_next_segments_are_made_before_they_are_needed(make_rig: RigMaker) -> None:
    rig = make_rig(chunks=512, chunk_bytes=64 << 10, segment_bytes=4 << 20)
    client = rig.fresh("peer", 16)
    client.send_all(950 << 10)
    rig.steps(2)
    file = rig.desk.streams[client.row].segment
    assert file is not None
    assert file.allocated == 1 << 20
    rig.store.tick(rig.now_s)
    assert file.allocated == 2 << 20
    client.send_all(3 << 20)
    rig.steps(2)
    rig.store.tick(rig.now_s)
    assert [name for name in rig.files() if name.endswith(".new")] == ["peer/00000000000004194304.new"]
    client.send_all(1 << 20)
    rig.steps(2)
    assert rig.files("**/*.seg") == [f"peer/{first:020d}.seg" for first in (0, 4 << 20)]
    rig.assert_stored(client)
    client.end()
    rig.steps(2)
    assert not [name for name in rig.files() if name.endswith(".new")]


def test_phases_of_streams_are_spread() -> None:
    phases = np.array([phase_of(row) for row in range(1000)])
    counts, _ = np.histogram(phases, bins=10, range=(0.5, 0.9))
    assert counts.min() > 80


def test_the_index_has_at_most_a_pair_a_second_and_ends_with_the_stream(rig: Rig) -> None:
    client = rig.fresh("peer", 16)
    for _ in range(40):  # four seconds
        client.send(1600)
        rig.step()
    client.end()
    rig.step()
    index = (rig.spool / "streams" / "peer" / "00000000000000000000.idx").read_bytes()
    offsets = [INDEX_PAIR.unpack_from(index, at)[0] for at in range(0, len(index), INDEX_PAIR.size)]
    assert offsets == sorted(offsets)
    assert 4 <= len(offsets) <= 6
    assert offsets[-1] == 64_000


@pytest.mark.parametrize("pairs", [0, 1, 5000, 20_000])
@pytest.mark.parametrize("torn", [b"", b"torn"])
def test_an_index_is_cut_to_what_is_durable(tmp_path: pathlib.Path, pairs: int, torn: bytes) -> None:
    path = tmp_path / "x.idx"
    path.write_bytes(b"".join(INDEX_PAIR.pack(number, 1) for number in range(pairs)) + torn)
    with path.open("r+b") as file:
        mend_index(file.fileno(), 3)
    assert path.stat().st_size == INDEX_PAIR.size * min(pairs, 4)


def test_the_ballast_goes_when_the_disk_is_full_and_comes_back(tmp_path: pathlib.Path) -> None:
    space = Space(str(tmp_path), 0, ballast_in=str(tmp_path))
    space.make_ballast()
    assert 0 < (tmp_path / BALLAST_FILE).stat().st_size <= space_module.BALLAST_BYTES_MAX
    assert space.drop_ballast()
    assert not space.drop_ballast()
    space.min_free_bytes = space.free_bytes
    space.make_ballast()
    assert not (tmp_path / BALLAST_FILE).exists(), "there is no place for it"


def test_a_ballast_of_which_only_the_name_was_made_is_made_whole(tmp_path: pathlib.Path) -> None:
    """The storer was killed in between."""
    (tmp_path / BALLAST_FILE).touch()
    space = Space(str(tmp_path), 0, ballast_in=str(tmp_path))
    space.make_ballast()
    assert (tmp_path / BALLAST_FILE).stat().st_size > 0


def test_a_burst_asks_for_a_small_part_of_the_disk_at_most(tmp_path: pathlib.Path) -> None:
    space = Space(str(tmp_path), 0, ballast_in=str(tmp_path))
    size_bytes = filesystem.size_bytes(str(tmp_path))
    space.take(1 << 20)
    space.look()
    assert space.headroom_bytes == 2 << 20
    space.take(size_bytes)
    space.look()
    assert 2 << 20 < space.headroom_bytes <= size_bytes // 16


def test_what_is_kept_free_is_refused_and_remembered(tmp_path: pathlib.Path) -> None:
    space = Space(str(tmp_path), 0, ballast_in=str(tmp_path))
    space.take(1 << 60)
    space.measure()
    space.measure = lambda: None  # type: ignore[method-assign]  # others write to this disk too
    space.min_free_bytes = space.free_bytes - 1000
    with pytest.raises(OSError, match="must stay free"):
        space.take(4096)
    assert space.short_bytes == 3096


def test_the_file_system_is_known_for_what_it_is(tmp_path: pathlib.Path) -> None:
    found = filesystem.probe(str(tmp_path))
    assert found.direct == (found.name in ("ext4", "xfs"))
    shm = pathlib.Path("/dev/shm")
    if shm.is_dir() and os.access(shm, os.W_OK):
        assert filesystem.probe(str(shm)).whole_sync is filesystem.WholeSync.NONE
    assert list(tmp_path.iterdir()) == []


def test_allocated_place_reads_as_zeros_and_can_be_made_zero_again(tmp_path: pathlib.Path) -> None:
    with (tmp_path / "file").open("w+b") as file:
        filesystem.allocate(file.fileno(), 0, 20_000)
        assert os.pread(file.fileno(), 20_000, 0).count(0) == os.fstat(file.fileno()).st_size
        os.pwrite(file.fileno(), b"\xee" * 20_000, 0)
        filesystem.make_zero(file.fileno(), 100, 15_000)
        assert os.pread(file.fileno(), 20_000, 0) == b"\xee" * 100 + bytes(15_000) + b"\xee" * 4900


def test_hundreds_of_streams_begin_and_end_in_portions(make_rig: RigMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cycle_module, "BEGIN_MAX", 10)
    monkeypatch.setattr(leaving, "STREAMS_MAX", 7)
    rig = make_rig(chunks=200, rows=64)
    clients = [rig.fresh(f"peer-{number}") for number in range(25)]
    for client in clients:
        client.send(160)
    rig.step()
    assert sum(client.word(Str.DURABLE) == 160 for client in clients) == 10
    assert rig.store.more
    rig.steps(2)
    assert all(client.word(Str.DURABLE) == 160 for client in clients)
    for client in clients:
        client.leave()
    rig.step()
    assert sum(client.state() is StreamState.FREE for client in clients) == 7
    assert rig.store.more
    rig.steps(3)
    assert not rig.store.more
    assert rig.gone(Gone.STREAMS) == 25
    assert rig.free_chunks() == rig.arena.count
