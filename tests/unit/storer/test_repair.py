"""A spool is made whole again from its files: nothing is deleted, and what is missing is said."""

from __future__ import annotations

import argparse
import builtins
import contextlib
import errno
import io
import os
import pathlib
import shutil
import sqlite3
from collections.abc import Callable
from typing import Any

import pytest

from mpserverd.cli.spool_commands import COMMANDS, add_parsers
from mpserverd.errors import SpoolError
from mpserverd.storer import repair as repair_module
from mpserverd.storer import repair_swap
from mpserverd.storer.repair import Wishes, repair
from mpserverd.storer.segment_file import INDEX_PAIR
from mpserverd.streams.catalog_view import all_streams
from mpserverd.streams.verify import verify_streams
from mpserverd.streams.verify_spool import check_catalog_pages, check_directories, list_directories
from tests.unit.storer.made_spool import BLOCK, Made, MadeSpool, files_of, without


@pytest.fixture
def spool(tmp_path: pathlib.Path) -> MadeSpool:
    return MadeSpool(tmp_path / "spool")


@pytest.fixture
def made(spool: MadeSpool) -> Made:
    """Segments of 2, 2 and 2 blocks; the last is open."""
    return spool.add("press-7", 6 * BLOCK, cuts=[2 * BLOCK, 4 * BLOCK])


Damage = Callable[[MadeSpool, Made], object]


def said(spool: MadeSpool, *words: str, code: int = 0) -> str:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_parsers(parser.add_subparsers(dest="command"))
    args = parser.parse_args(["repair", *words, "--spool", str(spool.path)])
    out = io.StringIO()
    assert COMMANDS["repair"](args, out) == code, out.getvalue()
    return out.getvalue()


def flip(path: pathlib.Path, at: int = 100) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def swap(one: pathlib.Path, other: pathlib.Path) -> None:
    between = one.with_name("between")
    one.rename(between)
    other.rename(one)
    between.rename(other)


# --- segments


def test_a_sound_spool_is_left_as_it_is(spool: MadeSpool, made: Made) -> None:
    before = {path: path.stat().st_mtime_ns for path in spool.path.rglob("*") if path.is_file()}
    report = repair(str(spool.path), Wishes(checksums=True))
    assert report.fine and not report.changed
    assert before == {path: path.stat().st_mtime_ns for path in spool.path.rglob("*") if path.is_file()}
    spool.assert_whole(made)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_missing_segment_becomes_a_hole_and_the_rest_stays(spool: MadeSpool, made: Made, number: int) -> None:
    first = made.firsts[number]
    made.segment(first).unlink()
    report = repair(str(spool.path))
    assert (report.fine, report.lost_bytes) == (False, 2 * BLOCK)
    assert spool.holes(made) == [(first, first + 2 * BLOCK, "lost")]
    assert spool.stored()["press-7"].content == without(made.content, (first, first + 2 * BLOCK))
    assert not repair(str(spool.path)).changed


@pytest.mark.parametrize("number", [0, 1, 2])
def test_of_a_short_segment_what_is_there_is_kept(spool: MadeSpool, made: Made, number: int) -> None:
    first = made.firsts[number]
    os.truncate(made.segment(first), BLOCK)
    report = repair(str(spool.path))
    assert report.lost_bytes == BLOCK
    assert "is short" in "".join(report.streams[0].notes)
    assert spool.holes(made) == [(first + BLOCK, first + 2 * BLOCK, "lost")]
    assert spool.stored()["press-7"].content == without(made.content, (first + BLOCK, first + 2 * BLOCK))
    assert not repair(str(spool.path)).changed


def test_flipped_bits_are_found_with_checksums_only_and_that_is_said(spool: MadeSpool, made: Made) -> None:
    flip(made.segment(2 * BLOCK))
    assert "not compared with their checksums: 2 segments; mpserverctl repair --checksums does that" in said(spool)
    text = said(spool, "--checksums", code=1)
    assert f"segment {2 * BLOCK} had other content than when it was sealed: set aside" in text
    assert "not compared" not in text
    assert made.segment(2 * BLOCK).with_suffix(".seg.aside").exists()
    assert spool.stored()["press-7"].content == without(made.content, (2 * BLOCK, 4 * BLOCK))
    assert "nothing to repair" in said(spool, "--checksums")


