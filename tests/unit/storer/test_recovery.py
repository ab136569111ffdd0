"""A successor goes on exactly where the catalog says, whatever the dead storer had begun."""

from __future__ import annotations

import dataclasses
import random

import pytest

from mpserverd.arena.state import Gone, Head, Str, StreamFlag, StreamState
from mpserverd.storer.repair import repair
from mpserverd.storer.segment_file import INDEX_PAIR, early_name
from tests.unit.storer.conftest import RigMaker
from tests.unit.storer.rig import CHUNK, Client, Rig


class Killed(Exception):
    """Stands for a SIGKILL at the place where it is raised."""


def kill_in(rig: Rig, monkeypatch: pytest.MonkeyPatch, owner: object, method: str, *, after: bool) -> None:
    """The next step dies before or after ``method``, and a successor starts."""
    real = getattr(owner, method)

    def dying(*arguments: object, **keywords: object) -> object:
        if after:
            real(*arguments, **keywords)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, dying)
        with pytest.raises(Killed):
            rig.step()
    rig.restart()


def places(rig: Rig) -> list[tuple[object, str]]:
    """Where the order of a cycle can break."""
    cycle = rig.store.cycle
    return [
        (cycle._opening, "begin"),
        (cycle._placing, "fit"),
        (cycle._writer, "write"),
        (cycle._syncing, "sync"),
        (rig.desk.catalog, "set_positions"),
        (cycle._committing, "_transact"),
        (cycle._committing, "_settle"),
        (cycle._committing, "_publish"),
        (cycle._committing, "free"),
    ]


@pytest.mark.parametrize("place", range(9))
@pytest.mark.parametrize("after", [False, True])
def test_a_kill_between_any_two_steps_loses_and_doubles_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, place: int, after: bool
) -> None:
    client = rig.fresh("peer", 24)
    client.send_all(24 * 3000)
    kill_in(rig, monkeypatch, *places(rig)[place], after=after) if place else None
    if place:
        assert client.word(Str.DURABLE) == rig.one("SELECT coalesce(max(durable), 0) FROM stream")
    fresh = rig.fresh("second", 7)
    fresh.send(7 * 1001)
    client.send(24 * 500)
    kill_in(rig, monkeypatch, *places(rig)[place], after=after)
    for one in (client, fresh):
        one.adopt()
        one.send_all(100_000 - 100_000 % one.packet)
    rig.steps(3)
    client.end()
    fresh.end()
    rig.steps(3)
    rig.assert_stored(client, "peer")
    rig.assert_stored(fresh, "second")
    assert rig.free_chunks() == rig.arena.count
    assert rig.gone(Gone.STREAMS) == 2
    assert rig.gone(Gone.RECEIVED_BYTES) == rig.gone(Gone.DURABLE_BYTES) == client.sent + fresh.sent
    assert not [name for name in rig.files() if name.endswith(".aside")]


@pytest.mark.parametrize("method", ["_cut", "put_away", "_release", "_free_rows"])
@pytest.mark.parametrize("after", [False, True])
def test_a_stream_that_ends_is_counted_once_whenever_the_storer_dies(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, method: str, after: bool
) -> None:
    stored, empty, unstored = rig.fresh("peer"), rig.fresh("empty"), rig.fresh("other", 16, StreamFlag(0))
    stored.send(1600)
    empty.receive(3)
    unstored.send(160)
    for client in (stored, empty, unstored):
        client.end()
    kill_in(rig, monkeypatch, rig.store._leaving, method, after=after)
    rig.steps(2)
    for _ in range(2):
        assert rig.gone(Gone.SOCKET_BYTES) == 1600 + 3 + 160
        assert rig.gone(Gone.RECEIVED_BYTES) == 1600 + 160
        assert rig.gone(Gone.DURABLE_BYTES) == 1600
        assert rig.gone(Gone.TRUNCATED_BYTES) == 3
        assert rig.gone(Gone.STREAMS) == 2
        assert rig.free_chunks() == rig.arena.count
        rig.restart()


