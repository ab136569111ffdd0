"""Backups of spools that were written by hand: what is copied, kept, taken again, refused, and never half done."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sqlite3
import struct
from pathlib import Path
from typing import Any

import pytest
from spool_writer import SpoolWriter, noise

from mpserverd.errors import SpoolError, UsageError
from mpserverd.ops import backup_catalog
from mpserverd.ops.backup import backup
from mpserverd.ops.copying import ShortFileError, copy_file
from mpserverd.streams.catalog_view import all_streams
from mpserverd.streams.reader import open_stream

CONTENT = noise(64 * 1024)


def content_of(spool: Path, name: str) -> bytes:
    with open_stream(name, spool=spool) as stream:
        return b"".join(bytes(view) for view in stream.read_bytes())


def files_of(directory: Path) -> dict[str, bytes]:
    """Everything that counts: the streams' files."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted((directory / "streams").rglob("*"))
        if path.is_file()
    }


def run(spool: SpoolWriter, target: Path, *names: str, **more: Any) -> dict[str, Any]:
    return backup(spool.path, target, names, **more)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "copy"


def test_a_copy_has_the_durable_bytes_and_no_more(spool: SpoolWriter, target: Path) -> None:
    stream = spool.add("a", CONTENT, cuts=[16384, 32768], holes=[(20000, 20016, "dropped")], connected=True)
    spool.add_index(stream, 0, [(1000, 5), (16384, 6)])
    found = run(spool, target)
    assert (found["fine"], found["streams"], found["segments"]) == (True, 1, 3)
    assert found["copied_bytes"] == len(CONTENT)
    assert content_of(target, "a") == content_of(spool.path, "a")
    last = max((target / "streams" / "a-00000000000000a1").glob("*.seg"))
    assert last.stat().st_size == len(CONTENT) - 32768  # without what is preallocated
    assert not all_streams(target)[0].row.connected
    assert not list(target.glob("catalog.sqlite-*"))
    assert not (target / ".new").exists()


def test_a_second_copy_takes_only_what_is_new(spool: SpoolWriter, target: Path) -> None:
    stream = spool.add("a", CONTENT, cuts=[16384, 32768])
    run(spool, target)
    kept = min((target / "streams").rglob("*.seg"))
    before = kept.stat().st_ino
    spool.append(stream, noise(1600, 2))
    found = run(spool, target)
    assert (found["kept_segments"], found["kept_bytes"], found["segments"]) == (2, 32768, 1)
    assert kept.stat().st_ino == before
    assert content_of(target, "a") == CONTENT + noise(1600, 2)


def test_a_segment_that_was_copied_before_it_had_a_checksum_is_kept_when_it_has_that_content(
    spool: SpoolWriter, target: Path
) -> None:
    stream = spool.add("a", CONTENT, cuts=[16384], sealed_sums=False)
    run(spool, target)
    spool.catalog.execute(
        "UPDATE segment SET sha256 = ? WHERE stream = ? AND first = 0",
        (hashlib.sha256(CONTENT[:16384]).hexdigest(), stream),
    )
    assert run(spool, target)["kept_segments"] == 1
    path = min((target / "streams").rglob("*.seg"))
    (target / "catalog.sqlite").unlink()
    assert run(spool, target)["kept_segments"] == 0
    assert path.read_bytes() == CONTENT[:16384]


@pytest.mark.parametrize("damage", [b"", CONTENT[:100]])
def test_a_kept_segment_of_another_size_is_copied_again(spool: SpoolWriter, target: Path, damage: bytes) -> None:
    spool.add("a", CONTENT, cuts=[16384])
    run(spool, target)
    min((target / "streams").rglob("*.seg")).write_bytes(damage)
    found = run(spool, target)
    assert (found["fine"], found["kept_segments"]) == (True, 0)


def test_a_kept_segment_with_other_content_is_found_by_the_verification(spool: SpoolWriter, target: Path) -> None:
    spool.add("a", CONTENT, cuts=[16384])
    run(spool, target)
    min((target / "streams").rglob("*.seg")).write_bytes(noise(16384, 9))
    found = run(spool, target)
    assert found["fine"] is False
    assert "other content" in found["findings"][0]


