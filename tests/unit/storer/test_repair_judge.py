"""What a stream is, judged from its files and from what the catalog says of it."""

from __future__ import annotations

import os
import pathlib

import pytest

from mpserverd.storer.repair import repair
from tests.unit.storer.made_spool import BLOCK, MadeSpool, files_of


@pytest.fixture
def spool(tmp_path: pathlib.Path) -> MadeSpool:
    return MadeSpool(tmp_path / "spool")


# --- files that the catalog does not list


@pytest.mark.parametrize("beside", ["", "a later segment"])
def test_a_stale_file_within_a_listed_segment_never_takes_its_bytes(spool: MadeSpool, beside: str) -> None:
    """A storer was killed between making a segment and its commit; its successor reopened the one before with a larger
    limit, and wrote past the place where that had begun."""
    made = spool.add("press-7", 6 * BLOCK, cuts=[4 * BLOCK] if beside else [])
    stale = made.segment(2 * BLOCK)
    stale.write_bytes(b"")
    os.truncate(stale, 2 * BLOCK)
    report = repair(str(spool.path))
    assert report.fine
    spool.assert_whole(made)
    assert report.set_aside == [f"{stale}.aside"]
    assert "lies within another" in report.streams[0].notes[0]
    assert not repair(str(spool.path)).changed


def test_a_file_that_was_begun_and_not_committed_is_set_aside(spool: MadeSpool) -> None:
    made = spool.add("press-7", 6 * BLOCK, cuts=[4 * BLOCK])
    made.segment(6 * BLOCK).write_bytes(b"x" * 100)
    report = repair(str(spool.path))
    assert report.fine
    assert report.streams[0].cut_bytes == 100
    spool.assert_whole(made)
    assert f"{made.segment(6 * BLOCK).name}.aside" in files_of(made.directory)
