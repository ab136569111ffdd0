"""The oldest segments go, whole ones only, committed before they are unlinked, and the books stay right."""

from __future__ import annotations

import ipaddress
import os
import pathlib
import sqlite3
import threading
import time
from collections.abc import Callable

import pytest

from mpserverd.arena.counters import NEVER_S
from mpserverd.arena.state import Gone, Str, StreamFlag, StreamState
from mpserverd.config.schema import ClientConfig
from mpserverd.storer import sidecar
from mpserverd.storer.failures import FULL_OVER_S
from mpserverd.storer.segment_file import segment_name
from mpserverd.streams.sidecar import IDENTITY_FILE, RETIRED_FILE
from tests.unit.storer.conftest import RigMaker
from tests.unit.storer.rig import CHUNK, Rig, content

SEGMENT = 16 << 10


def tick(rig: Rig) -> None:
    """One second's housekeeping, and the unlinking that it starts."""
    rig.store.tick(rig.now_s)
    wait_until(lambda: not rig.store.background._paths)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def seg_files(rig: Rig) -> list[str]:
    return [name for name in rig.files() if name.endswith(".seg")]


def test_a_stream_keeps_its_newest_segments(make_rig: RigMaker) -> None:
    rig = make_rig(segment_bytes=SEGMENT, max_bytes_per_stream=3 * SEGMENT)
    client = rig.fresh("peer", 16)
    client.send_all(10 * SEGMENT + 160)
    rig.steps(2)
    tick(rig)
    first = client.word(Str.FIRST_OFFSET)
    assert client.sent - first <= 3 * SEGMENT
    assert first == rig.one("SELECT first_offset FROM stream") == client.word(Str.RETIRED) == 8 * SEGMENT
    assert rig.one("SELECT min(first) FROM segment") == first
    wait_until(lambda: len(seg_files(rig)) == 3)
    assert rig.stored("peer") == content(client.seed, 0, client.sent)[first:]
    client.end()
    rig.steps(2)
    assert rig.gone(Gone.RETIRED_BYTES) == first
    assert rig.counter("segments_retired") == 8
    rig.restart()
    assert rig.gone(Gone.RETIRED_BYTES) == first
    assert rig.gone(Gone.DURABLE_BYTES) == client.sent