def test_a_kill_in_the_middle_of_the_gone_block_is_repaired(rig: Rig) -> None:
    client = rig.fresh("peer")
    client.send(1600)
    client.end()
    rig.step()
    rig.state.words[Head.GONE_VERSION] |= 1
    rig.state.words[Head.GONE + Gone.DURABLE_BYTES] = 77
    rig.restart()
    assert rig.gone(Gone.DURABLE_BYTES) == 1600


def test_bytes_that_a_dead_storer_wrote_ahead_are_written_again(rig: Rig) -> None:
    """Also those in the same block, and an index that was ahead of its commit."""
    client = rig.fresh("peer", 10)
    client.send(9990)
    rig.step()
    directory = rig.spool / "streams" / "peer"
    with (directory / "00000000000000000000.seg").open("r+b") as file:
        file.seek(9990)
        file.write(b"\xee" * 20_000)
    with (directory / "00000000000000000000.idx").open("ab") as file:
        file.write(INDEX_PAIR.pack(50_000, 1) + b"torn")
    rig.restart()
    client.send(10)
    rig.step()
    rig.assert_stored(client)
    index = (directory / "00000000000000000000.idx").read_bytes()
    pairs = [INDEX_PAIR.unpack_from(index, at)[0] for at in range(0, len(index), 16)]
    assert pairs == [9990, 10_000]


def test_a_hole_reads_as_zeros_even_where_a_dead_storer_left_bytes(make_rig: RigMaker) -> None:
    rig = make_rig(chunks=8)
    client = rig.fresh("peer", 16, StreamFlag.STORE | StreamFlag.DROP_OLDEST)
    client.send(160)
    rig.step()
    with (rig.spool / "streams" / "peer" / "00000000000000000000.seg").open("r+b") as file:
        file.seek(160)
        file.write(b"\xee" * 60_000)
    rig.restart()
    for _ in range(12):
        client.receive(CHUNK)
        client.offer()
        client.window.drop_oldest()
    client.end()
    rig.steps(4)
    assert rig.one("SELECT count(*) FROM hole") == 1
    rig.assert_stored(client, "peer")


def test_files_that_the_catalog_does_not_know_are_set_aside_and_never_deleted(rig: Rig) -> None:
    client = rig.named("one")
    client.send(1600)
    client.end()
    rig.step()
    streams = rig.spool / "streams"
    (streams / "one" / "00000000000000004096.seg").write_bytes(b"x")
    (streams / "one" / "notes.txt").write_bytes(b"y")
    (streams / "one" / early_name(65536)).write_bytes(b"")
    (streams / "stranger").mkdir()
    (streams / "lost+found").mkdir()
    (streams / "stranger" / "00000000000000000000.seg").write_bytes(b"z")
    rig.restart()
    assert rig.files() == [
        "one/00000000000000000000.idx",
        "one/00000000000000000000.seg",
        "one/00000000000000004096.seg.aside",
        "one/notes.txt.aside",
        "stranger.aside/00000000000000000000.seg",
    ]
    assert (streams / "lost+found").is_dir()
    rig.restart()
    assert "one/00000000000000004096.seg.aside" in rig.files()
    again = rig.named("one")
    again.send(1600)
    rig.step()
    rig.assert_stored(again)


@pytest.mark.parametrize("catalog_is_lost", [False, True])
def test_what_a_killed_storer_had_begun_never_overrides_what_its_successor_wrote(
    make_rig: RigMaker, monkeypatch: pytest.MonkeyPatch, catalog_is_lost: bool
) -> None:
    """Killed between a segment's file and its commit; the successor's segments are longer, and then everything dies:
    repair finds what was acknowledged."""
    rig = make_rig(chunks=256, chunk_bytes=64 << 10, segment_bytes=4 << 20, max_bytes=4 << 20)
    client = rig.named("one")
    client.send(1_000_000)
    rig.step()
    client.send(200_000)
    kill_in(rig, monkeypatch, rig.desk.catalog, "add_segments", after=False)
    rig.store.close()
    assert rig.files("**/*.seg") == ["one/00000000000000000000.seg"]
    rig.config = rig.config_with(spool=dataclasses.replace(rig.config.spool, max_bytes=0))
    rig.store = rig.open()
    client.adopt()
    client.send(1_000_000)
    rig.steps(2)
    assert rig.files("**/*.seg") == ["one/00000000000000000000.seg"]
    rig.assert_stored(client)
    rig.store.close()
    if catalog_is_lost:
        for path in rig.spool.glob("catalog.sqlite*"):
            path.unlink()
    assert repair(str(rig.spool)).fine
    rig.assert_stored(client)
    rig.store = rig.open()


