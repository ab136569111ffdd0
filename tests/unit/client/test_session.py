"""A session against servers as the protocol describes them: in every pair of states, and on random ways."""

from __future__ import annotations

import random

import pytest

from mpserverd.client.buffer import PacketBuffer
from mpserverd.client.errors import EpochError, RefusedError, StreamLostError, StreamTakenError
from mpserverd.client.servers import Servers
from mpserverd.client.session import TRANSITIONS, Event, Loss, Session, State, Terms
from tests.unit.client.spools import HOLE, SIZE, Spool, Wire, packed

SEEDS = 100


def test_every_state_has_its_events_and_no_other() -> None:
    allowed = {
        State.WAITING: {"dial", "close"},
        State.CONNECTING: {"connect", "lose", "close"},
        State.GREETING: {"ok", "lose", "fail", "close"},
        State.STREAMING: {"lose", "fail", "close"},
        State.FAILED: {"close"},
        State.CLOSED: set(),
    }
    for state in State:
        assert {event.value for event in Event if (state, event) in TRANSITIONS} == allowed[state]


# -- all pairs

Outcome = tuple[int, int] | type[Exception]
"""The packet that the client goes on with and how many it holds then; or why it gives up."""

TAKEN = StreamTakenError
FOUND = ("nothing", *(f"ours at {count}" for count in (7, 10, 12, 13, 14, 15, 16)), "other at 7")
"""What a server is found with when the client comes to it."""

PAIRS: dict[str, tuple[Outcome | None, ...]] = {
    # a client that
    "never had an OK": ((0, 5), (7, 5), (10, 5), (12, 5), (13, 5), (14, 5), (15, 5), (16, 5), (7, 5)),
    # a hole where first= is above what the server has; numbered anew where nothing of ours was acknowledged
    "sent 10 to 14": ((0, 5), (10, 5), (10, 5), (12, 3), (13, 2), (14, 1), (15, 0), TAKEN, (7, 5)),
    "had 10 to 12 acknowledged": (None, (13, 2), (13, 2), (13, 2), (13, 2), (14, 1), (15, 0), TAKEN, None),
}
LOST: dict[tuple[str, str], tuple[Outcome, Outcome]] = {
    # None above: by where it happens and ``on_epoch``, with "nothing" and with "other at 7"
    ("home", "raise"): (EpochError, EpochError),
    ("home", "new"): ((0, 2), (0, 2)),
    ("elsewhere", "raise"): ((0, 2), (7, 2)),
    ("elsewhere", "new"): ((0, 2), (7, 2)),
}


def wire_as(client: str, where: str, on_epoch: str) -> tuple[Wire, Spool]:
    """A client that is not connected and has taken packets 0 to 4, and the spool of the server that it finds next."""
    spools = [Spool(1), Spool(2)]
    spools[0].add_epoch(10)
    wire = Wire(spools if where == "elsewhere" else spools[:1], on_epoch)
    wire.put(5)
    if client == "never had an OK":
        return wire, spools[0]
    wire.greet()
    wire.send()
    if client == "had 10 to 12 acknowledged":
        wire.hear(b"ACK 13\n")
    wire.cut()
    if where == "elsewhere":
        wire.down = {0}
    return wire, spools[1] if where == "elsewhere" else spools[0]


@pytest.mark.parametrize("on_epoch", ["raise", "new"])
@pytest.mark.parametrize("where", ["home", "elsewhere"])
@pytest.mark.parametrize("found", FOUND)
@pytest.mark.parametrize("client", PAIRS)
def test_what_a_client_makes_of_what_it_finds(client: str, found: str, where: str, on_epoch: str) -> None:
    wire, spool = wire_as(client, where, on_epoch)
    ours = wire.spools[0].epoch
    spool.epochs.clear()
    if found != "nothing":
        spool.add_epoch(int(found.rpartition(" ")[2]), ours if found.startswith("ours") else None)
    expected = PAIRS[client][FOUND.index(found)] or LOST[where, on_epoch][found != "nothing"]
    if not isinstance(expected, tuple):
        assert wire.connect() is State.FAILED
        assert type(wire.session.error) is expected
        return
    assert wire.connect() is State.STREAMING, wire.session.error
    next_packet, held = expected
    assert (wire.buffer.base, wire.buffer.held) == expected
    wire.send()
    assert spool.packets == [HOLE] * next_packet + list(range(5 - held, 5))
    wire.ack()
    assert wire.buffer.held == 0


# -- several servers


def moved(on_epoch: str = "raise") -> Wire:
    """At the second server after the first one went down, with packets 3 and 4 in flight at the first."""
    wire, _ = wire_as("had 10 to 12 acknowledged", "elsewhere", on_epoch)
    wire.spools[1].add_epoch(7)
    assert wire.connect() is State.STREAMING
    return wire