def test_a_catalog_that_cannot_be_read_now_is_looked_at_again(
    make_rig: RigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig(segment_bytes=SEGMENT, max_bytes_per_stream=3 * SEGMENT)
    client = rig.fresh("peer", 16)
    client.send_all(10 * SEGMENT)
    rig.steps(2)
    before = client.word(Str.FIRST_OFFSET)

    def fail(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as patch:
        for name in ("streams", "finished_segments", "segments"):
            patch.setattr(rig.desk.catalog, name, fail)
        rig.store.tick(rig.now_s)
    assert client.word(Str.FIRST_OFFSET) == before
    tick(rig)
    assert client.sent - client.word(Str.FIRST_OFFSET) <= 3 * SEGMENT


def test_a_client_may_have_a_limit_of_its_own(make_rig: RigMaker) -> None:
    client_config = ClientConfig(id="one", address=ipaddress.ip_network("192.0.2.1"), max_spool_bytes=2 * SEGMENT)
    rig = make_rig(segment_bytes=SEGMENT, clients=(client_config,), max_bytes_per_stream=6 * SEGMENT)
    one, two = rig.named("one"), rig.named("two", seed=2)
    one.send_all(10 * SEGMENT)
    two.send_all(10 * SEGMENT)
    rig.steps(2)
    tick(rig)
    assert one.word(Str.FIRST_OFFSET) == 8 * SEGMENT
    assert two.word(Str.FIRST_OFFSET) == 4 * SEGMENT


def test_the_spool_stays_within_its_limit_oldest_first(make_rig: RigMaker) -> None:
    rig = make_rig(segment_bytes=SEGMENT, max_bytes=8 * SEGMENT)
    old, new = rig.named("old"), rig.named("new", seed=2)
    old.send_all(6 * SEGMENT)
    rig.steps(2)
    new.send_all(6 * SEGMENT)
    rig.steps(2)
    tick(rig)
    assert rig.store.retention.spool_bytes() <= 8 * SEGMENT
    assert old.word(Str.FIRST_OFFSET) == 4 * SEGMENT
    assert new.word(Str.FIRST_OFFSET) == 0
    assert rig.counter("spool_bytes") == rig.store.retention.spool_bytes() == 8 * SEGMENT


def test_the_segment_that_is_written_stays(make_rig: RigMaker) -> None:
    rig = make_rig(segment_bytes=1 << 20, max_bytes=1 << 20)
    client = rig.fresh("peer")
    client.send(16 * 1000)
    rig.step()
    rig.desk.resting_bytes = 1 << 40
    tick(rig)
    assert client.word(Str.FIRST_OFFSET) == 0
    rig.assert_stored(client)


def test_a_stream_that_left_goes_wholly_but_its_totals_stay(make_rig: RigMaker) -> None:
    rig = make_rig(segment_bytes=SEGMENT, max_age_s=1.0)
    gone, named = rig.fresh("peer", 16), rig.named("one", 16, seed=2)
    for client in (gone, named):
        client.send_all(3 * SEGMENT + 320)
        client.receive(3)
        client.end()
    rig.steps(3)
    totals = [rig.gone(word) for word in range(Gone.COUNT)]
    rig.store.retention.apply(rig.now_s, time.time_ns() + 2_000_000_000)
    tick(rig)
    assert rig.ask("SELECT name, first_offset, durable, retired FROM stream") == [
        ("one", named.sent, named.sent, named.sent)
    ]
    assert rig.one("SELECT count(*) FROM segment") == 0
    totals[Gone.RETIRED_BYTES] = gone.sent + named.sent
    assert [rig.gone(word) for word in range(Gone.COUNT)] == totals
    wait_until(lambda: rig.files() == [])
    wait_until(lambda: not (rig.spool / "streams" / "peer").exists())
    rig.restart()
    assert [rig.gone(word) for word in range(Gone.COUNT)] == totals
    again = rig.named("one", 16, seed=2)
    assert again.word(Str.POSITION) == again.word(Str.FIRST_OFFSET) == named.sent
    again.send_all(2 * SEGMENT)
    rig.steps(2)
    assert rig.stored("one") == content(2, named.sent, again.sent)


def retired_whole(make_rig: RigMaker) -> Rig:
    """A stream without a name of its own left, and is old; its row is gone, its files are not."""
    rig = make_rig(segment_bytes=SEGMENT, max_age_s=1.0)
    client = rig.fresh("peer", 16)
    client.send_all(3 * SEGMENT + 320)
    client.end()
    rig.steps(3)
    rig.store.retention.apply(rig.now_s, time.time_ns() + 2_000_000_000)
    assert rig.one("SELECT count(*) FROM stream") == 0
    assert len(seg_files(rig)) == 4
    return rig


def directories(rig: Rig) -> list[str]:
    return sorted(path.name for path in (rig.spool / "streams").iterdir())


def test_a_stream_that_was_given_up_wholly_is_removed_by_the_successor_of_a_killed_storer(make_rig: RigMaker) -> None:
    rig = retired_whole(make_rig)
    rig.restart()
    assert directories(rig) == []
    assert not rig.desk.outbox


def test_a_stream_that_was_given_up_wholly_is_removed_before_a_stop(make_rig: RigMaker) -> None:
    rig = retired_whole(make_rig)
    assert rig.store.put_everything_away()
    assert directories(rig) == []
    rig.restart()
    assert not rig.desk.outbox


@pytest.mark.parametrize("has_identity", [False, True])
def test_a_stream_that_was_given_up_wholly_is_removed_whatever_became_of_its_identity(
    make_rig: RigMaker, has_identity: bool
) -> None:
    """An older version wrote none; or it could not be renamed when its stream was given up."""
    rig = retired_whole(make_rig)
    retired = rig.spool / "streams" / "peer" / RETIRED_FILE
    if has_identity:
        retired.rename(retired.with_name(IDENTITY_FILE))
    else:
        retired.unlink()
    tick(rig)
    assert directories(rig) == []


def test_what_was_set_aside_in_a_stream_that_was_given_up_stays(make_rig: RigMaker) -> None:
    rig = retired_whole(make_rig)
    kept = rig.spool / "streams" / "peer" / "00000000000000000000.seg.2.aside"
    kept.write_bytes(b"x")
    for _ in range(2):
        rig.restart()
        assert kept.read_bytes() == b"x"
        assert seg_files(rig) == []
        assert not rig.desk.outbox


def test_a_stream_whose_row_did_not_go_keeps_its_identity(make_rig: RigMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed right before the commit."""
    rig = make_rig(segment_bytes=SEGMENT, max_age_s=1.0)
    client = rig.fresh("peer", 16)
    client.send_all(3 * SEGMENT)
    client.end()
    rig.steps(3)
    identity = (rig.spool / "streams" / "peer" / IDENTITY_FILE).read_bytes()

    def fail(_: int) -> None:
        raise sqlite3.OperationalError("killed here")

    real = sidecar.retire
    with monkeypatch.context() as patch:
        patch.setattr(sidecar, "retire", lambda directory: (real(directory), fail(0)))
        rig.store.retention.apply(rig.now_s, time.time_ns() + 2_000_000_000)
    assert not (rig.spool / "streams" / "peer" / IDENTITY_FILE).exists()
    rig.restart()
    assert (rig.spool / "streams" / "peer" / IDENTITY_FILE).read_bytes() == identity
    rig.assert_stored(client, "peer")


def test_a_kill_between_commit_and_unlink_leaves_no_file_behind(make_rig: RigMaker) -> None:
    rig = make_rig(segment_bytes=SEGMENT, max_bytes_per_stream=2 * SEGMENT)
    client = rig.named("one")
    client.send_all(5 * SEGMENT)
    rig.steps(2)
    assert rig.store.retention.apply(rig.now_s, time.time_ns()) == 3 * SEGMENT
    assert len(seg_files(rig)) == 5
    rig.desk.to_unlink.clear()
    rig.restart()
    assert len(seg_files(rig)) == 2
    assert client.word(Str.FIRST_OFFSET) == 3 * SEGMENT
    client.send(160)
    rig.step()


def test_holes_in_retired_segments_are_not_counted_as_retired(make_rig: RigMaker) -> None:
    rig = make_rig(chunks=12, segment_bytes=4 * CHUNK, max_bytes_per_stream=4 * CHUNK)
    client = rig.fresh("peer", 16, StreamFlag.STORE | StreamFlag.DROP_OLDEST)
    for _ in range(40):
        client.receive(CHUNK)
        client.offer()
        client.window.drop_oldest()
    client.receive(1600)
    client.offer()
    rig.steps(2)
    client.end()
    rig.steps(4)
    assert client.state() is StreamState.FREE
    assert rig.gone(Gone.DROPPED_BYTES)
    rig.store.retention.apply(rig.now_s + 100, time.time_ns())
    first = int(str(rig.one("SELECT first_offset FROM stream")))
    assert first
    left = int(str(rig.one("SELECT coalesce(sum(end - max(first, ?)), 0) FROM hole WHERE end > ?", first, first)))
    assert rig.gone(Gone.DURABLE_BYTES) - rig.gone(Gone.RETIRED_BYTES) == client.sent - first - left


def test_disk_space_that_must_stay_free_is_made_by_retention(make_rig: RigMaker, tmp_path: pathlib.Path) -> None:
    rig = make_rig(segment_bytes=SEGMENT)
    client = rig.fresh("peer")
    client.send_all(8 * SEGMENT)
    rig.steps(2)
    rig.desk.space.min_free_bytes = rig.desk.space.free_bytes + 2 * SEGMENT
    rig.desk.space.measure = lambda: None  # type: ignore[method-assign]
    tick(rig)
    assert client.word(Str.FIRST_OFFSET) >= 2 * SEGMENT


def test_nothing_is_given_up_for_free_space_that_all_of_it_could_not_make(make_rig: RigMaker) -> None:
    """A stranger has the disk, or somebody mistyped: the disk is full, once, and what is stored stays."""
    rig = make_rig(segment_bytes=SEGMENT)
    client = rig.named("one")
    client.send_all(8 * SEGMENT)
    rig.steps(2)
    rig.desk.space.min_free_bytes = 1 << 50
    for _ in range(3):
        tick(rig)
    assert client.word(Str.FIRST_OFFSET) == 0
    assert rig.counter("full") == 1
    client.send(1600)
    rig.steps(2)
    rig.assert_stored(client, upto=8 * SEGMENT)
    rig.desk.space.min_free_bytes = 0
    rig.steps(6)
    rig.assert_stored(client)
    rig.store.failures._refused_s -= FULL_OVER_S
    tick(rig)
    events = [message.payload["event"] for message in rig.desk.outbox if message.payload]
    assert events == ["spool full: nothing more is stored", "spool has room again"]


def test_what_is_being_unlinked_is_not_made_up_for_with_more(make_rig: RigMaker) -> None:
    """Unlinking may take longer than a second."""
    rig = make_rig(segment_bytes=SEGMENT)
    client = rig.fresh("peer")
    client.send_all(8 * SEGMENT)
    rig.steps(2)
    rig.desk.space.min_free_bytes = rig.desk.space.free_bytes + 2 * SEGMENT
    rig.desk.space.measure = lambda: None  # type: ignore[method-assign]
    rig.desk.space.look = lambda: None  # type: ignore[method-assign]
    for _ in range(3):
        rig.store.retention.apply(rig.now_s, time.time_ns())
    assert client.word(Str.FIRST_OFFSET) == 2 * SEGMENT


def test_what_is_unlinked_is_free_and_leaving_no_more(make_rig: RigMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would count twice for as long as some file is left to unlink, and too little would be retired."""
    rig = make_rig(segment_bytes=SEGMENT)
    client = rig.fresh("peer")
    client.send_all(8 * SEGMENT)
    rig.steps(2)
    space, real, go = rig.desk.space, os.unlink, threading.Event()

    def unlink(path: str) -> None:
        if path.endswith(segment_name(SEGMENT)):
            assert go.wait(10)
        real(path)

    monkeypatch.setattr(os, "unlink", unlink)
    space.min_free_bytes = space.free_bytes + 2 * SEGMENT
    with monkeypatch.context() as patch:
        patch.setattr(space, "look", lambda: None)
        rig.store.tick(rig.now_s)
    space.min_free_bytes = 0
    assert space.leaving_bytes == 2 * SEGMENT
    wait_until(lambda: rig.store.background.unlinked_bytes == SEGMENT)
    rig.store.tick(rig.now_s)
    assert space.leaving_bytes == SEGMENT
    go.set()
    wait_until(lambda: not rig.store.background._paths)
    rig.store.tick(rig.now_s)
    assert space.leaving_bytes == 0


def test_a_disk_on_which_retention_makes_room_is_not_about_to_fill(make_rig: RigMaker) -> None:
    """The free space goes up and down by whole segments; only others can fill such a disk."""
    rig = make_rig(chunks=200, segment_bytes=4 * SEGMENT)
    client = rig.fresh("peer", 16)
    space = rig.desk.space
    others = 0

    def measure() -> None:
        space.free_bytes = 48 * SEGMENT - others - sum(path.stat().st_size for path in rig.spool.glob("*/*/0*[gw]"))

    space.measure = measure  # type: ignore[method-assign]
    space.min_free_bytes = 8 * SEGMENT
    found = []
    for second in range(200):
        client.send_all(SEGMENT // 2)
        rig.step()
        if second > 160:
            others += SEGMENT // 4
        rig.now_s += 1
        tick(rig)
        found.append(rig.counter("time_to_full_s"))
    assert client.word(Str.FIRST_OFFSET) > 40 * SEGMENT
    assert set(found[20:160]) == {NEVER_S}
    assert 0 < found[-1] < NEVER_S


def test_streams_that_end_between_two_looks_are_cut_at_once(make_rig: RigMaker) -> None:
    config = ClientConfig(id="own", address=ipaddress.ip_network("192.0.2.1"), max_spool_bytes=2 * SEGMENT)
    rig = make_rig(segment_bytes=SEGMENT, clients=(config,), max_bytes_per_stream=3 * SEGMENT)
    tick(rig)
    clients = {"peer": rig.fresh("peer"), "one": rig.named("one", seed=2), "own": rig.named("own", seed=3)}
    for client in clients.values():
        client.send_all(10 * SEGMENT + 160)
        client.end()
        rig.steps(2)
        assert client.state() is StreamState.FREE
    kept = dict(rig.ask("SELECT name, durable - first_offset FROM stream"))  # type: ignore[arg-type]
    assert kept == {"peer": 2 * SEGMENT + 160, "one": 2 * SEGMENT + 160, "own": SEGMENT + 160}
    tick(rig)
    wait_until(lambda: len(seg_files(rig)) == 3 + 3 + 2)
    sent = sum(client.sent for client in clients.values())
    assert rig.gone(Gone.DURABLE_BYTES) == sent
    assert rig.gone(Gone.RETIRED_BYTES) == sent - sum(kept.values()) == 8 * SEGMENT + 8 * SEGMENT + 9 * SEGMENT
    rig.restart()
    assert rig.gone(Gone.RETIRED_BYTES) == sent - sum(kept.values())


def test_a_stop_leaves_no_stream_over_its_limit(make_rig: RigMaker) -> None:
    rig = make_rig(segment_bytes=SEGMENT, max_bytes_per_stream=3 * SEGMENT)
    tick(rig)
    client = rig.fresh("peer")
    client.send_all(10 * SEGMENT + 160)
    rig.steps(2)
    assert rig.store.put_everything_away()
    assert rig.one("SELECT durable - first_offset FROM stream") == 2 * SEGMENT + 160
    rig.restart()
    assert len(seg_files(rig)) == 3


MIB = 1 << 20


def test_segments_that_grow_while_streams_leave_follow_each_other(make_rig: RigMaker) -> None:
    """With fewer streams they are longer; one that crosses the end of a short one goes on exactly there."""
    rig = make_rig(chunks=256, chunk_bytes=64 << 10, segment_bytes=4 * MIB, max_bytes=16 * MIB)
    clients = [rig.fresh(f"peer-{number}") for number in range(4)]
    for client in clients:
        client.send(960_000)
    rig.step()
    for client in clients[1:]:
        client.leave()
    rig.steps(2)
    clients[0].send(480_000)
    rig.steps(2)
    assert rig.ask("SELECT first, end FROM segment JOIN stream ON stream = id WHERE name = 'peer-0'") == [
        (0, MIB),
        (MIB, None),
    ]
    rig.assert_stored(clients[0])


def test_the_limit_is_kept_by_streams_that_go_on_and_after_a_restart(make_rig: RigMaker) -> None:
    """Their segments are as short as those of streams that begin, and no next ones are made ahead."""
    rig = make_rig(chunks=512, chunk_bytes=64 << 10, segment_bytes=8 * MIB, max_bytes=8 * MIB)
    clients = [rig.named(f"client-{number}", seed=number) for number in range(6)]
    for round_ in range(12):
        for client in clients:
            client.send(320_000)
        rig.steps(2)
        tick(rig)
        assert rig.store.retention.spool_bytes() <= 8 * MIB
        if round_ == 2:
            rig.restart()
            for client in clients:
                client.adopt()
        if round_ == 5:
            for client in clients:
                client.leave()
            rig.steps(2)
            clients = [rig.named(f"client-{number}", seed=number) for number in range(6)]
    for number, client in enumerate(clients):
        first = client.word(Str.FIRST_OFFSET)
        assert first > 0
        assert rig.stored(f"client-{number}") == content(client.seed, first, client.sent)


@pytest.mark.parametrize(("max_bytes", "warned"), [(0, False), (9 * MIB, True), (10 * MIB, False)])
def test_a_limit_that_open_segments_alone_may_exceed_is_named_at_the_start(
    make_rig: RigMaker, max_bytes: int, warned: bool
) -> None:
    """Ten clients, and a segment of at least 1 MiB each."""
    rig = make_rig(segment_bytes=4 * MIB, max_bytes=max_bytes)
    events = [message.payload["event"] for message in rig.desk.outbox if message.payload]
    assert ("max_bytes is not kept with all clients connected" in events) is warned
