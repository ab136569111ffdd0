"""What a start of the daemon refuses is found, and what is right beside a running daemon is not."""

from __future__ import annotations

import json
import shutil
import struct
import threading
from pathlib import Path

import pytest
from spool_writer import CREATED_NS, SpoolWriter, noise

from mpserverd.errors import DamageError
from mpserverd.streams.catalog_view import all_streams
from mpserverd.streams.verify import verify_streams
from mpserverd.streams.verify_spool import check_catalog_pages, check_directories, check_directory, list_directories

PAGE = 4096
IDENTITY = {
    "version": 1,
    "number": 1,
    "name": "a",
    "epoch": "00000000000000a1",
    "packet_size": 16,
    "layout": None,
    "named": True,
    "created_unix_ns": CREATED_NS,
    "start": 0,
}


def findings(spool: SpoolWriter) -> list[str]:
    checks = verify_streams(spool.path, all_streams(spool.path, all_epochs=True), 2)
    return [finding for check in checks for finding in check.findings]


@pytest.fixture
def directory(spool: SpoolWriter) -> Path:
    """Of a stream with segments [32, 96) and [96, 160), the last open; 32 bytes were retired."""
    number = spool.add("a", noise(160), cuts=[96], first_offset=32)
    spool.add_index(number, 32, [(96, CREATED_NS)])
    spool.add_index(number, 96, [(144, CREATED_NS + 10**9), (160, CREATED_NS + 2 * 10**9)])
    path = spool.directory(number)
    (path / "stream.json").write_text(json.dumps(IDENTITY))
    return path


def hole(*entry: int) -> bytes:
    return struct.pack("<QQQ", *entry)


# --- the catalog


def test_a_garbage_page_anywhere_in_the_catalog_is_found(spool: SpoolWriter) -> None:
    """Those of an index, or of a table that no reader asks, too."""
    spool.catalog.execute("CREATE INDEX closed ON segment(state)")
    for number in range(40):
        spool.add(f"s{number}", noise(320), cuts=range(16, 320, 16))
    spool.catalog.execute("INSERT INTO total VALUES ('cut_bytes', 1)")
    spool.catalog.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    spool.close()
    catalog = spool.path / "catalog.sqlite"
    whole = catalog.read_bytes()
    assert list(check_catalog_pages(spool.path)) == []
    for at in range(0, len(whole), PAGE):
        catalog.write_bytes(whole[:at] + noise(PAGE, seed=at) + whole[at + PAGE :])
        try:
            found = list(check_catalog_pages(spool.path))
        except DamageError as error:
            found = [str(error)]
            assert "run mpserverctl repair" in found[0]
        assert found, f"page {at // PAGE + 1} of {len(whole) // PAGE}"


def test_a_catalog_that_is_missing_beside_streams_names_the_next_step(spool: SpoolWriter, directory: Path) -> None:
    spool.close()
    (spool.path / "catalog.sqlite").unlink()
    with pytest.raises(DamageError, match=r"is missing, but there are streams, .*run mpserverctl repair"):
        all_streams(spool.path)


@pytest.mark.parametrize("newest", [64_000, 176])
def test_a_catalog_that_is_older_than_the_time_index_is_found(spool: SpoolWriter, directory: Path, newest: int) -> None:
    spool.add_index(1, 96, [(160, 1), (newest - 8, 2), (newest, 3)])
    assert findings(spool) == [
        f"its time index was durable to at least {newest - 8}, the catalog says 160 and is too old"
    ]


def test_it_is_found_in_segments_that_it_does_not_know(spool: SpoolWriter, directory: Path) -> None:
    for first in (320, 640):
        (directory / f"{first:020d}.seg").write_bytes(noise(320))
        spool.add_index(1, first, [(first + 320, 3)])
    (finding,) = findings(spool)
    assert "durable to at least 640" in finding


def test_one_pair_ahead_is_a_storer_before_its_commit(spool: SpoolWriter, directory: Path) -> None:
    spool.add_index(1, 96, [(160, 1), (320, 2), (320, 3)])
    assert findings(spool) == []


def test_a_row_that_follows_while_it_is_looked_at_is_not_old(spool: SpoolWriter, directory: Path) -> None:
    snapshots = all_streams(spool.path)
    spool.add_index(1, 96, [(160, 1), (176, 2), (192, 3), (208, 4)])
    spool.append(1, noise(32))
    assert check_directory(spool.path, snapshots[0]) == []


def test_without_sync_commits_may_be_missing_and_nobody_minds(spool: SpoolWriter, directory: Path) -> None:
    spool.add_index(1, 96, [(160, 1), (176, 2), (192, 3)])
    assert len(findings(spool)) == 1
    spool.catalog.execute("INSERT INTO meta VALUES ('sync', 'none')")
    assert findings(spool) == []


