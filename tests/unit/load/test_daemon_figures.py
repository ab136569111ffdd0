"""Latency and received bytes come from the rows of the daemon that are ours."""

from __future__ import annotations

from typing import Any

from mpserverd.load.daemon_figures import LEDGER_FIELDS, Look, collect, difference, merge

OURS = {"127.0.0.1:1": 160, "127.0.0.1:2": 320}


def row(peer: str, received: int, **latency: float) -> dict[str, Any]:
    return {"id": "x", "peer": peer, "bytes": received, "latency_ms": latency or None}


def test_the_worst_client_is_reported_and_strangers_are_not() -> None:
    reply = [
        row("127.0.0.1:1", 160, p50=1.0, p99=9.0, p999=9.5, max=10.0),
        row("127.0.0.1:2", 320, p50=2.0, p99=3.0, p999=4.0, max=5.0),
        row("10.0.0.1:2", 5, p50=99.0, p99=99.0, p999=99.0, max=99.0),
    ]
    figures = merge(reply, OURS)
    assert figures.latency_ms == {"p50": 2.0, "p99": 9.0, "p999": 9.5, "max": 10.0}
    assert figures.received_bytes == figures.sent_bytes == OURS


def test_without_layouts_there_is_no_latency() -> None:
    unknown = dict.fromkeys(("p50", "p99", "p999", "max"))
    rows = [row("127.0.0.1:1", 160), row("127.0.0.1:2", 160) | {"latency_ms": unknown}]
    assert merge(rows, OURS).latency_ms is None


def totals(**fields: int) -> dict[str, int]:
    return dict.fromkeys((*LEDGER_FIELDS, "in_arena_bytes"), 0) | fields


def look(*received: int, **fields: int) -> Look:
    return Look([row(peer, count) for peer, count in zip(OURS, received, strict=False)], totals(**fields))


def test_it_asks_again_until_everything_was_received() -> None:
    replies = iter([look(), look(16), look(160, 320)])
    waits: list[float] = []
    figures = collect(lambda: next(replies), OURS, totals(), wait=waits.append, clock=lambda: 0.0)
    assert (figures.received_bytes, len(waits)) == (OURS, 2)


def test_it_asks_again_until_nothing_is_in_memory() -> None:
    replies = iter([look(160, 320, in_arena_bytes=16), look(160, 320, stored_bytes=400, dropped_bytes=100)])
    before = totals(dropped_bytes=20)
    figures = collect(lambda: next(replies), OURS, before, wait=id, clock=lambda: 0.0)
    assert figures.ledger == {"received_bytes": 0, "stored_bytes": 400, "unstored_bytes": 0, "dropped_bytes": 80}


def test_it_gives_up_after_a_while() -> None:
    clock = iter([0.0, 5.0, 11.0])
    figures = collect(look, OURS, totals(), wait=id, clock=lambda: next(clock))
    assert figures.received_bytes == {}


def test_a_ledger_that_began_anew_has_no_difference() -> None:
    assert difference(totals(received_bytes=1), totals()) is None
