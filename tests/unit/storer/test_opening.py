"""Known names go on, new ones begin, and what exists is never touched."""

from __future__ import annotations

import pytest

from mpserverd.arena.state import Check, Gone, Str, StreamState
from mpserverd.storer.opening import directory_name
from tests.unit.storer.rig import Rig


def test_a_connection_without_a_whole_packet_leaves_no_stream(rig: Rig) -> None:
    client = rig.fresh("peer", 16)
    client.receive(15)
    client.offer()
    client.end()
    rig.step()
    assert client.state() is StreamState.FREE
    assert rig.one("SELECT count(*) FROM stream") == 0
    assert list((rig.spool / "streams").iterdir()) == []
    assert rig.gone(Gone.TRUNCATED_BYTES) == rig.gone(Gone.SOCKET_BYTES) == 15
    assert rig.gone(Gone.STREAMS) == 0
    rig.store.tick(rig.now_s)
    assert rig.one("SELECT count(*) FROM released") == 0, "the number is never used again"
    rig.restart()
    assert rig.gone(Gone.TRUNCATED_BYTES) == 15


def test_a_named_stream_goes_on_with_all_its_totals(rig: Rig) -> None:
    first = rig.named("one", 16)
    assert first.state() is StreamState.OPEN
    first.send(16 * 100)
    first.receive(5)
    first.end()
    rig.step()
    epoch = rig.one("SELECT epoch FROM stream")
    assert rig.gone(Gone.STREAMS) == 1
    again = rig.named("one", 16)
    assert rig.gone(Gone.STREAMS) == rig.gone(Gone.DURABLE_BYTES) == rig.gone(Gone.TRUNCATED_BYTES) == 0
    for column in (Str.POSITION, Str.OFFERED, Str.STORED, Str.DURABLE, Str.STARTED_AT, Str.CHECK0 + Check.CHECKED):
        assert again.word(column) == 1600
    assert again.word(Str.TRUNCATED) == 5
    assert again.word(Str.SOCKET) == 1605
    assert again.word(Str.CHECK0 + Check.GAPS) == 100
    assert f"{again.word(Str.EPOCH):016x}" == epoch
    again.send(1600)
    again.end()
    rig.step()
    assert rig.stored("one") == rig.stored("one")
    rig.assert_stored(again, "one")
    assert rig.gone(Gone.SOCKET_BYTES) == 3205


def test_a_named_stream_that_never_sent_leaves_nothing(rig: Rig) -> None:
    client = rig.named("one", 16)
    client.end()
    rig.step()
    assert rig.one("SELECT count(*) FROM stream") == 0


def test_another_packet_size_makes_a_new_epoch_beside_the_old_one(rig: Rig) -> None:
    first = rig.named("one", 16)
    first.send(1600)
    first.end()
    rig.step()
    second = rig.named("one", 24, seed=2)
    assert second.word(Str.DURABLE) == 0
    second.send(2400)
    second.end()
    rig.step()
    rig.assert_stored(second, "one")
    rows = rig.ask("SELECT directory, epoch, durable FROM stream ORDER BY id")
    assert rows[0][::2] == ("one", 1600)
    assert rows[1][::2] == (f"one@{rows[1][1]}", 2400)


def test_a_made_up_name_that_exists_gives_way(rig: Rig) -> None:
    first = rig.fresh("peer")
    first.send(160)
    second = rig.fresh("peer")
    second.send(320)
    rig.step()
    assert rig.state.stream_name(second.row) == "peer.2"
    assert rig.ask("SELECT name, directory, durable FROM stream ORDER BY id") == [
        ("peer", "peer", 160),
        ("peer.2", "peer.2", 320),
    ]
    rig.assert_stored(second)


def test_a_directory_that_exists_is_never_touched(rig: Rig) -> None:
    for name in ("peer", "one"):
        (rig.spool / "streams" / name).mkdir()
        (rig.spool / "streams" / name / "00000000000000000000.seg").write_bytes(b"a stranger's")
    peer, one = rig.fresh("peer"), rig.named("one")
    peer.send(160)
    one.send(160)
    rig.step()
    assert rig.ask("SELECT name, directory FROM stream ORDER BY id") == [("peer.2", "peer.2"), ("one", "one.2")]
    for name in ("peer", "one"):
        assert (rig.spool / "streams" / name / "00000000000000000000.seg").read_bytes() == b"a stranger's"


@pytest.mark.parametrize(
    ("name", "directory"),
    [
        ("client-7_a.b", "client-7_a.b"),
        ("..", "%2E."),
        (".hidden", "%2Ehidden"),
        ("a/b\0c", "a%2Fb%00c"),
        ("ä", "%C3%A4"),
        ("", "%"),
    ],
)
def test_no_name_leads_out_of_the_directory(name: str, directory: str) -> None:
    assert directory_name(name) == directory


def test_a_stream_with_a_missing_file_is_stopped_and_a_new_epoch_takes_its_place(rig: Rig) -> None:
    first = rig.named("one", 16)
    first.send(1600)
    first.end()
    rig.step()
    (rig.spool / "streams" / "one" / "00000000000000000000.seg").unlink()
    second = rig.named("one", 16, seed=2)
    assert second.word(Str.DURABLE) == 0
    second.send(320)
    rig.step()
    rig.assert_stored(second)
    assert rig.ask("SELECT durable FROM stream ORDER BY id") == [(1600,), (320,)]
    events = [message.payload for message in rig.desk.outbox if message.payload]
    assert any("not complete" in event["event"] for event in events)
