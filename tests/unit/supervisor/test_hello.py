"""What becomes of a hello, in all pairs of what a client says and what the server has."""

from __future__ import annotations

import itertools

import pytest

from mpserverd.protocol.mps import INDEX_MAX, ErrorCode, Hello, HelloError
from mpserverd.supervisor.hello import RETRY_S_LIMIT, RIVALS_FORGOTTEN_S, Found, Rivals, asked, judge

PRESENT, OLDER, RANDOM = 0xAA, 0xBB, 0xCC
SIZE, NEXT = 16, 100


def storer_opens(hello: Hello, known: Found | None) -> Found:
    """What the storer does with what it is asked for (storer/opening.py)."""
    wish = asked(hello)
    if known is None or (wish.new_epoch and wish.asked_epoch != known.epoch):
        return Found(wish.epoch or RANDOM, hello.packet_size, 0)
    return known


def expected(hello: Hello, known: Found | None) -> tuple[ErrorCode | int, int]:
    """The rule in other words: (error or next packet, epoch)."""
    if known is None:
        if hello.new or hello.epoch is None:
            return (0 if hello.new else hello.first or 0), RANDOM
        return (0, hello.epoch) if hello.first == 0 else (ErrorCode.EPOCH, 0)
    if hello.new and hello.epoch != known.epoch:
        return 0, RANDOM
    if hello.packet_size != known.packet_size:
        return ErrorCode.PACKET_SIZE, 0
    if hello.epoch not in (None, known.epoch):
        return ErrorCode.EPOCH, 0
    return max(hello.first or 0, NEXT), known.epoch


@pytest.mark.parametrize("known", [None, Found(PRESENT, SIZE, NEXT * SIZE)], ids=["unknown", "known"])
def test_every_hello_has_the_answer_that_the_rules_give(known: Found | None) -> None:
    epochs = (None, PRESENT, OLDER)
    firsts = (None, 0, NEXT - 1, NEXT, NEXT + 7)
    for epoch, first, new, size in itertools.product(epochs, firsts, (False, True), (SIZE, 32)):
        hello = Hello("plc-1", size, epoch=epoch, first=first, new=new)
        found = storer_opens(hello, known)
        answer: tuple[ErrorCode | int, int]
        try:
            answer = judge(hello, found) // size, found.epoch
        except HelloError as error:
            answer = error.code, 0
        assert answer == expected(hello, known), hello


def test_an_epoch_is_never_taken_over_by_a_client_that_holds_less_than_all_of_it() -> None:
    for first in (None, 1, 5000):
        found = storer_opens(Hello("plc-1", SIZE, epoch=OLDER, first=first), None)
        assert found.epoch == RANDOM


def test_an_offset_beyond_what_numbers_can_say_is_refused() -> None:
    asked(Hello("plc-1", 1, first=INDEX_MAX))
    with pytest.raises(HelloError, match="first x packet size") as raised:
        asked(Hello("plc-1", 2, first=INDEX_MAX))
    assert raised.value.code is ErrorCode.FIRST


def test_rivals_stay_away_longer_each_time_up_to_a_limit() -> None:
    rivals = Rivals()
    pauses = []
    now_s = 1000.0
    for _ in range(12):
        pauses.append(rivals.superseded("plc-1", now_s))
        now_s += pauses[-1]
    assert pauses[:4] == [1, 2, 4, 8]
    assert max(pauses) == pauses[-1] == RETRY_S_LIMIT


def test_two_devices_that_were_rivals_for_long_are_forgotten_all_the_same() -> None:
    rivals = Rivals()
    for number in range(50):
        rivals.superseded("plc-1", 1000.0 + number)
    assert rivals.superseded("plc-1", 1050.0 + RIVALS_FORGOTTEN_S + 2 * RETRY_S_LIMIT) == 1


def test_a_client_that_lost_its_connection_once_in_a_while_is_no_rival() -> None:
    rivals = Rivals()
    gap_s = RIVALS_FORGOTTEN_S + 10
    assert [rivals.superseded("plc-1", 1000.0 + n * gap_s) for n in range(5)] == [1] * 5


def test_rivals_of_other_ids_do_not_count() -> None:
    rivals = Rivals()
    assert [rivals.superseded(f"plc-{n}", 1000.0) for n in range(5000)] == [1] * 5000
