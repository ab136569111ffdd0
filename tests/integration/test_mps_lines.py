"""What the daemon says on an mps listener, line by line: docs/protocol.md held against the real thing.

The client here knows the grammar of that page and imports nothing of the protocol from the project. One daemon serves
most tests; each uses client ids of its own, and after each one the ledger balances. ``MPSERVERD_TEST_SEED`` repeats
random choices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import pathlib
import random
import re
import selectors
import signal
import socket
import time
from collections.abc import Iterator, Sequence

import pytest

from tests.integration.driver import DEADLINE_S, SLOWNESS, Daemon
from tests.integration.oracle import StoredStream, stored_streams
from tests.integration.senders import payload

SEED = int(os.environ.get("MPSERVERD_TEST_SEED", random.SystemRandom().randrange(2**32)))
OK = re.compile(rb"OK (0|[1-9][0-9]*) (durable|stored) ([0-9a-f]{16})\n")
ACK = re.compile(rb"ACK (0|[1-9][0-9]*)\n")
BYE = re.compile(rb"BYE ([a-z-]+)(?: retry=([0-9]+))?\n")
ERR = re.compile(rb"ERR ([a-z-]+) ([ -~]*)\n")
NOBODYS = "0123456789abcdef"
SIZE = 16


class Peer:
    """One connection, byte by byte."""

    def __init__(self, port: int, said: bytes = b"", *, source: str = "127.0.0.1", receive_buffer: int = 0) -> None:
        self.sock = socket.socket()
        self.sock.settimeout(DEADLINE_S * SLOWNESS)
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.bind((source, 0))
        self.sock.connect(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._rest = b""
        self.send(said)

    def send(self, said: bytes) -> None:
        self.sock.sendall(said)

    def line(self) -> bytes:
        """The next line with its LF; what is left when the connection ends."""
        while b"\n" not in self._rest:
            more = self.sock.recv(4096)
            if not more:
                line, self._rest = self._rest, b""
                return line
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        return line + b"\n"

    def ok(self) -> tuple[int, str]:
        """Next packet and epoch."""
        line = self.line()
        found = OK.fullmatch(line)
        assert found is not None, line
        assert found[2] == b"durable"
        return int(found[1]), found[3].decode()

    def err(self) -> tuple[str, str]:
        """Code and text; nothing comes after it, and the connection ends."""
        line = self.line()
        found = ERR.fullmatch(line)
        assert found is not None, line
        assert len(line) <= 512
        assert self.line() == b""
        self.sock.close()
        return found[1].decode(), found[2].decode()

    def wait_for_ack(self, index: int) -> int:
        """Acknowledgements up to this one; they rise. Returns how many lines that were."""
        last = -1
        for count in itertools.count(1):
            found = ACK.fullmatch(self.line())
            assert found is not None and last < int(found[1]) <= index, (found, last, index)
            last = int(found[1])
            if last == index:
                return count
        raise AssertionError

    def bye(self) -> tuple[str, int | None]:
        """Reason and retry; acknowledgements may come first."""
        while ACK.fullmatch(line := self.line()):
            pass
        found = BYE.fullmatch(line)
        assert found is not None, line
        assert self.line() == b""
        self.sock.close()
        return found[1].decode(), None if found[2] is None else int(found[2])

    def half_close(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def finish(self, index: int | None = None) -> None:
        """Half-close; the last acknowledgement is ``index``, and then the server closes."""
        self.half_close()
        if index is not None:
            self.wait_for_ack(index)
        assert self.line() == b""
        self.sock.close()


def listener(name: str, **more: object) -> dict[str, object]:
    return {"name": name, "address": "127.0.0.1:0", "protocol": "mps", "packet_size": 0, **more}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    settings = {
        "server": {"max_clients": 60},
        "buffers": {"bytes": "16 MiB"},
        "listener": [
            listener("mps"),
            listener("sized", packet_size=SIZE),
            listener("hasty", handshake_timeout_s=0.3),
            listener("idle", idle_timeout_s=0.3),
            listener("lonely", max_connections_per_address=1),
        ],
    }
    with Daemon(tmp_path_factory.mktemp("mps_lines"), settings) as daemon:
        yield daemon


@pytest.fixture
def daemon(shared: Daemon) -> Iterator[Daemon]:
    """The shared one; when the test is over, so are its connections, and the accounts balance."""
    yield shared
    shared.wait_until_quiet()
    assert shared.ledger()["truncated_bytes"] >= 0


def stream_of(daemon: Daemon, client_id: str) -> StoredStream:
    """The newest epoch of a client's stream on disk."""
    daemon.wait_until_quiet()
    return [stream for stream in stored_streams(daemon.spool) if stream.name == client_id][-1]