# --- files of a stream


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"garbage", "makes no sense: it is not JSON"),
        (b"", "makes no sense: it is not JSON"),
        (
            json.dumps({**IDENTITY, "epoch": "00000000000000ff"}).encode(),
            "by the catalog it is a, 00000000000000a1, 16",
        ),
        (json.dumps({**IDENTITY, "packet_size": 24}).encode(), "packets of 24 bytes; by the catalog it is"),
        (json.dumps({**IDENTITY, "name": "b"}).encode(), "says stream b"),
    ],
)
def test_an_identity_that_makes_no_sense_or_is_anothers_is_found(
    spool: SpoolWriter, directory: Path, content: bytes, why: str
) -> None:
    (directory / "stream.json").write_bytes(content)
    (finding,) = findings(spool)
    assert finding.startswith(str(directory / "stream.json"))
    assert why in finding


def test_two_directories_that_changed_places_are_found(spool: SpoolWriter, directory: Path) -> None:
    other = spool.directory(spool.add("b", noise(160), cuts=[96], first_offset=32, sealed_sums=False))
    (other / "stream.json").write_text(json.dumps({**IDENTITY, "name": "b"}))
    for source, target in ((directory, "between"), (other, directory.name), (other.with_name("between"), other.name)):
        source.rename(source.with_name(target))
    assert sum("by the catalog it is" in finding for finding in findings(spool)) == 2


def test_a_directory_of_an_older_version_has_no_identity(spool: SpoolWriter, directory: Path) -> None:
    (directory / "stream.json").unlink()
    assert findings(spool) == []


def test_notes_of_holes_that_make_no_sense_are_found(spool: SpoolWriter, directory: Path) -> None:
    notes = directory / f"{96:020d}.holes"
    notes.write_bytes(hole(96, 112, 1) + hole(112, 128, 0) + b"torn")
    assert findings(spool) == []
    notes.write_bytes(hole(96, 112, 1) + hole(128, 112, 0))
    assert findings(spool) == [f"{notes} makes no sense: entry 1 is no hole"]


@pytest.mark.parametrize("name", ["notes.txt", f"{128:020d}.seg", f"{32:020d}.bak", "96.seg", f"{64:020d}.idx", "core"])
def test_a_file_that_no_row_explains_is_found(spool: SpoolWriter, directory: Path, name: str) -> None:
    (directory / name).write_bytes(b"")
    assert findings(spool) == [f"{directory / name} is no file of this stream by the catalog"]


@pytest.mark.parametrize(
    "name",
    [
        f"{160:020d}.seg",
        f"{1 << 20:020d}.seg",
        f"{1 << 20:020d}.holes",
        f"{1 << 20:020d}.new",
        f"{0:020d}.seg",
        f"{96:020d}.seg.2.aside",
        "stream.json.aside",
        "stream.retired",
    ],
)
def test_what_is_begun_retired_or_set_aside_is_no_finding(spool: SpoolWriter, directory: Path, name: str) -> None:
    (directory / name).write_bytes(b"")
    assert findings(spool) == []


def test_segments_that_are_made_meanwhile_are_no_finding(spool: SpoolWriter, directory: Path) -> None:
    (snapshot,) = all_streams(spool.path)
    spool.roll(1, noise(64))
    spool.retire(1, 96, unlink=False)
    assert check_directory(spool.path, snapshot) == []


# --- what lies where streams do


def test_a_directory_of_no_stream_is_found(spool: SpoolWriter, directory: Path) -> None:
    for name in ("stray", "copy.aside"):
        shutil.copytree(directory, directory.with_name(name))
    (directory.parent / "notes.txt").write_text("")
    assert list(check_directories(spool.path, list_directories(spool.path))) == [
        f"{directory.parent / name} belongs to no stream of the catalog" for name in ("notes.txt", "stray")
    ]


def test_streams_that_come_and_go_meanwhile_are_no_finding(spool: SpoolWriter, directory: Path) -> None:
    spool.catalog.execute("DELETE FROM stream")
    (directory / "stream.json").rename(directory / "stream.retired")
    before = list_directories(spool.path)
    assert before == [directory.name]
    spool.add("b", noise(160))
    assert list(check_directories(spool.path, before)) == []
    (directory / "stream.retired").unlink()
    shutil.rmtree(directory)
    assert list(check_directories(spool.path, before)) == []


def test_a_directory_that_retention_is_removing_is_waited_for(spool: SpoolWriter, directory: Path) -> None:
    spool.catalog.execute("DELETE FROM stream")
    (directory / "stream.json").unlink()
    removing = threading.Timer(0.2, shutil.rmtree, [directory])
    removing.start()
    try:
        assert list(check_directories(spool.path, [directory.name])) == []
    finally:
        removing.join()
