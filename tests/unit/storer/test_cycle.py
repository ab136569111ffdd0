"""A cycle stores every byte once, in order, in whole blocks, and frees what it may."""

from __future__ import annotations

import pytest

from mpserverd.arena.state import Gone, Str, StreamState
from mpserverd.config.words import Sync
from tests.unit.storer.conftest import RigMaker
from tests.unit.storer.rig import CHUNK, Rig


def test_a_stream_is_stored_byte_for_byte(rig: Rig) -> None:
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
    client.end()
    rig.steps(3)
    assert rig.one("SELECT durable FROM stream") == client.sent - client.sent % packet
    assert rig.gone(Gone.TRUNCATED_BYTES) == client.sent % packet or not client.sent % packet
    assert rig.free_chunks() == rig.arena.count