def test_a_kick_does_not_send_a_client_to_another_server() -> None:
    wire, _ = wire_as("had 10 to 12 acknowledged", "elsewhere", "raise")
    wire.down.clear()
    wire.greet()
    assert (wire.at, wire.buffer.base, wire.buffer.held) == (0, 15, 0)


def test_a_server_that_cannot_help_loses_its_turn() -> None:
    wire = Wire([Spool(1), Spool(2), Spool(3)])
    wire.down = {0, 1}
    wire.put(1)
    for at in (0, 1, 2):
        wire.greet()
        assert wire.at == at
    assert wire.session.state is State.STREAMING


def test_the_hello_that_begins_a_new_epoch_names_the_old_one_and_goes_to_nobody_else() -> None:
    """The first server lost its stream; it is down when the other opening is due, and the second one is as it was."""
    wire, spool = wire_as("had 10 to 12 acknowledged", "home", "new")
    old = spool.epoch
    spool.add_epoch(0)
    wire.greet()
    assert wire.dial() == f"MPS/1 press-7 8 epoch={old} first=13 new=1\n".encode()
    wire.cut()
    assert wire.dial() == f"MPS/1 press-7 8 epoch={old} first=13\n".encode()


def test_a_server_that_is_right_after_all_is_gone_on_with() -> None:
    """It forgot the epoch for one hello only."""
    wire, spool = wire_as("had 10 to 12 acknowledged", "home", "new")
    wire.dial()
    wire.hear(b"ERR epoch not just now\n")
    assert wire.connect() is State.STREAMING
    assert b"new=1" in spool.hellos[-1]
    assert (wire.buffer.base, wire.buffer.held) == (15, 0)


def test_the_bare_hello_goes_only_to_the_server_that_has_not_our_epoch() -> None:
    """It is down when it is asked again; the first one goes on with what it has."""
    wire, _ = wire_as("sent 10 to 14", "elsewhere", "raise")
    wire.spools[1].add_epoch(7)
    wire.greet()
    assert (wire.at, wire.session.state) == (1, State.WAITING)
    assert wire.session.dial_at is not None
    assert wire.session.dial_at <= wire.now  # the same one, at once
    wire.down = {1}
    wire.greet()
    assert wire.at == 1
    wire.down.clear()
    assert wire.connect() is State.STREAMING
    assert wire.at == 0
    assert (wire.buffer.base, wire.buffer.held) == (15, 0)
    assert wire.spools[0].packets == [HOLE] * 10 + list(range(5))


def test_coming_back_to_a_server_stores_nothing_there_twice() -> None:
    """Packets 3 and 4 went to both; the first server's OK says that it has them."""
    wire = moved()
    wire.send()
    wire.cut()
    wire.down = {1}
    wire.put(2)
    assert wire.connect() is State.STREAMING
    assert (wire.at, wire.buffer.base, wire.buffer.held) == (0, 15, 2)
    wire.send()
    wire.ack()
    assert wire.spools[0].packets == [HOLE] * 10 + [0, 1, 2, 3, 4, 5, 6]
    assert wire.spools[1].packets == [HOLE] * 7 + [3, 4]


def test_what_the_second_server_acknowledged_does_not_go_to_the_first() -> None:
    wire = moved()
    wire.put(2)
    wire.send()
    wire.hear(b"ACK 10\n")  # 3, 4 and 5
    wire.down = {1}
    wire.cut()
    wire.spools[0].die()
    wire.spools[0].epochs[wire.spools[0].epoch] = [HOLE] * 10 + [0, 1, 2]
    assert wire.connect() is State.STREAMING
    wire.send()
    assert wire.spools[0].packets == [HOLE] * 10 + [0, 1, 2, 6]


# -- what a server may not say


@pytest.mark.parametrize("on_epoch", ["raise", "new"])
def test_a_server_that_lost_acknowledged_packets_is_an_error_or_a_new_epoch(on_epoch: str) -> None:
    wire, spool = wire_as("had 10 to 12 acknowledged", "home", on_epoch)
    wire.dial()
    wire.hear(f"OK 12 durable {spool.epoch}\n".encode())
    if on_epoch == "raise":
        assert isinstance(wire.session.error, StreamLostError)
        return
    assert wire.connect() is State.STREAMING
    assert spool.hellos[-1] == b"MPS/1 press-7 8 new=1\n"
    assert (wire.buffer.base, wire.buffer.held) == (0, 2)


def test_a_server_that_contradicts_itself_for_ever_ends_the_client() -> None:
    wire, spool = wire_as("had 10 to 12 acknowledged", "home", "new")
    ours = spool.epoch
    for _ in range(2):
        wire.dial()
        wire.hear(f"OK 12 durable {ours}\n".encode())
    assert isinstance(wire.session.error, StreamLostError)


