"""Programs that know nothing of us send files, and what is on disk has the same hash."""

from __future__ import annotations

import collections
import pathlib

import pytest

from tests.integration import senders
from tests.integration.driver import Daemon, connect
from tests.integration.oracle import sent_digests, stored_digests, stored_streams

PACKET_SIZES = (1, 7, 16, 24, 32, 1500)


def exact(packet_size: int, **server: object) -> dict[str, object]:
    """Nothing may be dropped: a stream that finds the memory full waits."""
    return {"listener": {"packet_size": packet_size, "on_full": "block"}, "server": server}


def assert_stored(daemon: Daemon, contents: list[bytes], packet_size: int) -> None:
    """Everything that was sent is on disk as it was sent, and the accounts say the same to the byte."""
    sent = sum(map(len, contents))
    truncated = sum(len(content) % packet_size for content in contents)
    daemon.wait_until_quiet()
    total = daemon.wait_for_total("durable_bytes", sent - truncated)
    assert total["received_bytes"] == total["stored_bytes"] == sent - truncated
    assert total["truncated_bytes"] == truncated
    assert total["dropped_bytes"] == total["lost_bytes"] == 0
    stats = daemon.stats()
    assert stats["total_bytes"] == sent - truncated
    assert stats["total_packets"] == (sent - truncated) // packet_size
    assert stored_digests(daemon.spool) == sent_digests(contents, packet_size)