def test_damage_of_the_spool_itself_is_found_in_the_copy(spool: SpoolWriter, target: Path) -> None:
    stream = spool.add("a", CONTENT, cuts=[16384])
    spool.segment_paths(stream)[0].write_bytes(noise(16384, 9))
    assert run(spool, target)["fine"] is False


def test_older_epochs_are_copied_and_named_streams_alone(spool: SpoolWriter, target: Path, tmp_path: Path) -> None:
    spool.add("a", CONTENT, epoch="00000000000000a1")
    spool.add("a", CONTENT[:160], epoch="00000000000000b2")
    spool.add("b", CONTENT[:1600])
    assert run(spool, target)["streams"] == 3
    some = tmp_path / "some"
    assert run(spool, some, "b", "a@00000000000000a1")["streams"] == 2
    assert {stream.row.full_name for stream in all_streams(some, all_epochs=True)} == {"a", "b"}
    assert content_of(some, "a") == CONTENT


def test_a_copy_of_some_does_not_throw_away_others(spool: SpoolWriter, target: Path) -> None:
    spool.add("a", CONTENT)
    spool.add("b", CONTENT)
    run(spool, target)
    before = files_of(target)
    with pytest.raises(UsageError, match="1 other streams, such as a"):
        run(spool, target, "b")
    assert files_of(target) == before
    assert run(spool, target)["fine"]


# -- while the spool lives


def test_segments_that_retention_takes_away_meanwhile_are_not_missed(spool: SpoolWriter, target: Path) -> None:
    stream = spool.add("a", CONTENT, cuts=[16384, 32768])
    spool.add("b", CONTENT)
    found = run(spool, target, after_catalog=lambda: spool.retire(stream, 16384))
    assert (found["fine"], found["retaken"], found["streams"]) == (True, 1, 2)
    assert content_of(target, "a") == CONTENT[16384:]
    assert all_streams(target)[0].row.first_offset == 16384
    assert len(list((target / "streams" / "a-00000000000000a1").glob("*.seg"))) == 2


def test_a_stream_that_is_deleted_meanwhile_is_not_in_the_copy(spool: SpoolWriter, target: Path) -> None:
    stream = spool.add("a", CONTENT)
    spool.add("b", CONTENT)

    def delete() -> None:
        for path in spool.segment_paths(stream):
            path.unlink()
        for table, key in (("segment", "stream"), ("hole", "stream"), ("stream", "id")):
            spool.catalog.execute(f"DELETE FROM {table} WHERE {key} = ?", (stream,))

    found = run(spool, target, after_catalog=delete)
    assert (found["fine"], found["gone"], found["streams"]) == (True, 1, 1)
    assert [each.row.name for each in all_streams(target)] == ["b"]
    assert not list((target / "streams").glob("a-*"))


def test_what_is_written_after_the_catalog_is_left_for_the_next_copy(spool: SpoolWriter, target: Path) -> None:
    stream = spool.add("a", CONTENT)
    run(spool, target, after_catalog=lambda: spool.append(stream, noise(160, 2)))
    assert content_of(target, "a") == CONTENT


def test_a_time_index_that_ran_ahead_of_the_copied_catalog_is_copied_up_to_it(spool: SpoolWriter, target: Path) -> None:
    """A daemon that is started on a copy takes two pairs ahead of the catalog for proof of an old catalog."""
    stream = spool.add("a", CONTENT[:160])
    pairs = [(80, 5), (160, 6)]
    spool.add_index(stream, 0, [*pairs, (240, 7), (320, 8)], tail=b"torn")
    assert run(spool, target)["fine"]
    assert (target / "streams" / "a-00000000000000a1" / f"{0:020d}.idx").read_bytes() == struct.pack(
        "<4Q", *(value for pair in pairs for value in pair)
    )