def test_swapped_segments_are_both_set_aside(spool: MadeSpool, made: Made) -> None:
    swap(made.segment(0), made.segment(2 * BLOCK))
    report = repair(str(spool.path), Wishes(checksums=True))
    assert report.lost_bytes == 4 * BLOCK
    assert spool.stored()["press-7"].content == made.content[4 * BLOCK :]


# --- directories


def test_two_directories_that_were_swapped_keep_their_streams(spool: MadeSpool, made: Made) -> None:
    other = spool.add("lathe", 3 * BLOCK, seed=2)
    swap(made.directory, other.directory)
    assert repair(str(spool.path)).fine
    spool.assert_whole(made, other)
    assert not repair(str(spool.path)).changed


def test_a_stream_whose_directory_another_one_has_now_keeps_its_offsets(spool: MadeSpool, made: Made) -> None:
    other = spool.add("lathe", 3 * BLOCK, seed=2)
    shutil.rmtree(other.directory)
    made.directory.rename(other.directory)
    assert repair(str(spool.path)).lost_bytes == 3 * BLOCK
    found = spool.stored()
    assert (found["press-7"].content, found["lathe"].durable) == (made.content, 3 * BLOCK)
    assert spool.holes(other) == [(0, 3 * BLOCK, "lost")]
    assert not repair(str(spool.path)).changed


def test_a_directory_of_another_spool_takes_nobodys_number(
    spool: MadeSpool, made: Made, tmp_path: pathlib.Path
) -> None:
    stranger = MadeSpool(tmp_path / "other").add("lathe", 3 * BLOCK, seed=2)
    assert stranger.record.id == made.record.id
    shutil.copytree(stranger.directory, spool.streams / "lathe")
    assert repair(str(spool.path)).fine
    spool.assert_whole(made, stranger)
    assert spool.ask("SELECT id FROM stream WHERE name = 'press-7'") == [(made.record.id,)]


def test_a_copy_of_a_directory_is_set_aside(spool: MadeSpool, made: Made) -> None:
    shutil.copytree(made.directory, spool.streams / "copy")
    assert not repair(str(spool.path)).fine
    spool.assert_whole(made)
    assert files_of(spool.streams) == ["copy.aside", "press-7"]


# --- without a catalog


def test_without_a_catalog_all_is_there_and_lost_checksums_are_said(spool: MadeSpool, made: Made) -> None:
    spool.lose_catalog()
    text = said(spool)
    assert "no checksum any more: 2 sealed segments" in text
    spool.assert_whole(made)
    assert "not compared" not in said(spool), "there is nothing to compare with"


def test_packet_size_is_asked_for_where_nothing_says_it(spool: MadeSpool, made: Made) -> None:
    spool.lose_catalog()
    (made.directory / "stream.json").unlink()
    assert "nothing says how large their packets are; give --packet-size" in said(spool, code=1)
    assert not spool.stored()
    assert len(list(made.directory.glob("*.seg"))) == len(made.firsts)
    assert "name and packet size are guessed" in said(spool, "--packet-size", "16")
    (stream,) = spool.stored().values()
    assert (stream.name, stream.packet_size, stream.content) == ("press-7", 16, made.content)
    assert not repair(str(spool.path)).changed


# --- what is cut


def test_bytes_behind_the_end_are_kept_each_time(spool: MadeSpool, made: Made) -> None:
    """Two cuts at one end: the second tail does not replace the first."""
    for tail in (b"a" * 100, b"b" * 50):
        with made.segment(4 * BLOCK).open("r+b") as file:
            file.seek(2 * BLOCK)
            file.write(tail)
        (made.directory / f"{0:020d}.holes").write_bytes(b"\xff" * 24)  # something to repair
        report = repair(str(spool.path))
        assert report.streams[0].cut_bytes == len(tail)
        spool.assert_whole(made)
    tails = sorted(made.directory.glob("*.tail*"))
    assert [path.name for path in tails] == [f"{6 * BLOCK:020d}.tail.2.aside", f"{6 * BLOCK:020d}.tail.aside"]
    assert [path.read_bytes() for path in tails] == [b"b" * 50, b"a" * 100]


# --- what verify finds


