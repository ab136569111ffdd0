"""What a death of the supervisor may cost, and nothing else is excused."""

from __future__ import annotations

import dataclasses

import pytest

from mpserverd.load.chaos_judge import NOTICED_NS_MAX, QUEUED_NS_MAX, judge, peers_in
from mpserverd.load.chaos_sent import ENDED, RESET, SentConnection, SentStream, from_plain

KILL_NS = 50_000_000_000
CUT = SentConnection(4711, 480, 960, 5, KILL_NS - 1_000_000, KILL_NS + 1_000_000, "ECONNRESET")
FINE = SentConnection(4710, 0, 480, 3, 1, 2, ENDED)


def stream(*connections: SentConnection, client: int = 0, name: str = "") -> SentStream:
    return SentStream(client, 0, name, f"127.1.0.{client + 1}", 24, connections[-1].end, "", connections)


def cut_of(*streams: SentStream, kills: tuple[int, ...] = (KILL_NS,), known: set[str] | None = None) -> int:
    return sum(len(each.skipped) for each in judge(streams, kills, known or set()))


def test_a_connection_that_fell_with_the_supervisor_and_that_nobody_knew_is_cut_at_its_accept() -> None:
    (judged,) = judge([stream(FINE, CUT, name="a")], [KILL_NS], set())
    assert judged.skipped == (1,) and not judged.broken
    assert (judged.wanted_bytes, judged.skipped_socket_bytes, judged.skipped_torn_bytes) == (480, 485, 5)


@pytest.mark.parametrize("how", ["FIN", "ECONNRESET", "EPIPE", "ETIMEDOUT"])
def test_however_it_broke(how: str) -> None:
    assert cut_of(stream(dataclasses.replace(CUT, how=how))) == 1


def test_one_that_the_daemon_knew_is_a_disconnect() -> None:
    (judged,) = judge([stream(CUT)], [KILL_NS], {"127.1.0.1:4711"})
    assert judged.broken == "ECONNRESET" and not judged.skipped


def test_each_kill_explains_one_connection_only() -> None:
    both = (stream(CUT), stream(CUT, client=1))
    assert cut_of(*both) == 1
    assert cut_of(*both, kills=(KILL_NS - 10, KILL_NS)) == 2
    assert cut_of(*both, kills=()) == 0


@pytest.mark.parametrize(
    ("opened_ns", "closed_ns"),
    [(KILL_NS - 10, KILL_NS - 1), (KILL_NS - 10, KILL_NS + NOTICED_NS_MAX + 1), (KILL_NS + 1, KILL_NS + 2)],
)
def test_one_that_broke_at_another_time_is_a_disconnect(opened_ns: int, closed_ns: int) -> None:
    assert cut_of(stream(dataclasses.replace(CUT, opened_ns=opened_ns, closed_ns=closed_ns))) == 0


def test_one_that_ended_in_order_is_never_excused() -> None:
    assert cut_of(stream(dataclasses.replace(CUT, how=ENDED))) == 0


@pytest.mark.parametrize(("waited_ns", "excused"), [(0, 1), (QUEUED_NS_MAX, 1), (QUEUED_NS_MAX + 1, 0)])
def test_what_was_sent_and_reset_before_the_accept_may_fall_with_it(waited_ns: int, excused: int) -> None:
    gone = dataclasses.replace(CUT, how=RESET, opened_ns=1, closed_ns=KILL_NS - waited_ns)
    assert cut_of(stream(gone)) == excused
    assert cut_of(stream(gone), known={"127.1.0.1:4711"}) == 0


def test_the_log_names_peers_with_and_without_quotes() -> None:
    log = ["x connection ended stream=a peer=127.1.0.1:4711 reason=ended", 'y peer="127.1.0.2:1" z', "nothing"]
    assert peers_in(log) == {"127.1.0.1:4711", "127.1.0.2:1"}


def test_a_stream_survives_json() -> None:
    (judged,) = judge([stream(FINE, CUT)], [KILL_NS], set())
    assert from_plain(dataclasses.asdict(judged)) == judged
