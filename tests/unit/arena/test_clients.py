"""The list of connections: each with what it sent, to the byte, and what its stream is worth."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mpserverd.arena.clients import clients, peer_text
from mpserverd.arena.latency import bucket_index
from mpserverd.arena.state import Con, ConnectionFlag, ConnectionState, Str, StreamFlag
from mpserverd.cli.views import clients_view
from tests.unit.arena.live_tables import PEER_HIGH, PEER_LOW, Tables

DESIGN_CLIENT = [
    "id",
    "stream",
    "peer",
    "listener",
    "worker",
    "connected_s",
    "packets",
    "bytes",
    "packets_per_s",
    "gaps",
    "latency_ms",
    "at_risk_bytes",
]


@pytest.fixture
def tables() -> Iterator[Tables]:
    with Tables() as made:
        yield made


def test_every_promised_field_is_there_and_is_json(tables: Tables) -> None:
    tables.connect(0, tables.open(0))
    tables.connect(1, None)
    for client in json.loads(json.dumps(clients(tables.live()), allow_nan=False)):
        assert set(DESIGN_CLIENT) <= set(client)
        assert set(client["latency_ms"]) == {"p50", "p99", "p999", "max"}


def test_a_client_is_listed_with_what_it_sent(tables: Tables) -> None:
    stream = tables.open(0, name="192.0.2.1-5000-x", packet_size=16)
    tables.connect(3, stream, worker=1)
    stream.receive(1605)
    stream.words[Str.RATE_MILLI] = 10_050_000
    tables.set_check(stream, gaps=2, missing=5, repeats=1, reordered=4)
    (found,) = clients(tables.live())
    assert (found["id"], found["peer"]) == ("192.0.2.1:5000", "192.0.2.1:5000")
    assert (found["stream"], found["listener"], found["worker"]) == ("192.0.2.1-5000-x", "raw", 1)
    assert (found["bytes"], found["packets"], found["packets_per_s"]) == (1600, 100, 10_050.0)
    assert (found["gaps"], found["missing"], found["repeats"], found["reordered"]) == (2, 5, 1, 4)
    assert (found["state"], found["connection"]) == ("assigned", 3)
    assert 0 <= found["connected_s"] < 60


def test_bytes_are_the_connections_own_when_its_stream_goes_on(tables: Tables) -> None:
    stream = tables.open(0, name="pump-7", flags=StreamFlag.STORE | StreamFlag.NAMED)
    stream.receive(160)
    tables.connect(0, stream)
    stream.receive(32)
    (found,) = clients(tables.live())
    assert found["id"] == "pump-7"
    assert (found["bytes"], found["packets"]) == (32, 2)
    assert (found["stream_bytes"], found["stream_packets"]) == (192, 12)


def test_bytes_at_risk_fall_to_nothing_when_they_are_durable(tables: Tables) -> None:
    stream = tables.open(0)
    tables.connect(0, stream)
    stream.receive(320)
    (found,) = clients(tables.live())
    assert (found["at_risk_bytes"], found["at_risk"]) == (320, "raw: up to 320 bytes")
    stream.offer()
    stream.write()
    stream.commit()
    (found,) = clients(tables.live())
    assert (found["at_risk_bytes"], found["at_risk"]) == (0, "raw: up to 0 bytes")
    assert (found["level"], found["unacked_bytes"]) == ("raw", None)


def mps_client(tables: Tables, sync: str, received: int, acked: int) -> dict[str, Any]:
    tables.facts["sync"] = sync
    tables.facts["listeners"]["1"]["protocol"] = "mps"
    stream = tables.open(0, name="pump-7", flags=StreamFlag.STORE | StreamFlag.NAMED | StreamFlag.MPS)
    tables.connect(0, stream)
    stream.receive(received)
    stream.words[Str.ACKED] = acked
    (found,) = clients(tables.live())
    return found


def test_what_an_mps_client_was_not_told_is_not_at_risk_because_it_keeps_it(tables: Tables) -> None:
    found = mps_client(tables, "durable", 320, 48)
    assert (found["level"], found["at_risk_bytes"], found["unacked_bytes"]) == ("durable", 0, 272)
    assert found["at_risk"] == "0: the client keeps 272 bytes"


def test_an_mps_client_that_was_told_everything_says_so(tables: Tables) -> None:
    assert mps_client(tables, "durable", 320, 320)["at_risk"] == "0: everything is acknowledged"


def test_an_acknowledgement_without_sync_is_called_stored_and_its_risk_is_named(tables: Tables) -> None:
    found = mps_client(tables, "none", 320, 320)
    assert (found["level"], found["at_risk"]) == ("stored", "what is not synced; everything is acknowledged")


def test_an_mps_client_that_waits_for_its_stream_has_its_level_already(tables: Tables) -> None:
    tables.facts["listeners"]["1"]["protocol"] = "mps"
    tables.connect(0, None)
    (found,) = clients(tables.live())
    assert (found["level"], found["at_risk"], found["unacked_bytes"]) == ("durable", "nothing read yet", 0)


def test_the_table_shows_level_and_risk_of_each_client(tables: Tables) -> None:
    out = io.StringIO()
    clients_view([mps_client(tables, "durable", 320, 0)], out, 0)
    header, row, _ = out.getvalue().splitlines()
    assert header.split()[:6] == ["stream", "peer", "worker", "state", "level", "connected"]
    assert header.endswith("at risk") and row.endswith("0: the client keeps 320 bytes") and " durable " in row


def test_a_stream_that_is_not_stored_says_so(tables: Tables) -> None:
    stream = tables.open(0, flags=StreamFlag(0))
    tables.connect(0, stream)
    stream.receive(320)
    (found,) = clients(tables.live())
    assert (found["at_risk"], found["at_risk_bytes"]) == ("raw: not stored", 0)


def test_latency_is_read_from_the_streams_histogram(tables: Tables) -> None:
    stream = tables.open(0)
    tables.connect(0, stream)
    assert clients(tables.live())[0]["latency_ms"] == dict.fromkeys(("p50", "p99", "p999", "max"))
    samples = np.array([2_000_000] * 980 + [50_000_000] * 20, np.int64)
    np.add.at(tables.state.latency[0], bucket_index(samples), np.uint64(1))
    stream.words[Str.LATENCY_MAX_NS] = 51_000_000
    latency = clients(tables.live())[0]["latency_ms"]
    assert latency["p50"] == pytest.approx(2, rel=0.25)
    assert latency["p99"] == pytest.approx(50, rel=0.25)
    assert latency["p999"] <= latency["max"] == 51.0


def test_a_connection_that_waits_for_its_stream_is_listed(tables: Tables) -> None:
    tables.connect(0, None)
    (found,) = clients(tables.live())
    assert (found["stream"], found["worker"], found["state"], found["bytes"]) == (None, None, "accepted", 0)


def test_a_connection_whose_stream_left_is_not_given_the_newcomers_bytes(tables: Tables) -> None:
    stream = tables.open(0)
    tables.connect(0, stream)
    tables.open(0, name="another").receive(160)
    assert clients(tables.live())[0]["bytes"] == 0


def test_connections_come_in_the_order_of_their_arrival(tables: Tables) -> None:
    for row, stream in ((5, 0), (2, 1), (4, 2)):
        tables.connect(row, tables.open(stream), port=6000 + row)
        tables.state.connections[row, Con.ACCEPTED_MONO_NS] = 100 - stream
    assert [found["connection"] for found in clients(tables.live())] == [4, 2, 5]


def test_a_paused_connection_says_so(tables: Tables) -> None:
    tables.connect(0, tables.open(0))
    tables.state.connections[0, Con.FLAGS] = ConnectionFlag.PAUSED
    assert clients(tables.live())[0]["paused"]


def test_free_rows_are_not_listed(tables: Tables) -> None:
    tables.connect(0, tables.open(0))
    tables.state.connections[0, Con.STATE] = ConnectionState.FREE
    assert clients(tables.live()) == []


def test_peers_are_written_as_people_write_them() -> None:
    assert peer_text(PEER_HIGH, PEER_LOW, 4711) == "192.0.2.1:4711"
    assert peer_text(0x2001_0DB8_0000_0000, 1, 80) == "[2001:db8::1]:80"
