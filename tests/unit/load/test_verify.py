"""Verifying finds the stream of every connection, waits for it, and names what is not as it was sent."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import pytest

from mpserverd.errors import SpoolError
from mpserverd.load.expected import ExpectedPackets
from mpserverd.load.link import ClientResult, ConnectionRecord
from mpserverd.load.scenario import Scenario
from mpserverd.load.spool_view import FilesView, SpoolView, StoredStream, open_spool
from mpserverd.load.verify import Verification, maybe_accept_time_ns, peer_of, verify

START_NS = 1_700_000_000_000_000_000
ACCEPTED = "20231114T221320.000100Z"
SCENARIO = Scenario(((int(socket.AF_INET), ("127.0.0.1", 1)),), rate=Fraction(1000), batch=100, duration_s=10.0)
EXPECTED = ExpectedPackets(SCENARIO, START_NS)
CONTENT = EXPECTED.packets(0, 0, 1000).tobytes()
CLOSED, BROKEN = None, "ECONNRESET"


@dataclass
class MemorySpool:
    """A spool whose streams are byte strings; ``later`` ones appear after the first look."""

    contents: dict[str, bytes]
    complete: bool = True
    first_offset: int = 0
    hole_bytes: int = 0
    later: dict[str, bytes] = field(default_factory=dict)
    looks: int = 0
    packet_size: int | None = None

    def streams(self) -> list[StoredStream]:
        known = self.contents | (self.later if self.looks else {})
        self.looks += 1
        first, hole = self.first_offset, self.hole_bytes
        return [
            StoredStream(name, first, first + len(content) + hole, len(content), self.complete, self.packet_size)
            for name, content in known.items()
        ]

    def read(self, stream: StoredStream) -> Iterator[bytes | memoryview]:
        content = (self.contents | self.later)[stream.name]
        yield content[:333]
        yield memoryview(content)[333:]


def one_client(broken: str | None = CLOSED, sent_bytes: int = len(CONTENT)) -> ClientResult:
    record = ConnectionRecord(
        local_address="127.0.0.1:4711",
        attempt_unix_ns=START_NS,
        first_index=0,
        sent_bytes=sent_bytes,
        broken=broken,
        sha256=hashlib.sha256(CONTENT[:sent_bytes]).hexdigest(),
    )
    return ClientResult(0, sent_bytes // 16, sent_bytes, 0, 1.0, 0, {}, 0, [record])


def outcome(spool: SpoolView, client: ClientResult | None = None, wait: Callable[[float], object] = id) -> Verification:
    ticks = iter(range(1000))
    return verify(spool, [client or one_client()], EXPECTED, 20, wait=wait, clock=lambda: next(ticks))


def stream(accepted: str = ACCEPTED, port: int = 4711) -> str:
    return f"127.0.0.1-{port}-{accepted}"


def test_a_stream_as_it_was_sent_is_fine() -> None:
    result = outcome(MemorySpool({stream(): CONTENT, "pump-7": b"x", "127.0.0.1-1-yesterday": b"y"}))
    assert (result.connections, result.stored_packets, result.mismatches, result.notes) == (1, 1000, [], [])


def test_it_waits_for_the_storer() -> None:
    waits: list[float] = []
    spool = MemorySpool({}, later={stream(): CONTENT})
    assert outcome(spool, wait=waits.append).mismatches == []
    assert len(waits) == 1


def test_a_stream_that_never_comes_is_a_mismatch_after_the_timeout() -> None:
    (line,) = outcome(MemorySpool({})).mismatches
    assert line == "client 0 from 127.0.0.1:4711: no stream for it in the spool"


def test_a_flipped_bit_is_named_with_its_packet() -> None:
    damaged = bytearray(CONTENT)
    damaged[16 * 77 + 3] ^= 4
    (line,) = outcome(MemorySpool({stream(): bytes(damaged)})).mismatches
    assert "the first difference is at offset 1235, byte 3 of packet 77" in line


def test_too_little_and_too_much_are_mismatches() -> None:
    (short,) = outcome(MemorySpool({stream(): CONTENT[:-16]})).mismatches
    assert "holds 15984 bytes, 16000 were sent; what both have is the same" in short
    more = EXPECTED.packets(0, 0, 1001).tobytes()
    (long,) = outcome(MemorySpool({stream(): more})).mismatches
    assert "holds 16016 bytes, 16000 were sent" in long


def test_holes_and_retired_bytes_are_called_by_name() -> None:
    (hole,) = outcome(MemorySpool({stream(): CONTENT[160:]}, hole_bytes=160)).mismatches
    assert "160 bytes are holes; the first difference is at offset 0" in hole
    (retired,) = outcome(MemorySpool({stream(): CONTENT[160:]}, first_offset=160)).mismatches
    assert "the first 160 bytes were retired" in retired


def test_a_listener_of_another_packet_size_is_named_without_waiting() -> None:
    waits: list[float] = []
    (line,) = outcome(MemorySpool({stream(): CONTENT[:-4]}, packet_size=12), wait=waits.append).mismatches
    assert line.endswith("the listener's packets have 12 bytes, those sent 16") and not waits


def test_a_wrong_time_is_found_in_a_paced_run() -> None:
    damaged = bytearray(CONTENT)
    damaged[16 * 5 + 9] ^= 1
    (line,) = outcome(MemorySpool({stream(): bytes(damaged)})).mismatches
    assert "byte 9 of packet 5" in line


def test_of_a_broken_connection_a_beginning_may_be_stored() -> None:
    result = outcome(MemorySpool({stream(): CONTENT[:160]}), one_client(BROKEN, len(CONTENT) - 5))
    assert (result.stored_packets, result.mismatches) == (10, [])
    assert result.notes == ["client 0 from 127.0.0.1:4711: the connection broke, 160 of 15984 bytes are stored"]


def test_of_a_broken_connection_other_bytes_may_not() -> None:
    (line,) = outcome(MemorySpool({stream(): b"z" * 160}), one_client(BROKEN)).mismatches
    assert "the first difference is at offset 0" in line


def test_a_connection_without_a_whole_packet_leaves_no_stream_and_needs_none() -> None:
    assert outcome(MemorySpool({}), one_client(BROKEN, 15)) == Verification()


def test_an_older_stream_of_the_same_port_is_not_taken_for_ours() -> None:
    old, new = stream("20231114T221319.000000Z"), stream("20231114T221325.000000Z")
    assert outcome(MemorySpool({old: b"old" * 16, stream(): CONTENT, new: b"new" * 16})).mismatches == []


def test_peers_are_named_as_the_daemon_names_them() -> None:
    assert peer_of("127.0.0.1:80") == "127.0.0.1-80"
    assert peer_of("[2001:db8::1]:80") == "2001-db8--1-80"
    assert maybe_accept_time_ns(ACCEPTED) == START_NS + 100_000
    assert maybe_accept_time_ns("pump") is None


def test_bare_segment_files_are_a_spool_too(tmp_path: Path) -> None:
    directory = tmp_path / "streams" / stream()
    directory.mkdir(parents=True)
    for first, end in ((0, 4096), (4096, len(CONTENT))):
        (directory / f"{first:020d}.seg").write_bytes(CONTENT[first:end])
    (directory / "00000000000000000000.idx").write_bytes(b"index")
    view = open_spool(tmp_path)
    assert isinstance(view, FilesView)
    assert outcome(view).mismatches == []
    (directory / f"{4096:020d}.seg").write_bytes(CONTENT[4096:-1] + b"?")
    assert "first difference is at offset 15999" in outcome(view).mismatches[0]


def test_a_directory_that_is_no_spool_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpoolError, match="is no spool"):
        open_spool(tmp_path)
