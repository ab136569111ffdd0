"""Whatever is wrong with one stream's files stops that stream, and says so; everybody else is stored."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator

import pytest

from mpserverd.arena.state import Str, StreamState
from mpserverd.net.channel import Channel
from mpserverd.storer import store as store_module
from mpserverd.storer.advice import advice
from tests.unit.storer.conftest import RigMaker
from tests.unit.storer.rig import Rig

FIRST = "00000000000000000000"
NOBODY = 65534
SEGMENT = 64 << 10

Breakage = Callable[[pathlib.Path], None]


def file_in_its_place(directory: pathlib.Path) -> None:
    shutil.rmtree(directory)
    directory.write_text("what is this?")


def link_to_nowhere(directory: pathlib.Path) -> None:
    shutil.rmtree(directory)
    directory.symlink_to("not-mounted")


def directory_as_segment(directory: pathlib.Path) -> None:
    (directory / f"{FIRST}.seg").unlink()
    (directory / f"{FIRST}.seg").mkdir()


def circular_link(directory: pathlib.Path) -> None:
    shutil.rmtree(directory)
    directory.symlink_to(directory)


def directory_of_root(directory: pathlib.Path) -> None:
    os.chown(directory, 0, 0)
    directory.chmod(0o700)


def directory_read_only(directory: pathlib.Path) -> None:
    os.chown(directory, 0, 0)
    directory.chmod(0o755)


def segment_of_root(directory: pathlib.Path) -> None:
    os.chown(directory / f"{FIRST}.seg", 0, 0)


def told(rig: Rig) -> list[str]:
    return [message.payload["text"] for message in rig.desk.outbox if message.payload and "text" in message.payload]


def assert_only_it_stops(rig: Rig, break_it: Breakage) -> str:
    """Stream "one" is stored, put away and broken; a successor starts, and both names come back. Returns what is said
    of it."""
    for name, seed in (("one", 1), ("other", 2)):
        client = rig.named(name, seed=seed)
        client.send(1600)
        client.end()
    rig.steps(2)
    with as_root():
        break_it(rig.spool / "streams" / "one")
    rig.restart()
    one, other = rig.named("one", seed=3), rig.named("other", seed=2)
    assert (one.sent, other.sent) == (0, 1600)
    one.send(160)
    other.send(160)
    rig.steps(2)
    rig.assert_stored(one)
    rig.assert_stored(other)
    names = [str(row[0]) for row in rig.ask("SELECT directory FROM stream WHERE name = 'one' ORDER BY id")]
    assert names[0] == "one"
    assert names[1].startswith("one@")
    text = next(text for text in told(rig) if text.startswith("stream stopped"))
    assert str(rig.spool / "streams" / "one") in text
    rig.restart()
    assert one.word(Str.DURABLE) == 160
    for client in (one, other):
        client.end()
    rig.steps(2)
    assert one.state() is other.state() is StreamState.FREE
    assert rig.named("one").sent == 160, "it goes on in its new epoch"
    return text


@contextlib.contextmanager
def as_root() -> Iterator[None]:
    before = os.geteuid()
    os.seteuid(os.getuid())
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.mark.parametrize("break_it", [file_in_its_place, link_to_nowhere, circular_link, directory_as_segment])
def test_a_stream_with_something_else_in_the_place_of_its_files_goes_on_in_a_new_epoch(
    rig: Rig, break_it: Breakage
) -> None:
    assert_only_it_stops(rig, break_it)


@pytest.fixture
def rig_of_nobody() -> Iterator[Rig]:
    """The test runs as a user who may not everything, in a directory of his own."""
    if os.getuid() != 0:
        pytest.skip("taking permissions away needs root")
    with tempfile.TemporaryDirectory() as place:
        os.chown(place, NOBODY, NOBODY)
        os.seteuid(NOBODY)
        try:
            rig = Rig(pathlib.Path(place))
            try:
                yield rig
            finally:
                rig.close()
        finally:
            os.seteuid(0)


@pytest.mark.root
@pytest.mark.parametrize("break_it", [directory_of_root, directory_read_only, segment_of_root])
def test_a_stream_without_permission_for_its_files_goes_on_in_a_new_epoch(
    rig_of_nobody: Rig, break_it: Breakage
) -> None:
    assert "chown -R nobody: " in assert_only_it_stops(rig_of_nobody, break_it)


@pytest.mark.root
def test_a_live_stream_without_permission_waits_loses_nothing_and_goes_on_when_it_has_it(rig_of_nobody: Rig) -> None:
    rig = rig_of_nobody
    one, other = rig.fresh("one"), rig.fresh("other")
    for client in (one, other):
        client.send(1600)
    rig.step()
    directory = rig.spool / "streams" / "one"
    with as_root():
        directory_of_root(directory)
    rig.restart()
    for client in (one, other):
        client.send(1600)
        client.leave()
    rig.steps(5)
    assert (one.word(Str.DURABLE), one.state()) == (1600, StreamState.DRAINING)
    assert other.state() is StreamState.FREE
    rig.assert_stored(other, "other")
    assert any(text.startswith("write failed") and f"chown -R nobody: {directory}" in text for text in told(rig))
    with as_root():
        os.chown(directory, NOBODY, NOBODY)
    rig.steps(60)
    assert one.state() is StreamState.FREE
    rig.assert_stored(one, "one")


def test_a_live_stream_whose_directory_became_a_file_goes_on_beside_after_a_restart(rig: Rig) -> None:
    one, other = rig.fresh("one"), rig.fresh("other")
    for client in (one, other):
        client.send(1600)
    rig.step()
    file_in_its_place(rig.spool / "streams" / "one")
    rig.restart()
    for client in (one, other):
        client.send(1600)
    rig.step()
    assert one.word(Str.DURABLE) == other.word(Str.DURABLE) == 3200
    assert (rig.spool / "streams" / "one.aside").read_text() == "what is this?"
    rig.assert_stored(other)


def test_a_directory_that_vanishes_under_a_live_stream_is_made_again(rig: Rig) -> None:
    one, other = rig.fresh("one"), rig.fresh("other")
    for client in (one, other):
        client.send(SEGMENT - 160)
    rig.step()
    shutil.rmtree(rig.spool / "streams" / "one")
    for client in (one, other):
        client.send(1600)
    rig.steps(8)
    assert one.word(Str.DURABLE) == one.sent
    rig.assert_stored(other)


@pytest.mark.parametrize("failing", ["rename", "unlink", "listdir"])
def test_recovery_says_what_it_cannot_do_and_starts(rig: Rig, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    client = rig.fresh("peer")
    client.send(1600)
    rig.step()
    streams = rig.spool / "streams"
    (streams / "stranger").mkdir()
    (streams / "peer" / "notes.txt").write_text("x")
    (streams / "peer" / f"{'9' * 20}.new").mkdir()

    def refuse(path: str, *_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), path)

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, refuse)
        rig.restart()
    assert any("chown" in text for text in told(rig))
    client.send(1600)
    rig.step()
    rig.assert_stored(client)


def test_a_failed_file_that_cannot_be_renamed_is_not_written_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    one = rig.fresh("one", 1)
    one.send(5000)
    path = str(rig.spool / "streams" / "one" / f"{FIRST}.seg")
    real_sync, real_rename, synced = os.fdatasync, os.rename, []

    def fail_first(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        synced.append(name)
        if synced.count(path) == 1 and name == path:
            raise OSError(errno.EIO, "Input/output error")
        real_sync(descriptor)

    def refuse(old: str, new: str) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), old)

    monkeypatch.setattr(os, "fdatasync", fail_first)
    monkeypatch.setattr(os, "rename", refuse)
    other = rig.fresh("other", 1)
    rig.steps(8)
    other.send(5000)
    rig.steps(8)
    assert synced.count(path) == 1
    assert one.word(Str.DURABLE) == 0
    rig.assert_stored(other)
    monkeypatch.setattr(os, "rename", real_rename)
    rig.steps(80)
    rig.assert_stored(one)
    assert f"one/{FIRST}.seg.aside" in rig.files()


def test_a_stream_whose_early_file_cannot_be_removed_ends_all_the_same(
    make_rig: RigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig()
    clients = [rig.fresh(name) for name in ("one", "other")]
    for client in clients:
        client.send(SEGMENT - 1600)
    rig.step()
    rig.store.tick(rig.now_s)
    assert len(rig.files("**/*.new")) == 2

    def refuse(path: str, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        for client in clients:
            client.end()
        rig.steps(2)
    assert {client.state() for client in clients} == {StreamState.FREE}
    rig.restart()
    assert rig.files("**/*.new") == []


def test_files_are_made_early_for_the_others_when_one_stream_cannot(make_rig: RigMaker) -> None:
    rig = make_rig()
    clients = [rig.fresh(name) for name in ("one", "other")]
    for client in clients:
        client.send(SEGMENT - 1600)
    rig.step()
    file_in_its_place(rig.spool / "streams" / "one")
    rig.store.tick(rig.now_s)
    assert rig.files("**/*.new") == ["other/00000000000000065536.new"]


def test_segments_that_cannot_be_read_do_not_keep_the_others_from_their_checksum(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "SUMS_AHEAD", 1)
    for name in ("one", "other"):
        client = rig.fresh(name)
        client.send_all(SEGMENT)
        client.end()
        rig.steps(2)
    file_in_its_place(rig.spool / "streams" / "one")
    question = "SELECT count(*) FROM segment WHERE sha256 IS NOT NULL"
    deadline = time.monotonic() + 5
    while not rig.one(question):
        assert time.monotonic() < deadline
        rig.store.tick(rig.now_s)
        time.sleep(0.005)
    assert len(rig.store.background.unreadable) == 1


def test_retention_never_removes_a_file_in_the_place_of_a_directory(make_rig: RigMaker) -> None:
    rig = make_rig(max_age_s=1.0)
    client = rig.fresh("one")
    client.send(1600)
    client.end()
    rig.steps(2)
    file_in_its_place(rig.spool / "streams" / "one")
    rig.store.retention.apply(rig.now_s, time.time_ns() + 2_000_000_000)
    while rig.desk.to_unlink:
        rig.store.background.unlink(*rig.desk.to_unlink.popleft())
    deadline = time.monotonic() + 5
    while rig.store.background._paths:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert rig.one("SELECT count(*) FROM stream") == 0
    assert rig.files() == ["one"]


def test_a_long_and_odd_path_still_fits_into_the_message_to_the_supervisor(rig: Rig) -> None:
    streams = os.fsencode(rig.spool / "streams")
    os.mkdir(streams + b"/" + b"\xff" * 200)
    os.mkdir(streams + b"/" + b"\xf0\x9f\x8c\x8d" * 50)
    os.mkdir(streams + b"/line\nbreak")
    rig.restart()
    rig.desk.note(logging.getLogger(), logging.INFO, "long", file="\U0001f30d" * 3000)
    ours, theirs = (Channel(end) for end in Channel.pair())
    try:
        for message in rig.desk.outbox:
            assert ours.send(message)
            assert theirs.receive() == message
    finally:
        ours.close()
        theirs.close()


def test_an_error_is_told_with_its_path_and_the_next_step() -> None:
    assert advice(PermissionError(13, "Permission denied", "/x")).startswith(
        "/x: Permission denied; give it to the user of the service: chown -R "
    )
    assert advice(NotADirectoryError(20, "Not a directory", "/x")).endswith("move it away")
    assert advice(OSError(5, "Input/output error")) == "Input/output error; the disk fails; look into the kernel's log"
    assert advice(OSError(99, "Odd")) == "Odd"
