"""A cycle stores every byte once, in order, in whole blocks, and frees what it may."""

from __future__ import annotations

import random

import pytest

from mpserverd.arena.state import Gone, Str, StreamFlag, StreamState
from mpserverd.config.words import Sync
from mpserverd.storer import cycle as cycle_module
from tests.unit.storer.conftest import RigMaker
from tests.unit.storer.rig import CHUNK, Rig

SEGMENT = 64 << 10


def test_a_stream_is_stored_byte_for_byte_and_leaves_no_chunk(rig: Rig) -> None:
    client = rig.fresh("peer", 16)
    client.send(16 * 1000)
    rig.step()
    assert client.word(Str.DURABLE) == client.word(Str.STORED) == 16_000
    rig.assert_stored(client)
    client.end()
    rig.step()
    assert client.state() is StreamState.FREE
    assert rig.free_chunks() == rig.arena.count
    assert rig.gone(Gone.DURABLE_BYTES) == 16_000
    assert rig.gone(Gone.SOCKET_BYTES) == 16_000


@pytest.mark.parametrize("packet", [1, 7, 24, 1500, 5000])
@pytest.mark.parametrize("sync", list(Sync))
def test_packets_straddle_chunks_and_segments(make_rig: RigMaker, packet: int, sync: Sync) -> None:
    rig = make_rig(sync=sync)
    client = rig.fresh("peer", packet)
    for length in (1, packet - 1, packet, 10 * packet, 3 * CHUNK + 5, 200_000, 17):
        client.send_all(length)
        rig.step()
        if client.sent >= packet:
            rig.assert_stored(client)
    partial = client.sent % packet
    client.end()
    rig.steps(3)
    assert rig.one("SELECT durable FROM stream") == client.sent
    assert rig.gone(Gone.TRUNCATED_BYTES) == partial
    assert rig.free_chunks() == rig.arena.count


@pytest.mark.parametrize("packet", [1, 16, 5000])
def test_packets_of_zeros_at_the_end_are_always_in_the_index(rig: Rig, packet: int) -> None:
    """A file cannot show them, and a repair without a catalog must not cut what was acknowledged."""
    client = rig.fresh("peer", packet)
    indexed = []
    for zeros in (False, False, True):
        first = client.sent
        client.receive(2 * packet)
        if zeros:
            for at, length in client.window.pieces(first, client.sent):
                client.window.data[at : at + length] = bytes(length)
        client.offer()
        rig.step()
        assert client.word(Str.DURABLE) == client.sent
        (path,) = (rig.spool / "streams" / "peer").glob("*.idx")
        indexed.append(int.from_bytes(path.read_bytes()[-16:-8], "little"))
    assert indexed == [2 * packet, 2 * packet, 6 * packet]


EDGES = [1, 4095, CHUNK, CHUNK + 1, 2 * CHUNK, SEGMENT - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT]


@pytest.mark.parametrize("length", EDGES)
def test_a_stream_may_end_at_any_edge(rig: Rig, length: int) -> None:
    client = rig.fresh("peer", 1)
    client.send_all(length)
    client.end()
    rig.steps(3)
    rig.assert_stored(client, "peer")
    assert client.state() is StreamState.FREE
    lengths = [int(str(end)) - int(str(first)) for first, end in rig.ask("SELECT first, end FROM segment")]
    sizes = [path.stat().st_size for path in sorted((rig.spool / "streams" / "peer").glob("*.seg"))]
    assert sizes == lengths, "files are cut to their content"
    assert rig.free_chunks() == rig.arena.count


@pytest.mark.parametrize("length", EDGES)
def test_a_client_that_comes_back_goes_on_at_any_edge(rig: Rig, length: int) -> None:
    """The first block is completed from the file, because the arena no longer has its beginning."""
    client = rig.named("one", 1)
    client.send_all(length)
    client.end()
    rig.steps(3)
    again = rig.named("one", 1)
    assert again.word(Str.STARTED_AT) == length
    again.send_all(5000)
    rig.steps(2)
    rig.assert_stored(again)
    again.end()
    rig.step()
    rig.assert_stored(again, "one")


def test_an_idle_tail_is_let_go_and_its_block_completed_from_the_file(rig: Rig) -> None:
    client = rig.fresh("peer", 10)
    for _ in range(40):
        client.send(730)
        rig.step()
        assert client.window.let_go_tail()
        if random.Random(client.sent).random() < 0.5:
            assert rig.store.cycle.free_idle() > 0
        rig.assert_stored(client)
    rig.store.cycle.free_idle()
    assert rig.free_chunks() == rig.arena.count


def test_less_than_a_block_waits_a_second_unless_the_stream_closes(rig: Rig) -> None:
    client = rig.fresh("peer", 16)
    client.send(160)
    for _ in range(9):
        rig.step(urgent=False)
        assert client.word(Str.DURABLE) == 0
    for _ in range(3):
        rig.step(urgent=False)
    assert client.word(Str.DURABLE) == 160
    client.send(16)
    client.end()
    rig.step(urgent=False)
    assert client.state() is StreamState.FREE
    rig.assert_stored(client, "peer")


def test_a_whole_block_does_not_wait(rig: Rig) -> None:
    client = rig.fresh("peer", 16)
    client.send(CHUNK)
    rig.step(urgent=False)
    assert client.word(Str.DURABLE) == CHUNK


