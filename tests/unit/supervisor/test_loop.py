"""The event loop: timers, descriptors that come and go, signals."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from mpserverd.supervisor.loop import READ, Loop


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


def test_timers_run_in_the_order_of_their_time(loop: Loop) -> None:
    order: list[str] = []
    loop.after(0.002, lambda: (order.append("late"), loop.stop()))
    loop.after(0.0, lambda: order.append("early"))
    loop.run()
    assert order == ["early", "late"]


def test_a_cancelled_timer_does_not_run(loop: Loop) -> None:
    ran: list[str] = []
    loop.after(0.0, lambda: ran.append("no")).cancel()
    loop.after(0.001, loop.stop)
    loop.run()
    assert not ran


def test_an_event_of_a_closed_descriptor_is_not_given_to_its_successor(loop: Loop) -> None:
    """Two descriptors are readable in one batch; the first callback closes the second, whose number is taken again."""
    pipes = [os.pipe(), os.pipe()]
    got: list[int] = []
    opened: list[int] = []

    def replace_other(mine: int, other: int) -> None:
        got.append(mine)
        loop.unwatch(mine)
        if other in opened:
            return
        loop.unwatch(other)
        os.close(other)
        again = os.pipe()
        assert again[0] == other
        opened.extend(again)
        loop.watch(other, READ, lambda _: got.append(-other))

    first, second = pipes[0][0], pipes[1][0]
    loop.watch(first, READ, lambda _: replace_other(first, second))
    loop.watch(second, READ, lambda _: replace_other(second, first))
    for _, write in pipes:
        os.write(write, b"x")
    loop.run_once()
    assert len(got) == 1
    loop.unwatch(opened[0])
    for fd in {*opened, *(fd for pipe in pipes for fd in pipe)}:
        os.close(fd)


def test_unwatching_what_is_not_watched_does_nothing(loop: Loop) -> None:
    loop.unwatch(0)


def test_signals_arrive_in_the_loop_and_handlers_are_restored(loop: Loop) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    got: list[int] = []
    with loop.signals([signal.SIGUSR1], got.append):
        os.kill(os.getpid(), signal.SIGUSR1)
        while not got:
            loop.run_once()
    assert got == [signal.SIGUSR1]
    assert signal.getsignal(signal.SIGUSR1) is before