def test_an_epoch_that_is_refused_to_a_bare_hello_ends_the_client() -> None:
    wire, _ = wire_as("had 10 to 12 acknowledged", "home", "new")
    for _ in range(2):
        wire.dial()
        wire.hear(b"ERR epoch never\n")
    assert isinstance(wire.session.error, RefusedError)


@pytest.mark.parametrize(
    ("said", "loss"),
    [
        (b"ACK 13\n", Loss.NONSENSE),
        (b"OK 10 durable 0000000000000001\nOK 10 durable 0000000000000001\n", Loss.NONSENSE),
        (b"OK 10 durable 0000000000000001\nACK 11\n", Loss.NONSENSE),
        (b"hello\n", Loss.NONSENSE),
        (b"x" * 600, Loss.NONSENSE),
        (b"", Loss.ENDED),
        (b"BYE stopping\n", Loss.BYE),
        (b"OK 10 durable 0000000000000001\nBYE kicked\n", Loss.BYE),
        (b"ERR busy\n", Loss.REFUSED),
    ],
)
def test_what_ends_a_connection_and_not_the_client(said: bytes, loss: Loss) -> None:
    wire = Wire([Spool()])
    wire.put(5)
    wire.dial()
    wire.hear(said)
    assert wire.session.state is State.WAITING
    assert wire.session.losses == {loss: 1}
    assert wire.buffer.held == 5


@pytest.mark.parametrize("code", ["syntax", "version", "packet-size", "token", "epoch", "never-heard-of"])
def test_a_final_refusal_ends_the_client(code: str) -> None:
    wire = Wire([Spool()])
    wire.dial()
    wire.hear(f"ERR {code} no\n".encode())
    assert isinstance(wire.session.error, RefusedError)
    assert wire.session.error.code == code
    assert wire.session.dial_at is None


def test_another_device_that_stored_packets_under_our_id_is_noticed() -> None:
    """Ours has 80 packets that it never sent; the other one stored 50 meanwhile."""
    wire = Wire([Spool()])
    wire.greet()
    wire.put(100)
    wire.send(20 * SIZE)
    wire.cut()
    wire.spool.take(bytes(packed(range(1000, 1050))))
    assert wire.connect() is State.FAILED
    assert isinstance(wire.session.error, StreamTakenError)
    assert wire.buffer.held == 100


def test_packets_that_were_sent_on_any_connection_of_the_epoch_may_be_acknowledged() -> None:
    wire = Wire([Spool()])
    wire.greet()
    wire.put(10)
    wire.send()
    wire.cut()
    wire.spool.die()
    wire.greet()
    wire.send(3 * SIZE)  # the server had the other seven in a connection that it takes up late
    wire.cut()
    wire.spool.epochs[wire.spool.epoch] = list(range(10))
    assert wire.connect() is State.STREAMING
    assert wire.buffer.held == 0


# -- dropping


def test_what_is_dropped_before_the_first_ok_is_a_hole() -> None:
    wire = Wire([Spool()], capacity=16)
    for _ in range(10):
        wire.put(2)
    assert wire.connect() is State.STREAMING
    wire.send()
    assert wire.spool.packets == [HOLE] * wire.session.dropped + list(range(wire.session.dropped, 20))


@pytest.mark.parametrize("when", ["greeting", "streaming", "half sent"])
def test_the_oldest_in_the_middle_are_dropped_and_nothing_else(when: str) -> None:
    wire = Wire([Spool()], capacity=16)
    wire.greet()
    wire.put(8)
    wire.send()
    wire.ack()
    if when == "greeting":
        wire.cut()
        hello = wire.dial()
        assert hello is not None
    wire.put(16)
    if when == "half sent":
        wire.send(2 * SIZE - 3)
    for _ in range(2):
        wire.put(2)
    if when == "greeting":
        wire.hear(wire.spool.answer(hello))
    assert wire.session.losses[Loss.RENUMBERED] == 1
    assert wire.session.losses[Loss.NONSENSE] == 0
    assert wire.connect() is State.STREAMING
    wire.send()
    wire.ack()
    assert wire.buffer.held == 0
    gone = range(8, 8 + wire.session.dropped)
    kept = [HOLE if number in gone else number for number in range(28)]
    if when == "half sent":
        kept[8] = 8  # it was on its way
    assert wire.spool.packets == kept


# -- times


def test_a_pause_is_short_again_after_an_acknowledgement_or_a_connection_that_lived() -> None:
    wire = Wire([Spool()])
    wire.down = {0}
    for _ in range(12):
        wire.greet()
    wire.down.clear()
    wire.greet()
    wire.now += 3600.0  # idle, and nothing to acknowledge
    wire.cut()
    assert wire.session.dial_at is not None
    assert wire.session.dial_at <= wire.now + 0.1
    for _ in range(12):
        wire.greet()
        wire.cut()  # at once: such a server is asked ever more rarely
    assert wire.session.dial_at > wire.now + 2.0


