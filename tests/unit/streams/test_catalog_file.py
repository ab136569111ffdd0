"""Opening the catalog: running, stopped, crashed, copied, damaged, forbidden."""

from __future__ import annotations

import os
import shutil
import sqlite3
from pathlib import Path

import pytest
from spool_writer import SpoolWriter, noise

from mpserverd.errors import DamageError, LayoutError, SpoolError
from mpserverd.streams import list_streams, open_stream
from mpserverd.streams.catalog_file import ask

NO_FAMILY = ("catalog.sqlite-wal", "catalog.sqlite-shm")


def as_nobody(question: str, spool: Path) -> str:
    """What a process without rights answers: the names of the streams, or the error."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        answer = "?"
        try:
            os.setgid(65534)
            os.setuid(65534)
            answer = ",".join(info.name for info in list_streams(spool)) if question == "names" else ""
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        finally:
            os.write(writer, answer.encode())
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = pipe.read().decode()
    os.waitpid(child, 0)
    return answer


def crashed_copy(spool: SpoolWriter, target: Path) -> None:
    """What a kill -9 of the storer leaves: the catalog and a -wal with the latest commits."""
    shutil.copytree(spool.path, target)
    assert (target / "catalog.sqlite-wal").stat().st_size > 0
    (target / "catalog.sqlite-shm").unlink()


def open_to_all(path: Path, *, writable: bool) -> None:
    for directory in (path.parent.parent, path.parent, path):
        directory.chmod(0o755)
    path.chmod(0o777 if writable else 0o555)
    for file in path.iterdir():
        file.chmod(0o755 if file.is_dir() else 0o444)


def test_a_running_writer_is_read_through_its_log(spool: SpoolWriter) -> None:
    spool.add("a", b"")
    assert (spool.path / "catalog.sqlite-wal").stat().st_size > 0
    assert [info.name for info in list_streams(spool.path)] == ["a"]


def test_an_open_transaction_of_the_writer_neither_blocks_nor_shows(spool: SpoolWriter) -> None:
    spool.add("a", b"")
    spool.catalog.execute("BEGIN IMMEDIATE")
    spool.catalog.execute("UPDATE stream SET name = 'b'")
    assert [info.name for info in list_streams(spool.path)] == ["a"]
    spool.catalog.execute("COMMIT")
    assert [info.name for info in list_streams(spool.path)] == ["b"]


def test_reading_leaves_nothing_in_a_stopped_spool(spool: SpoolWriter) -> None:
    spool.add("a", noise(160))
    spool.close()
    before = sorted(os.listdir(spool.path))
    with open_stream("a", spool=spool.path) as stream:
        assert stream.count == 10
        stream.refresh()
    assert sorted(os.listdir(spool.path)) == before == ["catalog.sqlite", "streams"]


def test_an_open_stream_does_not_keep_the_writer_from_closing_cleanly(spool: SpoolWriter) -> None:
    spool.add("a", noise(160))
    with open_stream("a", spool=spool.path) as stream:
        spool.close()
        assert not any((spool.path / name).exists() for name in NO_FAMILY)
        assert not stream.refresh()


def test_the_log_of_a_crashed_writer_is_read(spool: SpoolWriter, tmp_path: Path) -> None:
    spool.add("a", b"")
    crashed_copy(spool, tmp_path / "copy")
    assert [info.name for info in list_streams(tmp_path / "copy")] == ["a"]


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody without rights")
@pytest.mark.parametrize("state", ["running", "stopped", "crashed"])
def test_somebody_who_may_only_read_can_read(spool: SpoolWriter, tmp_path: Path, state: str) -> None:
    spool.add("a", b"")
    path = spool.path
    if state == "stopped":
        spool.close()
    if state == "crashed":
        path = tmp_path / "copy"
        crashed_copy(spool, path)
    tmp_path.parent.parent.chmod(0o755)
    open_to_all(path, writable=False)
    before = sorted(os.listdir(path))
    assert as_nobody("names", path) == "a"
    assert sorted(os.listdir(path)) == before


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody without rights")
def test_no_permission_is_one_clear_line(spool: SpoolWriter, tmp_path: Path) -> None:
    spool.add("a", b"")
    tmp_path.parent.parent.chmod(0o755)
    open_to_all(spool.path, writable=False)
    (spool.path / "catalog.sqlite").chmod(0o600)
    assert as_nobody("names", spool.path).startswith("SpoolError: no permission to read")


def test_a_change_during_an_immutable_read_is_read_again(spool: SpoolWriter) -> None:
    spool.add("a", b"")
    spool.close()
    looks: list[str] = []

    def question(connection: sqlite3.Connection) -> str:
        found = str(connection.execute("SELECT name FROM stream").fetchone()[0])
        if not looks:
            with sqlite3.connect(spool.path / "catalog.sqlite") as writer:
                writer.execute("UPDATE stream SET name = 'b'")
            writer.close()
        looks.append(found)
        return found

    assert ask(spool.path, question) == "b"
    assert looks == ["a", "b"]


@pytest.fixture
def locked(spool: SpoolWriter, monkeypatch: pytest.MonkeyPatch) -> SpoolWriter:
    """A catalog that its writer keeps for itself, as in a recovery; readers do not wait inside SQLite."""
    spool.add("a", b"")
    spool.close()
    spool.catalog = sqlite3.connect(spool.path / "catalog.sqlite", isolation_level=None)
    spool.catalog.execute("PRAGMA locking_mode = EXCLUSIVE")
    spool.catalog.execute("UPDATE stream SET name = 'b'")
    monkeypatch.setattr("mpserverd.streams.catalog_file.BUSY_TIMEOUT_S", 0)
    return spool


def test_a_catalog_locked_for_a_moment_is_waited_for(locked: SpoolWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    def release(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            locked.close()

    monkeypatch.setattr("mpserverd.streams.catalog_file.time.sleep", release)
    assert [info.name for info in list_streams(locked.path)] == ["b"]
    assert len(pauses) == 3


def test_a_catalog_that_stays_locked_is_given_up(locked: SpoolWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("mpserverd.streams.catalog_file.time.sleep", pauses.append)
    with pytest.raises(SpoolError, match="locked"):
        list_streams(locked.path)
    assert len(pauses) == 19


def test_another_layout_version_is_refused(tmp_path: Path) -> None:
    with SpoolWriter(tmp_path / "spool", version="2") as spool, pytest.raises(LayoutError, match="layout version 2"):
        list_streams(spool.path)


def test_what_is_no_spool_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(SpoolError, match="there is no spool at"):
        list_streams(tmp_path / "nowhere")
    with pytest.raises(SpoolError, match="is not a spool"):
        list_streams(tmp_path)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(SpoolError, match="is not a directory"):
        list_streams(file)


def test_a_catalog_that_is_none_is_damage(tmp_path: Path) -> None:
    (tmp_path / "catalog.sqlite").write_bytes(b"this is not a database, by any measure" * 100)
    with pytest.raises(DamageError, match="cannot be read"):
        list_streams(tmp_path)
    (tmp_path / "catalog.sqlite").unlink()
    sqlite3.connect(tmp_path / "catalog.sqlite").close()
    with pytest.raises(DamageError, match="is not a catalog of mpserverd"):
        list_streams(tmp_path)


def test_a_fault_in_a_catalog_that_somebody_changed_meanwhile_is_no_damage(spool: SpoolWriter) -> None:
    """Pages of two states do not fit together; a daemon that starts makes them so."""
    spool.close()
    answers = iter([sqlite3.DatabaseError("database disk image is malformed"), 7])

    def question(_: sqlite3.Connection) -> int:
        answer = next(answers)
        if isinstance(answer, Exception):
            os.utime(spool.path / "catalog.sqlite")
            raise answer
        return answer

    assert ask(spool.path, question) == 7


def test_odd_characters_in_the_path_are_no_options(tmp_path: Path) -> None:
    with SpoolWriter(tmp_path / "a ?mode=rw#%41") as spool:
        spool.add("a", b"")
        assert [info.name for info in list_streams(spool.path)] == ["a"]