def test_many_streams_keep_their_bytes_apart(make_rig: RigMaker) -> None:
    rig = make_rig(chunks=600, rows=128, segment_bytes=SEGMENT)
    rng = random.Random(5)
    clients = [rig.fresh(f"peer-{number}", rng.choice([1, 7, 16, 24, 1500])) for number in range(100)]
    for _ in range(12):
        for client in rng.sample(clients, 60):
            client.send_all(rng.randrange(1, 9000))
        rig.step()
    for client in clients:
        client.end()
    rig.steps(3)
    for client in clients:
        if client.sent:
            rig.assert_stored(client, f"peer-{clients.index(client)}")
    assert rig.free_chunks() == rig.arena.count


def test_a_fat_stream_fills_many_segments_in_one_cycle(make_rig: RigMaker) -> None:
    rig = make_rig(chunks=128, chunk_bytes=1 << 18, segment_bytes=3 << 18)
    client = rig.fresh("peer", 1000)
    client.send(7_000_000)
    rig.step()
    assert client.word(Str.DURABLE) == 7_000_000
    rig.assert_stored(client)
    assert rig.one("SELECT count(*) FROM segment WHERE state = 'sealed'") == 7_000_000 // (3 << 18)


def test_one_cycle_takes_only_so_much_of_one_stream(make_rig: RigMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cycle_module, "STREAM_BYTES_MAX", 10_000)
    rig = make_rig()
    client = rig.fresh("peer", 7)
    client.send(7 * 4000)
    rig.step()
    assert client.word(Str.DURABLE) == 10_000 - 10_000 % 7
    assert rig.store.cycle.more
    rig.steps(3)
    rig.assert_stored(client)
    assert not rig.store.cycle.more


def test_a_stream_that_is_not_stored_leaves_only_its_totals(rig: Rig) -> None:
    client = rig.fresh("peer", 16, flags=StreamFlag(0))
    client.send(16 * 300 + 3)
    rig.step()
    assert client.word(Str.DURABLE) == 0
    client.end()
    rig.step()
    assert client.state() is StreamState.FREE
    assert rig.gone(Gone.UNSTORED_BYTES) == 4800
    assert rig.gone(Gone.TRUNCATED_BYTES) == 3
    assert rig.gone(Gone.SOCKET_BYTES) == 4803
    assert rig.files() == []
    assert rig.one("SELECT count(*) FROM stream") == 0
    assert rig.free_chunks() == rig.arena.count


def drop(rig: Rig, packet: int, rounds: int, seed: int) -> None:
    """A stream that drops its oldest packets while the storer is slow."""
    rng = random.Random(seed)
    client = rig.fresh("peer", packet, StreamFlag.STORE | StreamFlag.DROP_OLDEST)
    for _ in range(rounds):
        for _ in range(rng.randrange(1, 6)):
            wanted = rng.randrange(1, 3 * CHUNK)
            while wanted > 0:
                taken = client.receive(wanted)
                wanted -= taken
                client.offer()
                if not taken and not client.window.drop_oldest():
                    break
        rig.step()
        rig.assert_stored(client, upto=client.word(Str.DURABLE))
    client.end()
    rig.steps(4)
    rig.assert_stored(client, "peer", upto=client.sent)
    dropped = int(str(rig.one("SELECT coalesce(sum(end - first), 0) FROM hole")))
    assert dropped, "nothing was dropped: the test tests nothing"
    assert rig.gone(Gone.DROPPED_BYTES) == dropped
    assert rig.gone(Gone.DROPPED_PACKETS) == dropped // packet
    assert rig.gone(Gone.STORED_BYTES) == client.sent - dropped
    assert rig.gone(Gone.RECEIVED_BYTES) == client.sent
    assert rig.one("SELECT count(*) FROM hole WHERE first % ? OR end % ?", packet, packet) == 0
    assert rig.free_chunks() == rig.arena.count


@pytest.mark.parametrize("packet", [1, 7, 16, 1500])
@pytest.mark.parametrize("segment_bytes", [2 * CHUNK, SEGMENT])
def test_dropped_packets_become_holes_that_read_as_zeros(make_rig: RigMaker, packet: int, segment_bytes: int) -> None:
    drop(make_rig(chunks=12, segment_bytes=segment_bytes), packet, 25, seed=packet)


def test_positions_of_the_catalog_balance_at_any_moment(rig: Rig) -> None:
    """After a power cut the totals of the catalog are all there is: they must hold by themselves."""
    client = rig.fresh("peer", 7)
    for length in (1000, 3, 5000, 1):
        client.send(length)
        rig.step()
        row = rig.ask("SELECT socket, durable, lost, truncated, handshake, gaps FROM stream")[0]
        socket, durable, lost, truncated, handshake, gaps = (int(str(value)) for value in row)
        assert socket == durable - lost + truncated + handshake
        assert gaps == client.sent // 7


@pytest.mark.parametrize("chunks", [3, 4, 5, 6, 8])
def test_a_dropped_chunk_s_place_takes_what_comes_next(make_rig: RigMaker, chunks: int) -> None:
    """Also when it was the last one: room for no byte would be read as the end of the connection."""
    rig = make_rig(chunks=chunks)
    client = rig.fresh("peer", 16, StreamFlag.STORE | StreamFlag.DROP_OLDEST)
    dropped = 0
    for number in range(60):
        client.receive(CHUNK)
        client.offer()
        if not client.window.room(CHUNK):
            dropped += client.window.drop_oldest()
        assert all(len(place) for place in client.window.room(CHUNK))
        if number % 7 == 6:
            rig.step()
    assert dropped
    client.end()
    rig.steps(4)
    rig.assert_stored(client, "peer")