def test_a_server_is_not_asked_before_the_time_it_named_and_others_are() -> None:
    wire = Wire([Spool(1), Spool(2)])
    wire.greet()
    wire.hear(b"BYE stopping retry=60\n")
    wire.greet()
    assert (wire.at, wire.now < 1) == (1, True)
    wire.hear(b"BYE superseded retry=30\n")  # no server is better then
    wire.greet()
    assert (wire.at, 30 <= wire.now < 31) == (1, True)


def test_after_bye_idle_a_client_comes_back_when_it_has_something() -> None:
    wire = Wire([Spool()])
    wire.greet()
    wire.hear(b"BYE idle\n")
    assert wire.session.dial_at is None
    wire.put(1)
    assert wire.session.dial_at is not None


def test_each_wait_has_its_deadline() -> None:
    terms = Terms("press-7", SIZE, connect_timeout_s=1, answer_timeout_s=2, ack_timeout_s=3)
    session = Session(terms, PacketBuffer(SIZE, 100 * SIZE), Servers([("server", 1)], (0.1, 10.0), 1))
    for loss, now in ((Loss.CONNECT_TIMEOUT, 1.0), (Loss.ANSWER_TIMEOUT, 2.0), (Loss.ACK_TIMEOUT, 3.0)):
        session.dial(0.0)
        if loss is not Loss.CONNECT_TIMEOUT:
            session.connected(0.0)
        if loss is Loss.ACK_TIMEOUT:
            session.receive(b"OK 0 durable 0000000000000001\n", 0.0)
            assert session.deadline is None  # nothing is owed
            session.buffer.append(packed(range(5)))
            session.sent(len(session.outgoing(1000)), 0.0)
        assert session.deadline == now
        session.expire(now - 0.01)
        assert session.losses[loss] == 0
        session.expire(now)
        assert (session.state, session.losses[loss]) == (State.WAITING, 1)


def test_an_acknowledgement_begins_the_wait_for_the_next_one() -> None:
    wire = Wire([Spool()])
    wire.greet()
    wire.put(5)
    wire.send()
    wire.now = 50.0
    wire.hear(b"ACK 3\n")
    assert wire.session.deadline == 110.0
    wire.hear(b"ACK 5\n")
    assert wire.session.deadline is None


# -- random ways


@pytest.mark.parametrize("is_replaced", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_on_any_way_a_packet_is_kept_once_in_an_epoch_and_missing_nowhere(count: int, is_replaced: bool) -> None:
    """Servers that fail, die, lose what is not synced, are replaced by empty ones; a client that drops and moves."""
    for seed in range(SEEDS):
        chance = random.Random(seed)
        wire = Wire([Spool(number + 1) for number in range(count)], "new" if is_replaced else "raise", capacity=64)
        lost: set[int] = set()
        ways = ["put", "put", "send", "send", "send part", "ack", "greet", "greet", "cut", "die", "down", "up", "drop"]
        for _ in range(120):
            way(wire, chance.choice([*ways, "replace"] if is_replaced else ways), chance, lost)
        wire.down.clear()
        for _ in range(40):
            if wire.connect() is State.STREAMING:
                wire.send()
                wire.ack()
        assert (wire.session.error, wire.buffer.held) == (None, 0), f"seed {seed}"
        kept = [
            [packet for packet in epoch if packet != HOLE] for spool in wire.spools for epoch in spool.epochs.values()
        ]
        for packets in kept:
            assert packets == sorted(set(packets)), f"seed {seed}"
        assert set(range(wire.made)) <= lost.union(*kept), f"seed {seed}"


def way(wire: Wire, name: str, chance: random.Random, lost: set[int]) -> None:
    session, buffer = wire.session, wire.buffer
    before = buffer.base_place
    match name:
        case "put" if buffer.room:
            wire.put(chance.randint(1, min(8, buffer.room)))
        case "drop" if not buffer.room:
            wire.put(chance.randint(1, 8))
            lost |= set(range(before, buffer.base_place))
        case "send":
            wire.send()
        case "send part":
            wire.send(chance.randrange(1, 6 * SIZE))
        case "ack" if session.state is State.STREAMING:
            wire.ack()
        case "greet" if session.state is State.WAITING:
            wire.greet()
        case "cut":
            wire.cut()
        case "down":
            wire.down.add(chance.randrange(len(wire.spools)))
        case "up":
            wire.down.clear()
        case "die" | "replace":
            wire.cut()
            spool = chance.choice(wire.spools)
            spool.die()
            if name == "replace":
                lost |= {packet for epoch in spool.epochs.values() for packet in epoch}
                spool.epochs.clear()