@pytest.mark.parametrize("packet_size", PACKET_SIZES)
def test_ten_files_sent_by_socat_are_stored_byte_for_byte(tmp_path: pathlib.Path, packet_size: int) -> None:
    senders.needs("socat")
    contents = [senders.payload(seed, 100_000 * seed + 13 * seed) for seed in range(1, 11)]
    with Daemon(tmp_path, exact(packet_size)) as daemon:
        port = daemon.port()
        blocks = (1, 3, 17, 1021, 1448, 4096, 8192, 12_864, 65_536, 262_144)
        sizes = [max(block, len(content) // 20_000) for block, content in zip(blocks, contents, strict=True)]
        paths = senders.files(tmp_path, contents)
        senders.finish([senders.socat(path, port, size) for path, size in zip(paths, sizes, strict=True)])
        assert_stored(daemon, contents, packet_size)


@pytest.mark.parametrize("connections", [1, 10, 1000])
def test_connections_of_a_c_program_are_stored_byte_for_byte(
    tmp_path: pathlib.Path, sender: senders.Sender, connections: int
) -> None:
    """Six listeners with a packet size each; writes of odd sizes, a torn packet at the end of every connection."""
    listeners = [
        {"name": f"of-{size}", "address": "127.0.0.1:0", "packet_size": size, "on_full": "block"}
        for size in PACKET_SIZES
    ]
    size_bytes, torn_bytes = 18_000, 5
    settings = {
        "server": {"max_clients": connections},
        "buffers": {"bytes": "32 MiB", "chunk_bytes": "16 KiB"},
        "listener": listeners,
    }
    sent: collections.Counter[str] = collections.Counter()
    with Daemon(tmp_path, settings) as daemon:
        options = ("-n", str(connections), "-g", str(size_bytes), "-t", str(torn_bytes), "-c", "1,7,804,5000,63")
        for round_number, packet_size in enumerate(PACKET_SIZES, 1):
            sender.run(daemon.port(f"of-{packet_size}"), *options, "-s", str(round_number))
            contents = (
                senders.generated(number, size_bytes, round_number, torn_bytes) for number in range(connections)
            )
            sent += sent_digests(contents, packet_size)
        whole = [size_bytes + torn_bytes - (size_bytes + torn_bytes) % size for size in PACKET_SIZES]
        daemon.wait_until_served(connections * len(PACKET_SIZES))
        total = daemon.wait_for_total("durable_bytes", connections * sum(whole))
        assert total["truncated_bytes"] == connections * sum(size_bytes + torn_bytes - size for size in whole)
        assert stored_digests(daemon.spool) == sent


@pytest.mark.parametrize(
    "oddity",
    [
        pytest.param(("-p", "200", "-c", "804,1,3000"), id="pauses"),
        pytest.param(("-S", "8199:700"), id="a-stall-in-mid-packet"),
        pytest.param(("-u", "5001"), id="urgent-data"),
        pytest.param(("-k", "700"), id="stays-without-a-word"),
        pytest.param(("-r", "-k", "500"), id="a-reset-at-the-end"),
        pytest.param(("-c", "1"), id="a-byte-a-write"),
    ],
)
def test_odd_behaviour_of_a_c_program_changes_no_byte(
    tmp_path: pathlib.Path, sender: senders.Sender, oddity: tuple[str, ...]
) -> None:
    contents = [senders.generated(number, 16_384, torn_bytes=3) for number in range(10)]
    with Daemon(tmp_path, exact(24)) as daemon:
        sender.run(daemon.port(), "-n", "10", "-g", "16384", "-t", "3", *oddity)
        daemon.wait_until_served(10)
        assert_stored(daemon, contents, 24)


@pytest.mark.parametrize("packet_size", [7, 16])
def test_a_file_sent_by_netcat_is_stored_byte_for_byte(tmp_path: pathlib.Path, packet_size: int) -> None:
    senders.needs("nc")
    contents = [senders.payload(packet_size, 5_000_003)]
    with Daemon(tmp_path, exact(packet_size)) as daemon:
        senders.finish([senders.nc(path, daemon.port()) for path in senders.files(tmp_path, contents)])
        assert_stored(daemon, contents, packet_size)


@pytest.mark.parametrize("packet_size", PACKET_SIZES)
def test_a_stream_cut_at_every_odd_place_keeps_its_whole_packets(tmp_path: pathlib.Path, packet_size: int) -> None:
    """Clients that end 0, 1, 2 ... bytes after a packet's edge, and at the edges of blocks and chunks."""
    edges = (4096, 65_536)
    cuts = [*range(2 * min(packet_size, 24) + 1), packet_size - 1, packet_size, packet_size + 1]
    cuts += [edge + step for edge in edges for step in (-1, 0, 1)]
    contents = [senders.payload(index, cut) for index, cut in enumerate(sorted(set(cuts)))]
    with Daemon(tmp_path, exact(packet_size, max_clients=100) | {"buffers": {"bytes": "16 MiB"}}) as daemon:
        port = daemon.port()
        for content in contents:
            with connect(port) as client:
                client.sendall(content)
        assert_stored(daemon, contents, packet_size)


def test_writes_of_every_small_size_are_joined_to_the_same_stream(tmp_path: pathlib.Path) -> None:
    """The pieces in which bytes arrive have nothing to do with the packets."""
    content = senders.payload(5, sum(range(1, 600)))
    with Daemon(tmp_path, exact(24)) as daemon:
        with connect(daemon.port()) as client:
            at = 0
            for size in range(1, 600):
                client.sendall(content[at : at + size])
                at += size
        assert_stored(daemon, [content], 24)


def test_streams_are_read_while_they_are_written_and_after_the_daemon_has_gone(tmp_path: pathlib.Path) -> None:
    content = senders.payload(8, 3_200_000)
    with Daemon(tmp_path, exact(16)) as daemon:
        with connect(daemon.port()) as client:
            client.sendall(content)
            daemon.wait_for_total("durable_bytes", len(content))
            (stream,) = stored_streams(daemon.spool)
            assert stream.content == content
        assert_stored(daemon, [content], 16)
        daemon.stop()
        assert stored_digests(daemon.spool) == sent_digests([content], 16)


def test_a_stop_makes_everything_durable_that_clients_had_sent(tmp_path: pathlib.Path) -> None:
    """SIGTERM while ten clients are connected: what the kernel holds is read and stored before the goodbye."""
    contents = [senders.payload(seed, 400_000 + seed) for seed in range(10)]
    with Daemon(tmp_path, exact(16)) as daemon:
        port = daemon.port()
        clients = [connect(port) for _ in contents]
        for client, content in zip(clients, contents, strict=True):
            client.sendall(content)
        daemon.wait_until_connected(len(contents))
        daemon.stop()
        for client in clients:
            client.close()
        assert stored_digests(daemon.spool) == sent_digests(contents, 16)