def test_a_file_that_is_missing_for_good_is_damage_and_no_endless_loop(
    spool: SpoolWriter, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = spool.add("a", CONTENT)
    spool.segment_paths(stream)[0].unlink()
    monkeypatch.setattr("mpserverd.ops.backup.RETAKES_MAX", 3)
    with pytest.raises(SpoolError, match="is missing, and the catalog still lists it"):
        run(spool, target)


def test_the_storer_may_commit_while_the_catalog_is_copied(spool: SpoolWriter, target: Path) -> None:
    """A reader's transaction holds up nobody in WAL mode."""
    spool.add("a", CONTENT)
    target.mkdir()
    with contextlib.closing(sqlite3.connect(spool.path / "catalog.sqlite", isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM stream").fetchone()
        spool.add("b", CONTENT)
        backup_catalog.take(spool.path, target)
    assert {stream.row.name for stream in all_streams(target / ".new")} == {"a", "b"}


# -- interrupted


def test_a_copy_that_is_interrupted_anywhere_leaves_a_whole_one(
    spool: SpoolWriter, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, full = spool.add("a", CONTENT, cuts=[16384, 32768]), CONTENT
    run(spool, target)
    interrupted = 0
    for step in range(12):
        more = noise(160, step)
        spool.append(stream, more)
        full += more
        if step == 3:
            spool.retire(stream, 16384)
        with monkeypatch.context() as patch:
            try:
                run(spool, target, after_catalog=lambda step=step, patch=patch: _fail_after(patch, step))  # type: ignore[misc]
            except InterruptedError:
                interrupted += 1
        with open_stream("a", spool=target) as opened:
            content = b"".join(bytes(view) for view in opened.read_bytes())
            assert content == full[opened.first_offset : opened.durable_offset], step
    assert 5 < interrupted < 12
    assert run(spool, target)["fine"]
    assert not list(target.rglob("*.part"))


def _fail_after(patch: pytest.MonkeyPatch, steps: int) -> None:
    """Of the next calls that give a file its name or sync it, so many work."""
    left = [steps]

    def counted(real: Any) -> Any:
        def call(*args: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise InterruptedError
            return real(*args)

        return call

    for name in ("replace", "fsync", "fdatasync"):
        patch.setattr(os, name, counted(getattr(os, name)))


# -- refused


def test_a_directory_with_other_files_is_refused(spool: SpoolWriter, target: Path) -> None:
    target.mkdir()
    (target / "mine.txt").write_text("x")
    with pytest.raises(UsageError, match=r"has mine\.txt in it"):
        run(spool, target)
    assert [path.name for path in target.iterdir()] == ["mine.txt"]


def test_a_backup_of_another_spool_is_refused(spool: SpoolWriter, target: Path) -> None:
    target.mkdir()
    (target / "backup.json").write_text(json.dumps({"spool": "/elsewhere"}))
    with pytest.raises(UsageError, match="is a backup of /elsewhere"):
        run(spool, target)
    (target / "backup.json").write_text("{")
    with pytest.raises(SpoolError, match="makes no sense"):
        run(spool, target)


def test_the_spool_itself_and_what_lies_in_it_are_refused(spool: SpoolWriter) -> None:
    for path in (spool.path, spool.path / "streams" / "copy"):
        with pytest.raises(UsageError, match="lies within the spool"):
            run(spool, path)


def test_a_directory_that_is_locked_is_refused(spool: SpoolWriter, target: Path) -> None:
    target.mkdir()
    descriptor = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(SpoolError, match="in use"):
            run(spool, target)
    finally:
        os.close(descriptor)


def test_too_little_room_is_said_before_anything_is_copied(
    spool: SpoolWriter, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool.add("a", CONTENT)
    monkeypatch.setattr("mpserverd.ops.backup.SPARE_BYTES", 1 << 62)
    with pytest.raises(SpoolError, match="bytes free, the copy needs"):
        run(spool, target)
    assert not (target / "streams").exists() or not any((target / "streams").iterdir())


# -- one file


def test_a_file_that_is_shorter_than_what_is_durable_is_no_copy(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 10)
    with pytest.raises(ShortFileError, match="has 10 bytes, 11 are durable"):
        copy_file(tmp_path / "a", tmp_path / "b", 11)
    assert not (tmp_path / "b").exists()


def test_a_file_is_copied_where_the_kernel_cannot_do_it_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    (tmp_path / "a").write_bytes(CONTENT)
    assert copy_file(tmp_path / "a", tmp_path / "b", 50_000) == 50_000
    assert (tmp_path / "b").read_bytes() == CONTENT[:50_000]
