"""Which server is next: the addresses as they may be written, turns, pauses, and what a server asked for."""

from __future__ import annotations

import pytest

from mpserverd.client.servers import Servers, parse_server

THREE = [("a", 1), ("b", 2), ("c", 3)]


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("a.example", ("a.example", 8889)),
        ("a.example:1", ("a.example", 1)),
        ("a.example:65535", ("a.example", 65535)),
        ("192.0.2.7:99", ("192.0.2.7", 99)),
        ("[::1]:99", ("::1", 99)),
        ("[::1]", ("::1", 8889)),
        ("::1", ("::1", 8889)),
        (("::1", 99), ("::1", 99)),
    ],
)
def test_an_address_is_read_as_it_is_written(text: str | tuple[str, int], address: tuple[str, int]) -> None:
    assert parse_server(text) == address


@pytest.mark.parametrize(
    "text", ["", ":1", "a:0", "a:65536", "a:x", "a:-1", "a:\uff11", "[::1", "[::1]x", "[]:1", ("", 1), ("a", 0)]
)
def test_what_is_no_address_is_refused(text: str | tuple[str, int]) -> None:
    with pytest.raises(ValueError, match="server"):
        parse_server(text)


def turn(servers: Servers, now: float) -> tuple[str, float]:
    """Who is tried next, and how long after ``now``."""
    (host, _), at = servers.choose()
    servers.trying()
    return host, at - now


def test_servers_are_tried_in_turn_with_pauses_that_grow_up_to_the_longest() -> None:
    servers, now, pauses = Servers(THREE, (0.1, 1.0), 1), 0.0, []
    for number in range(12):
        host, wait = turn(servers, now)
        assert host == "abc"[number % 3]
        pauses.append(max(0.0, wait))
        now += pauses[-1]
        servers.failed(now)
    assert pauses[0] == 0.0
    for number, pause in enumerate(pauses[1:]):
        full = min(0.1 * 2**number, 1.0)
        assert full / 2 <= pause <= full


def test_one_that_worked_is_tried_once_more_and_then_it_is_the_next_ones_turn() -> None:
    servers = Servers(THREE, (0.1, 1.0), 1)
    assert turn(servers, 0.0)[0] == "a"
    servers.worked()
    servers.failed(0.0)
    assert turn(servers, 0.0)[0] == "a"
    servers.failed(1.0)
    assert turn(servers, 1.0)[0] == "b"


@pytest.mark.parametrize(("everywhere", "expected"), [(False, ("b", 0.1)), (True, ("a", 60.0))])
def test_a_server_is_not_asked_before_the_time_it_named(everywhere: bool, expected: tuple[str, float]) -> None:
    servers = Servers(THREE, (0.1, 0.1), 1)
    turn(servers, 0.0)
    servers.worked()
    servers.failed(0.0, 60, everywhere)
    host, wait = turn(servers, 0.0)
    assert host == expected[0]
    assert expected[1] / 2 <= wait <= expected[1]


def test_the_only_server_is_waited_for() -> None:
    servers = Servers(THREE[:1], (0.1, 0.1), 1)
    turn(servers, 0.0)
    servers.failed(0.0, 60)
    servers.failed(1.0, 5)
    assert turn(servers, 0.0) == ("a", 60.0)


def test_the_same_server_may_be_asked_something_else_at_once() -> None:
    servers = Servers(THREE, (0.1, 0.1), 1)
    turn(servers, 0.0)
    servers.failed(7.0)
    servers.at_once(7.0)
    assert turn(servers, 7.0) == ("a", 0.0)


def test_a_server_has_a_name_that_outlives_the_program_and_is_not_0() -> None:
    servers = Servers(THREE, (0.1, 0.1), 1)
    keys = []
    for now in range(3):
        turn(servers, now)
        keys.append(servers.key)
        servers.failed(now)
    assert keys == [0x1C223A646, 0x1596C49A5, 0x12FA91304]


@pytest.mark.parametrize("pauses", [(0.0, 1.0), (2.0, 1.0), (1.0, 3601.0)])
def test_pauses_that_make_no_sense_are_refused(pauses: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="backoff_s"):
        Servers(THREE, pauses, 1)


def test_no_server_is_refused() -> None:
    with pytest.raises(ValueError, match="no server is named"):
        Servers([], (0.1, 1.0), 1)