def verified(spool: MadeSpool) -> list[str]:
    names = list_directories(spool.path)
    checks = verify_streams(spool.path, all_streams(spool.path, all_epochs=True), 1)
    found = [finding for check in checks for finding in check.findings]
    return [*check_catalog_pages(spool.path), *found, *check_directories(spool.path, names)]


def rows(*questions: str) -> Damage:
    def change(spool: MadeSpool, _: Made) -> None:
        for question in questions:
            spool.ask(question)

    return change


def a_file(name: str, content: bytes = b"") -> Damage:
    return lambda _, made: (made.directory / name).write_bytes(content)


def pairs_ahead(spool: MadeSpool, made: Made) -> None:
    """An older catalog was brought back."""
    spool.ask("UPDATE stream SET durable = ?", 5 * BLOCK)
    pairs = [(5 * BLOCK + 16, 1), (6 * BLOCK - 16, 2), (6 * BLOCK, 3)]
    made.index(4 * BLOCK).write_bytes(b"".join(INDEX_PAIR.pack(*pair) for pair in pairs))


def contents(spool: MadeSpool) -> set[bytes]:
    """Of all files of streams, without the place that is allocated behind."""
    return {path.read_bytes().rstrip(b"\0") for path in spool.streams.rglob("*") if path.is_file()}


HARMLESS: dict[str, Damage] = {
    "identity": a_file("stream.json", b"garbage"),
    "identity of another": a_file("stream.json", b"{}"),
    "notes of holes": a_file(f"{0:020d}.holes", b"\xff" * 24),
    "time index": lambda _, made: made.index(0).write_bytes(INDEX_PAIR.pack(4 * BLOCK, 1) + INDEX_PAIR.pack(16, 1)),
    "a file of nobody": a_file("notes.txt"),
    "a segment of nobody": a_file(f"{BLOCK:020d}.seg"),
    "an index of nobody": a_file(f"{BLOCK:020d}.idx"),
    "a file where streams are": lambda spool, _: (spool.streams / "notes.txt").write_text(""),
    "a directory of nobody": lambda spool, _: (spool.streams / "stray").mkdir(),
    "a directory with garbage": a_file("../stream.json", b"garbage"),
    "an old catalog": pairs_ahead,
    "an unknown state": rows("UPDATE segment SET state = 'x' WHERE first = 0"),
    "no end": rows(f"UPDATE segment SET end = NULL, state = 'open' WHERE first = {2 * BLOCK}"),
    "an overlap": rows(f"UPDATE segment SET end = {3 * BLOCK} WHERE first = 0"),
    "a segment that is not listed": rows(f"DELETE FROM segment WHERE first = {2 * BLOCK}"),
    "a size of packets": rows("UPDATE stream SET packet_size = 0"),
    "a layout": rows("UPDATE stream SET layout = '{}'"),
    "a first offset": rows("UPDATE stream SET first_offset = durable + 16"),
}


@pytest.mark.parametrize("damage", HARMLESS)
def test_what_verify_finds_without_a_missing_byte_is_mended(spool: MadeSpool, made: Made, damage: str) -> None:
    assert verified(spool) == []
    HARMLESS[damage](spool, made)
    assert len(verified(spool)) >= 1
    before = contents(spool)
    assert repair(str(spool.path)).lost_bytes == 0
    assert verified(spool) == []
    spool.assert_whole(made)
    assert before <= contents(spool), "nothing is deleted"
    assert not repair(str(spool.path)).changed


@pytest.mark.parametrize("lost_catalog", [False, True])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_what_is_missing_is_a_hole_that_verify_passes(
    spool: MadeSpool, made: Made, number: int, lost_catalog: bool
) -> None:
    made.segment(made.firsts[number]).unlink()
    if lost_catalog:
        spool.lose_catalog()
    repair(str(spool.path))
    assert verified(spool) == []
    assert not repair(str(spool.path)).changed


def test_two_holes_at_one_place_become_one(spool: MadeSpool, made: Made) -> None:
    spool.ask("INSERT INTO hole VALUES (1, 0, 64, 'lost'), (1, 32, 96, 'lost')")
    assert verified(spool) == ["holes at 0 and 32 overlap"]
    repair(str(spool.path))
    assert (verified(spool), spool.holes(made)) == ([], [(0, 64, "lost"), (64, 96, "lost")])


