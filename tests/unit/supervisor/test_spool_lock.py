"""One daemon a spool."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mpserverd.errors import StartError
from mpserverd.supervisor import spool_lock
from mpserverd.supervisor.spool_lock import lock_holders, try_lock_spool


def test_a_second_daemon_is_refused_with_the_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_lock, "WAIT_S", 0.0)
    fd = try_lock_spool(str(tmp_path))
    try:
        with pytest.raises(StartError, match=rf"{tmp_path} is in use by pid {os.getpid()}"):
            try_lock_spool(str(tmp_path))
        assert lock_holders(fd) == [os.getpid()]
    finally:
        os.close(fd)


def test_the_lock_lives_as_long_as_anybody_who_inherited_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_lock, "WAIT_S", 0.0)
    fd = try_lock_spool(str(tmp_path))
    inherited = os.dup(fd)
    os.close(fd)
    with pytest.raises(StartError):
        try_lock_spool(str(tmp_path))
    os.close(inherited)
    os.close(try_lock_spool(str(tmp_path)))


def test_a_directory_that_is_not_there_is_made(tmp_path: Path) -> None:
    os.close(try_lock_spool(str(tmp_path / "a" / "b")))
    assert (tmp_path / "a" / "b").is_dir()


def test_what_cannot_be_opened_is_left_to_the_storer_to_explain(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert try_lock_spool(str(tmp_path / "file")) == -1
    assert try_lock_spool(str(tmp_path / "file" / "below")) == -1