# -- refusals

LONG = b"M" * 512


@pytest.mark.parametrize(
    ("said", "code", "text"),
    [
        (b"GET / HTTP/1.1\r\n", "syntax", "a hello begins with MPS/1"),
        (b"\n", "syntax", "words are separated by one space"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n", "syntax", "a hello is printable ASCII"),
        (b"MPS/1 line-a 16 speed=9\n", "syntax", "unknown option; known are token, epoch, first, new"),
        (b"MPS/1 line-a 16 new=1 new=1\n", "syntax", "new= is there twice"),
        (b"MPS/1 line-a\n", "syntax", "MPS/1 is followed by a client id and a packet size"),
        (b"MPS/2 line-a 16\n", "version", "this server speaks MPS/1"),
        (b"MPS/1 " + LONG[:505] + b"\n", "syntax", "MPS/1 is followed by a client id and a packet size"),
        (LONG + b"\n", "line-too-long", "a hello has at most 512 bytes"),
        (LONG, "line-too-long", "a hello has at most 512 bytes"),
        (b"MPS/1 -a 16\n", "client-id", "a client id is 1 to 64 letters, digits, dots, dashes and _, the first"),
        (b"MPS/1 line-a 65537\n", "packet-size", "a packet has 1 to 65536 bytes"),
        (b"MPS/1 line-a 0\n", "packet-size", "a packet has 1 to 65536 bytes"),
        (b"MPS/1 line-a 16 first=4611686018427387905\n", "first", "first is a number of at most 4611686018427387904"),
        (b"MPS/1 line-a 16 first=288230376151711745\n", "first", "first times the packet size is at most"),
        (b"MPS/1 line-a 16 token=" + b"t" * 129 + b"\n", "token", "a token is 1 to 128 printable characters"),
    ],
)
def test_a_wrong_hello_is_told_why_closed_and_counted(daemon: Daemon, said: bytes, code: str, text: str) -> None:
    before, closed = daemon.counter(f"hello-{code}"), daemon.counter("refused")
    streams = daemon.streams()
    answer = Peer(daemon.port("mps"), said + b"packets behind it" * 10).err()
    assert answer[0] == code and answer[1].startswith(text)
    daemon.wait_until_connected(0)
    assert daemon.counter(f"hello-{code}") == before + 1
    assert daemon.counter("refused") == closed + 1
    assert daemon.streams() == streams


def test_a_listener_with_a_packet_size_takes_no_other(daemon: Daemon) -> None:
    assert Peer(daemon.port("sized"), b"MPS/1 sized 15\n").err() == (
        "packet-size",
        "packets of 16 bytes are taken here, not 15",
    )
    peer = Peer(daemon.port("sized"), b"MPS/1 sized 16\n")
    assert peer.ok()[0] == 0
    peer.finish()


@pytest.mark.parametrize("said", [b"", b"MPS/1 slow 16"], ids=["silent", "half-a-line"])
def test_a_slow_handshake_is_told_so(daemon: Daemon, said: bytes) -> None:
    before = daemon.counter("hello-timeout")
    assert Peer(daemon.port("hasty"), said).err() == ("timeout", "no whole hello came in time")
    assert daemon.counter("hello-timeout") == before + 1


def test_bytes_that_trickle_in_do_not_make_the_handshake_longer(daemon: Daemon) -> None:
    peer = Peer(daemon.port("hasty"))
    begin = time.monotonic()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        while time.monotonic() - begin < DEADLINE_S * SLOWNESS and not peer_has_heard(peer):
            peer.send(b"x")
    assert peer.line().startswith(b"ERR timeout ")
    peer.sock.close()


def peer_has_heard(peer: Peer, wait_s: float = 0.05) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(peer.sock, selectors.EVENT_READ)
        return bool(selector.select(wait_s))


def test_too_many_connections_are_told_so(daemon: Daemon) -> None:
    port = daemon.port("lonely")
    first = Peer(port, b"MPS/1 lonely 16\n")
    first.ok()
    before = daemon.counter("refused-address-limit")
    second = Peer(port)  # its hello would make the close a reset, which may overtake the line
    assert second.err() == ("busy", "nobody is let in now: address-limit")
    assert daemon.counter("refused-address-limit") == before + 1
    first.finish()


def test_a_storer_that_stands_still_makes_hellos_come_back_later(tmp_path: pathlib.Path) -> None:
    settings = {"server": {"heartbeat_timeout_s": 120.0}, "listener": [listener("mps")]}
    with Daemon(tmp_path, settings) as daemon:
        port = daemon.port("mps")
        storer = daemon.kill("storer", signal.SIGSTOP)
        try:
            peer = Peer(port, b"MPS/1 patient 16\n")
            assert peer.err() == ("unavailable", "the stream cannot be opened now; come back later")
        finally:
            os.kill(storer, signal.SIGCONT)
        assert daemon.counter("hello-unavailable") == 1
        peer = Peer(port, b"MPS/1 patient 16\n" + payload(1, 32))
        assert peer.ok()[0] == 0
        peer.finish(2)
        daemon.wait_until_quiet()
        assert daemon.ledger()["acked_bytes"] == 32


# -- how a hello and packets may be cut


def test_a_hello_comes_in_single_bytes(daemon: Daemon) -> None:
    peer = Peer(daemon.port("mps"))
    for byte in b"MPS/1 single-bytes 4\nabcdefgh":
        peer.send(bytes((byte,)))
    assert peer.ok()[0] == 0
    peer.finish(2)
    assert stream_of(daemon, "single-bytes").content == b"abcdefgh"


def test_a_carriage_return_before_the_end_of_the_line_is_no_part_of_it(daemon: Daemon) -> None:
    peer = Peer(daemon.port("mps"), b"MPS/1 crlf 4\r\n\r\n\r\n")
    assert peer.ok()[0] == 0
    peer.finish(1)
    assert stream_of(daemon, "crlf").content == b"\r\n\r\n"


def test_packets_may_come_with_the_hello(daemon: Daemon) -> None:
    content = payload(3, 300_000)
    peer = Peer(daemon.port("mps"), b"MPS/1 pipelined 300 token=anything\n" + content)
    assert peer.ok()[0] == 0
    peer.finish(1000)
    assert stream_of(daemon, "pipelined").content == content


def test_a_hello_as_long_as_it_can_be_is_taken(daemon: Daemon) -> None:
    client_id = b"L" * 64
    said = b"MPS/1 %s 65536 token=%s epoch=%s first=0 new=1\n" % (client_id, b"t" * 128, NOBODYS.encode())
    peer = Peer(daemon.port("mps"), said + b"x" * 65_536)
    assert peer.ok()[0] == 0
    peer.finish(1)


def test_an_incomplete_packet_at_the_end_is_cut_and_comes_again(daemon: Daemon) -> None:
    before = daemon.ledger()["truncated_bytes"]
    peer = Peer(daemon.port("mps"), b"MPS/1 half 10\n" + b"a" * 10 + b"b" * 9)
    _, epoch = peer.ok()
    peer.finish(1)
    daemon.wait_until_quiet()
    assert daemon.ledger()["truncated_bytes"] == before + 9
    peer = Peer(daemon.port("mps"), b"MPS/1 half 10 epoch=%s first=1\n" % epoch.encode() + b"b" * 10)
    assert peer.ok() == (1, epoch)
    peer.finish(2)
    assert stream_of(daemon, "half").content == b"a" * 10 + b"b" * 10


# -- numbering, in all pairs

STATES = ("unknown", "empty", "some", "retired", "two-epochs")
EPOCHS = ("absent", "right", "wrong", "older")
FIRSTS = ("absent", "zero", "below", "at", "above")
KEPT, RETIRED_KEPT = 20, 300


@dataclasses.dataclass
class Kept:
    """What the server must have of one epoch."""

    epoch: str
    packet_size: int
    pieces: list[tuple[int, bytes]]
    """Index of the first packet, and the bytes; between two pieces there is a hole."""

    @property
    def next_packet(self) -> int:
        first, content = self.pieces[-1]
        return first + len(content) // self.packet_size


@dataclasses.dataclass
class Case:
    """One client id: the state that its stream is brought into, and the hello that follows."""

    number: int
    state: str
    epoch: str
    first: str
    new: bool
    right_size: bool
    kept: list[Kept] = dataclasses.field(default_factory=list)
    epochs: list[str] = dataclasses.field(default_factory=lambda: [NOBODYS])
    """All that it was told of, oldest first; the last one is right."""

    @property
    def client_id(self) -> str:
        return f"pair-{self.number}"

    @property
    def size(self) -> int:
        return 1000 if self.state == "retired" else SIZE

    @property
    def said_size(self) -> int:
        return self.size if self.right_size else self.size + 8

    @property
    def said_epoch(self) -> str | None:
        known = {"absent": None, "right": self.epochs[-1], "wrong": "fedcba9876543210", "older": self.epochs[0]}
        return known[self.epoch]

    @property
    def next_packet(self) -> int:
        return self.kept[-1].next_packet if self.kept else 0

    @property
    def said_first(self) -> int | None:
        at = self.next_packet
        return {"absent": None, "zero": 0, "below": max(at - 1, 0), "at": at, "above": at + 7}[self.first]

    def hello(self) -> bytes:
        words = ["MPS/1", self.client_id, str(self.said_size)]
        words += [] if self.said_epoch is None else [f"epoch={self.said_epoch}"]
        words += [] if self.said_first is None else [f"first={self.said_first}"]
        return " ".join(words + ["new=1"] * self.new).encode() + b"\n"

    def expected(self) -> tuple[str, int, str | None]:
        """By the table in docs/protocol.md: OK, next packet, epoch (None: a fresh one); or the code of an ERR."""
        said, first = self.said_epoch, self.said_first
        current = self.kept[-1].epoch if self.kept else None
        if self.new and (current is None or said != current):
            return "OK", 0, None
        if current is None:
            if said is None:
                return "OK", first or 0, None
            return ("OK", 0, said) if first == 0 else ("epoch", 0, None)
        if not self.right_size:
            return "packet-size", 0, None
        if said not in (None, current):
            return "epoch", 0, None
        return "OK", max(self.next_packet, first or 0), current

    def sends(self, epoch: str, packet_size: int, first: int, count: int) -> bytes:
        """The packets that it sends next, which are to be kept."""
        content = payload(self.number * 10 + len(self.kept) + first, count * packet_size)
        if not self.kept or self.kept[-1].epoch != epoch:
            self.kept.append(Kept(epoch, packet_size, [(0, b"")]))
        self.kept[-1].pieces.append((first, content))
        return content


def in_groups(all_of_them: Sequence[Case], count: int = 50) -> Iterator[Sequence[Case]]:
    for at in range(0, len(all_of_them), count):
        yield all_of_them[at : at + count]


def converse(port: int, group: Sequence[Case], hellos: Sequence[bytes], count: int) -> list[tuple[Peer, bytes]]:
    """All say hello, and who is let in sends so many packets; at the same time, since a commit takes as long for one
    as for all. Returns the first line that each one got, when all is acknowledged."""
    peers = [Peer(port, hello) for hello in hellos]
    lines = [peer.line() for peer in peers]
    ends: list[int | None] = []
    for case, hello, line, peer in zip(group, hellos, lines, peers, strict=True):
        found = OK.fullmatch(line)
        if found is not None:
            first, epoch = int(found[1]), found[3].decode()
            case.epochs.append(epoch)
            peer.send(case.sends(epoch, int(hello.split()[2]), first, count) if count else b"")
            peer.half_close()
        ends.append(int(found[1]) + count if found is not None and count else None)
    for peer, end in zip(peers, ends, strict=True):
        if end is not None:
            peer.wait_for_ack(end)
        assert peer.line() == b""
        peer.sock.close()
    return list(zip(peers, lines, strict=True))


def bring_into_state(port: int, cases: Sequence[Case]) -> None:
    steps = {
        "unknown": [],
        "empty": [("", 0)],
        "some": [("", 20)],
        "retired": [("", 300)],
        "two-epochs": [("", 5), (" new=1", 20)],
    }
    for state, each in steps.items():
        those = [case for case in cases if case.state == state]
        for new, count in each:
            for group in in_groups(those):
                hellos = [f"MPS/1 {case.client_id} {case.size}{new}\n".encode() for case in group]
                for _, line in converse(port, group, hellos, count):
                    assert line.startswith(b"OK 0 "), line
    for case in cases:
        case.epochs = case.epochs[-2:] if case.state == "two-epochs" else case.epochs


def assert_kept(case: Case, stored: dict[str, StoredStream]) -> None:
    """Each epoch that the model has is on disk, with its holes, less what retention took; and no other."""
    assert sorted(stored) == sorted(kept.epoch for kept in case.kept), case
    for kept in case.kept:
        on_disk = stored[kept.epoch]
        assert on_disk.packet_size == kept.packet_size
        assert on_disk.durable == kept.next_packet * kept.packet_size, case
        whole = b"".join(content for _, content in kept.pieces)
        assert whole.endswith(on_disk.content), case
        assert len(on_disk.content) == len(whole) or (case.state == "retired" and on_disk.first_offset > 0), case


def test_every_hello_in_every_state_is_answered_as_the_manual_says(tmp_path: pathlib.Path) -> None:
    choices = itertools.product(STATES, EPOCHS, FIRSTS, (False, True), (True, False))
    cases = [Case(number, *choice) for number, choice in enumerate(choices)]
    settings = {
        "server": {"max_clients": 60},
        "buffers": {"bytes": "16 MiB"},
        "spool": {"segment_bytes": "64 KiB", "max_bytes_per_stream": "64 KiB", "commit_interval_s": 0.02},
        "listener": [listener("mps")],
    }
    with Daemon(tmp_path, settings) as daemon:
        port = daemon.port("mps")
        bring_into_state(port, cases)
        daemon.wait_until_quiet()
        retired = [stream for stream in daemon.streams() if stream["packet_size"] == 1000]
        assert retired and all(stream["first_offset"] > 0 for stream in retired)
        lost = 0
        for group in in_groups(cases):
            models = [case.expected() for case in group]
            nexts = [case.next_packet for case in group]
            hellos = [case.hello() for case in group]
            before = [set(case.epochs) for case in group]
            answers = [line for _, line in converse(port, group, hellos, 2)]
            for case, (kind, first, epoch), at, known, hello, line in zip(
                group, models, nexts, before, hellos, answers, strict=True
            ):
                what = (case.state, hello, line)
                if kind != "OK":
                    assert line.startswith(f"ERR {kind} ".encode()), what
                    continue
                assert line.startswith(b"OK %d durable " % first), what
                answered = line.split()[3].decode()
                assert answered == epoch if epoch is not None else answered not in known, what
                lost += (first - (at if epoch is not None and case.state != "empty" else 0)) * case.said_size
        daemon.wait_until_quiet()
        assert daemon.ledger()["lost_bytes"] == lost
        stored: dict[str, dict[str, StoredStream]] = {case.client_id: {} for case in cases}
        for stream in stored_streams(daemon.spool):
            stored[stream.name][stream.epoch] = stream
        for case in cases:
            assert_kept(case, stored[case.client_id])