def test_a_directory_that_retention_was_about_to_remove_is_no_stream(spool: MadeSpool, made: Made) -> None:
    going = spool.add("going", 3 * BLOCK, seed=2)
    (going.directory / "stream.json").rename(going.directory / "stream.retired")
    spool.ask("DELETE FROM segment WHERE stream = ?", going.record.id)
    spool.ask("DELETE FROM stream WHERE id = ?", going.record.id)
    for lost in (False, True):
        if lost:
            spool.lose_catalog()
        assert repair(str(spool.path), Wishes(packet_size=16)).fine
        spool.assert_whole(made)


def test_what_ext4_makes_beside_the_streams_is_nobody_s_fault(spool: MadeSpool, made: Made) -> None:
    (spool.streams / "lost+found").mkdir()
    assert verified(spool) == []
    assert not repair(str(spool.path)).changed
    assert sorted(os.listdir(spool.streams)) == ["lost+found", made.record.name]


def test_a_stream_that_is_called_like_it_is_found_without_a_catalog(spool: MadeSpool) -> None:
    made = spool.add("lost+found", 3 * BLOCK)
    spool.lose_catalog()
    assert repair(str(spool.path)).fine
    spool.assert_whole(made)


# --- faults


def test_who_may_not_read_a_file_changes_nothing(spool: MadeSpool, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody can read is lost; what only this caller cannot read is not."""
    real = builtins.open

    def refusing(path: Any, *arguments: Any, **keywords: Any) -> Any:
        if str(path) == str(made.segment(0)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, *arguments, **keywords)

    spool.lose_catalog()
    before = files_of(made.directory)
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", refusing)
        with pytest.raises(SpoolError, match="no permission to read"):
            repair(str(spool.path))
    assert (files_of(spool.path), files_of(made.directory)) == (["streams"], before)
    assert repair(str(spool.path)).fine
    spool.assert_whole(made)


def test_a_fault_of_sqlite_is_one_line_and_changes_nothing(
    spool: MadeSpool, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    made.segment(0).unlink()
    before = files_of(made.directory)
    with monkeypatch.context() as patch:
        patch.setattr(repair_module, "_restore", failing)
        with pytest.raises(SpoolError, match="the catalog cannot be read or written: database or disk is full"):
            said(spool)
    assert before == files_of(made.directory)
    assert repair(str(spool.path)).lost_bytes == 2 * BLOCK


# --- killed midway


class Killed(BaseException):
    """Stands for a SIGKILL at the place where it is raised."""


def lose_all(spool: MadeSpool, _: Made) -> None:
    spool.lose_catalog()


def write_over_the_catalog(spool: MadeSpool, _: Made) -> None:
    (spool.path / "catalog.sqlite").write_bytes(b"garbage" * 1000)


def write_behind_the_end(spool: MadeSpool, made: Made) -> None:
    write_over_the_catalog(spool, made)
    with made.segment(4 * BLOCK).open("r+b") as file:
        file.seek(3 * BLOCK + 8)
        file.write(b"x" * 8)


STEPS = [
    (repair_module, "_copy_tail"),
    (repair_module.os, "truncate"),
    (repair_module.filesystem, "sync_directory"),
    (repair_module.repair_swap, "swap"),
    (repair_swap, "_rename"),
    (repair_swap.os, "rename"),
]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("owner", "method"), STEPS, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("damage", [lose_all, write_over_the_catalog, write_behind_the_end])
def test_a_repair_that_is_killed_is_mended_by_the_next(
    spool: MadeSpool,
    made: Made,
    monkeypatch: pytest.MonkeyPatch,
    damage: Damage,
    owner: object,
    method: str,
    after: bool,
) -> None:
    other = spool.add("peer", 3 * BLOCK, seed=2, named=False)
    damage(spool, made)
    real = getattr(owner, method)

    def dying(*arguments: object, **keywords: object) -> object:
        if after:
            real(*arguments, **keywords)
        raise Killed

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(owner, method, dying)
            patch.setattr(repair_swap, "end", lambda _place: None)
            with contextlib.suppress(Killed):
                repair(str(spool.path))
    report = repair(str(spool.path))
    assert report.fine
    spool.assert_whole(made, other)
    assert not repair(str(spool.path)).changed
    assert not (spool.path / ".repair").exists()