def test_a_live_stream_that_lost_its_file_goes_on_in_a_fresh_one(rig: Rig) -> None:
    client = rig.fresh("peer", 10)
    client.send(5000)
    rig.step()
    (rig.spool / "streams" / "peer" / "00000000000000000000.seg").unlink()
    rig.restart()
    client.send(5000)
    rig.step()
    assert client.word(Str.DURABLE) == 10_000
    assert rig.ask("SELECT first, end, state FROM segment") == [(0, 5000, "aside"), (5000, None, "open")]
    assert any("not complete" in m.payload["event"] for m in rig.desk.outbox if m.payload)


def test_after_a_power_cut_streams_go_on_at_their_durable_offset(make_rig: RigMaker) -> None:
    """The tables are gone, the catalog is all there is."""
    rig = make_rig()
    client = rig.named("one", 24)
    client.send(24 * 1000)
    rig.step()
    client.send(2400)  # never stored
    path = rig.spool.parent
    after = make_rig(path)
    assert after.one("SELECT connected FROM stream") == 0
    again = after.named("one", 24)
    assert again.word(Str.STARTED_AT) == 24_000
    again.send(24 * 300)
    after.step()
    after.assert_stored(again)


class Lives:
    """Clients that come, send, go and come back, and a storer that dies at random places."""

    def __init__(self, rig: Rig, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
        self.rig = rig
        self.monkeypatch = monkeypatch
        self.rng = random.Random(seed)
        self.alive: dict[str, Client] = {}
        self.ended: dict[str, Client] = {}

    def turn(self) -> None:
        self.come()
        for name in list(self.alive):
            if self.rng.random() < 0.7:
                self.alive[name].receive(self.rng.randrange(1, 6000))
                self.alive[name].offer()
            elif self.rng.random() < 0.2:
                self.go(name)
        if self.rng.random() < 0.3:
            self.die()
        else:
            self.rig.step()

    def come(self) -> None:
        name = f"client-{self.rng.randrange(5)}"
        if name not in self.alive and self.rng.random() < 0.5:
            number = int(name[-1])
            client = self.rig.named(name, (64, 7)[number % 2], seed=number + 1)
            assert client.sent == (self.ended[name].sent if name in self.ended else 0)
            self.alive[name] = client

    def go(self, name: str) -> None:
        client = self.ended[name] = self.alive.pop(name)
        client.end()
        while client.state() is not StreamState.FREE:
            self.rig.step()

    def die(self) -> None:
        owner, method = self.rng.choice(places(self.rig))
        try:
            kill_in(self.rig, self.monkeypatch, owner, method, after=self.rng.random() < 0.5)
        except pytest.fail.Exception:  # that place was not passed: it lives on
            return


@pytest.mark.parametrize("seed", range(4))
def test_random_lives_survive_kills_at_random_places(
    make_rig: RigMaker, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rig = make_rig(chunks=120, segment_bytes=4 * CHUNK)
    lives = Lives(rig, monkeypatch, seed)
    for _ in range(60):
        lives.turn()
    for name in list(lives.alive):
        lives.go(name)
    for name, client in lives.ended.items():
        if client.sent:
            rig.assert_stored(client, name)
    assert rig.free_chunks() == rig.arena.count
    assert rig.gone(Gone.DURABLE_BYTES) == sum(client.sent for client in lives.ended.values())
