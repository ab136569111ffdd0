"""An mps connection in a worker: the hello is consumed exactly, OK goes out once, ACKs say what is durable.

A worker that dies is one that is simply not used any more; its successor has the tables and the socket.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mpserverd.arena.state import CloseReason, Str
from tests.unit.worker.mps_rig import HELLO, Rig

OK = b"OK 0 durable 0000000000001234\n"
PACKETS = bytes(range(64))


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


def taken(rig: Rig) -> bytes:
    """The stream's bytes as the arena has them."""
    window = rig.workers[-1].window
    return b"".join(bytes(window.data[at : at + n]) for at, n in window.pieces(0, window.position))


def test_packets_behind_the_hello_are_the_stream_and_the_hello_is_not(rig: Rig) -> None:
    rig.client.sendall(HELLO + PACKETS)
    worker = rig.worker()
    assert worker.read() is CloseReason.NONE
    assert taken(rig) == PACKETS
    assert (rig.word(Str.HANDSHAKE), rig.word(Str.SOCKET)) == (len(HELLO), len(HELLO) + len(PACKETS))
    assert rig.client.recv(100) == OK


@pytest.mark.parametrize("consumed", range(len(HELLO) + 1))
def test_a_worker_that_died_anywhere_in_the_hello_leaves_the_rest_of_it(rig: Rig, consumed: int) -> None:
    rig.client.sendall(HELLO + PACKETS)
    assert len(rig.server.recv(consumed)) == consumed
    rig.worker().read()
    assert taken(rig) == PACKETS
    assert rig.word(Str.HANDSHAKE) == len(HELLO)
    assert rig.client.recv(100) == OK


def test_ok_is_said_once_whoever_dies_and_the_next_line_begins_anew(rig: Rig) -> None:
    rig.client.sendall(HELLO + PACKETS)
    rig.worker().read()
    assert rig.client.recv(100) == OK
    successor = rig.worker()
    successor.read()
    successor.check_and_offer()
    rig.make_durable(len(PACKETS))
    assert successor.acknowledge()
    assert rig.client.recv(100) == b"\nACK 4\n"


def test_an_acknowledgement_names_what_is_durable_and_nothing_more(rig: Rig) -> None:
    rig.client.sendall(HELLO + PACKETS)
    worker = rig.worker()
    worker.read()
    worker.check_and_offer()
    assert not worker.acknowledge()
    rig.make_durable(32)
    assert not worker.acknowledge()
    assert rig.client.recv(100) == OK + b"ACK 2\n"
    assert rig.word(Str.ACKED) == 32
    rig.make_durable(64)
    assert worker.acknowledge()
    assert rig.client.recv(100) == b"ACK 4\n"
    assert rig.word(Str.ACKED) == 64


def test_a_client_that_reads_nothing_gets_the_newest_acknowledgement_and_costs_no_memory(rig: Rig) -> None:
    rig.client.sendall(HELLO)
    worker = rig.worker()
    assert worker.answers is not None
    said = 0
    while worker.answers.acknowledge(said + 1):
        said += 1
    for later in range(said + 2, said + 2000):
        assert not worker.answers.acknowledge(later)
    lines = b""
    while not worker.answers.acknowledge(said + 1999) or not lines.endswith(b"ACK %d\n" % (said + 1999)):
        lines += rig.client.recv(1 << 20)
    numbers = [int(line.split()[1]) for line in lines.splitlines()[1:]]
    assert numbers == sorted(numbers)
    assert len([number for number in numbers if number > said + 1]) <= 2


def test_the_end_of_the_client_waits_until_everything_is_acknowledged(rig: Rig) -> None:
    rig.client.sendall(HELLO + PACKETS + b"torn")
    rig.client.shutdown(1)
    worker = rig.worker()
    reason = CloseReason.NONE
    while reason is CloseReason.NONE:
        reason = worker.read()
    assert reason is CloseReason.ENDED
    assert not worker.finish(reason)
    rig.make_durable(len(PACKETS))
    assert worker.finish(reason)
    assert rig.client.recv(100) == OK + b"ACK 4\n"
    assert rig.word(Str.TRUNCATED) == 4


@pytest.mark.parametrize(
    ("reason", "line"),
    [
        (CloseReason.KICKED, b"BYE kicked\n"),
        (CloseReason.SUPERSEDED, b"BYE superseded retry=8\n"),
        (CloseReason.IDLE, b"BYE idle\n"),
        (CloseReason.QUARANTINED, b"BYE quarantined\n"),
        (CloseReason.RESET, b""),
    ],
)
def test_who_has_to_go_hears_why_without_waiting_for_the_disk(rig: Rig, reason: CloseReason, line: bytes) -> None:
    rig.client.sendall(HELLO + PACKETS)
    worker = rig.worker()
    worker.read()
    worker.retry_s = 8 if reason is CloseReason.SUPERSEDED else 0
    assert worker.finish(reason)
    worker.close(shutdown=True)
    received = b""
    while more := rig.client.recv(100):
        received += more
    assert received == OK + line


def test_a_client_that_is_gone_disturbs_nobody(rig: Rig) -> None:
    rig.client.sendall(HELLO + PACKETS)
    worker = rig.worker()
    worker.read()
    rig.client.close()
    rig.make_durable(32)
    worker.check_and_offer()
    for _ in range(3):
        worker.acknowledge()
    assert worker.read() in (CloseReason.ENDED, CloseReason.RESET)
