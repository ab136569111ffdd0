"""The reports: what stands in the tables is what they say, field by field, and health says what is wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import numpy as np
import pytest

from mpserverd.arena.counters import COUNTERS, NEVER_S, Role, column
from mpserverd.arena.health import HEARTBEAT_AGE_S_MAX, health
from mpserverd.arena.report import ledger, stats, workers
from mpserverd.arena.state import (
    FIRST_WORKER_SLOT,
    STORER_SLOT,
    SUPERVISOR_SLOT,
    CloseReason,
    Gone,
    Head,
    Phase,
    RefuseReason,
    Slot,
    Str,
    StreamFlag,
)
from tests.unit.arena.live_tables import CHUNK_BYTES, Tables

DESIGN_STATS = [
    "schema_version",
    "version",
    "uptime_s",
    "active_connections",
    "total_connections",
    "total_packets",
    "total_bytes",
    "packets_per_s",
    "bytes_per_s",
    "errors",
    "error_rate",
    "errors_by_reason",
    "workers",
    "worker_list",
    "ledger",
    "spool",
    "host",
]
DESIGN_WORKER = ["index", "pid", "state", "restarts", "connections", "packets_per_s", "cpu_percent", "rss_bytes"]
DESIGN_LEDGER = [
    "received_bytes",
    "stored_bytes",
    "durable_bytes",
    "acked_bytes",
    "forwarded_bytes",
    "truncated_bytes",
    "dropped_bytes",
    "lost_bytes",
    "retired_bytes",
    "gaps",
    "at_risk_bytes",
]


@pytest.fixture
def tables() -> Iterator[Tables]:
    with Tables() as made:
        yield made


def failing(tables: Tables) -> list[str]:
    tables.beat()
    return [check["check"] for check in health(tables.live())["checks"] if not check["ok"]]


# -- stats


def test_every_promised_field_is_there_and_is_json(tables: Tables) -> None:
    report = json.loads(json.dumps(stats(tables.live()), allow_nan=False))
    assert set(DESIGN_STATS) <= set(report)
    assert all(set(DESIGN_WORKER) <= set(worker) for worker in report["worker_list"])
    assert set(DESIGN_LEDGER) <= set(report["ledger"])
    assert {"bytes", "free_bytes", "time_to_full_s"} <= set(report["spool"])
    assert set(report["host"]) == {"cpu_percent", "memory_percent", "net_bytes_per_s"}
    assert report["workers"] == len(report["worker_list"]) == 2


def test_totals_are_those_of_the_streams_present_and_gone(tables: Tables) -> None:
    one, other = tables.open(0, packet_size=16), tables.open(1, packet_size=24)
    tables.connect(0, one)
    one.receive(1605)
    other.receive(2400)
    assert other.close()
    other.write()
    other.commit()
    tables.evict(other)
    report = stats(tables.live())
    assert report["total_bytes"] == 1600 + 2400
    assert report["total_packets"] == 100 + 100
    assert (report["active_connections"], report["total_connections"]) == (1, 1)
    assert report["ledger"]["holds"]
    assert report["ledger"]["durable_bytes"] == 2400


def test_rates_are_added_up_from_the_streams(tables: Tables) -> None:
    for row, size in ((0, 16), (1, 100)):
        tables.open(row, packet_size=size).words[Str.RATE_MILLI] = 10_050_500
    report = stats(tables.live())
    assert report["packets_per_s"] == pytest.approx(20_101, abs=0.1)
    assert report["bytes_per_s"] == round(10_050.5 * 116)


def test_errors_are_counted_by_reason(tables: Tables) -> None:
    stream = tables.open(0, packet_size=16)
    stream.receive(16 * 1000)
    tables.set_check(stream, gaps=3, missing=70, repeats=2, reordered=1)
    slots = tables.state.slots
    slots[SUPERVISOR_SLOT, Slot.REASONS + RefuseReason.DENIED] = 5
    slots[SUPERVISOR_SLOT, column(Role.SUPERVISOR, "truncated_packets")] = 4
    slots[FIRST_WORKER_SLOT, Slot.REASONS + CloseReason.RESET] = 6
    slots[FIRST_WORKER_SLOT + 1, Slot.REASONS + CloseReason.RESET] = 1
    slots[FIRST_WORKER_SLOT + 1, Slot.REASONS + CloseReason.ENDED] = 100
    report = stats(tables.live())
    found = {name: count for name, count in report["errors_by_reason"].items() if count}
    assert found == {
        "gaps": 3, "repeats": 2, "reordered": 1, "truncated": 4, "refused-denied": 5, "broken-reset": 7,
    }  # fmt: skip
    assert report["errors"] == 22
    assert report["error_rate"] == 22 / 1000
    assert report["closed_by_reason"]["ended"] == 100


def test_every_reason_has_its_own_name_and_is_always_there(tables: Tables) -> None:
    report = stats(tables.live())["errors_by_reason"]
    assert {f"refused-{reason.word}" for reason in RefuseReason if reason} <= set(report)
    assert set(report.values()) == {0}
    assert stats(tables.live())["error_rate"] == 0.0


def test_dropped_packets_of_present_and_closed_streams_are_counted(tables: Tables) -> None:
    stream = tables.open(0, packet_size=24, flags=StreamFlag.STORE | StreamFlag.DROP_OLDEST)
    while stream.receive(CHUNK_BYTES):
        pass
    dropped = stream.drop()
    words = tables.state.words
    for word, value in ((Gone.RECEIVED_BYTES, 1600), (Gone.RECEIVED_PACKETS, 100), (Gone.DROPPED_PACKETS, 10)):
        words[Head.GONE + word] = value
    words[Head.GONE + Gone.STORED_BYTES] = 1440
    words[Head.GONE + Gone.SOCKET_BYTES] = 1600
    assert dropped > 0
    assert dropped % 24 == 0
    assert stats(tables.live())["errors_by_reason"]["dropped"] == dropped // 24 + 10


def test_errors_do_not_fall_when_streams_of_different_packets_leave_the_table(tables: Tables) -> None:
    small, large = tables.open(0, packet_size=16), tables.open(1, packet_size=1600)
    assert large.receive(3200)
    small.words[Str.DROPPED], large.words[Str.LOST] = 1600, 1600
    before = stats(tables.live())["errors_by_reason"]
    assert (before["dropped"], before["lost"]) == (100, 1)
    for stream in (small, large):
        tables.evict(stream)
        assert stats(tables.live())["errors_by_reason"] == before


def test_the_spool_says_in_how_long_it_is_full(tables: Tables) -> None:
    row = tables.state.slots[STORER_SLOT]
    row[[column(Role.STORER, name) for name in ("spool_bytes", "free_bytes")]] = 0
    assert stats(tables.live())["spool"]["time_to_full_s"] is None, "the storer has not looked yet"
    row[column(Role.STORER, "spool_bytes")] = 5000
    row[column(Role.STORER, "free_bytes")] = 1_000_000
    row[column(Role.STORER, "time_to_full_s")] = NEVER_S
    found = stats(tables.live())["spool"]
    assert (found["path"], found["bytes"], found["free_bytes"]) == ("/spool", 5000, 1_000_000)
    assert (found["time_to_full_s"], found["full"], found["direct"]) == (None, False, False)
    row[column(Role.STORER, "time_to_full_s")] = 1000
    assert stats(tables.live())["spool"]["time_to_full_s"] == 1000.0
    row[column(Role.STORER, "full")] = 1
    assert stats(tables.live())["spool"]["time_to_full_s"] == 0.0


def test_listeners_name_their_port(tables: Tables) -> None:
    tables.facts["listeners"]["2"] = {**tables.facts["listeners"]["1"], "name": "v6", "address": "[::1]:9999"}
    tables.facts["listeners"]["3"] = {**tables.facts["listeners"]["1"], "name": "closed", "address": None}
    found = stats(tables.live())["listeners"]
    assert [(one["id"], one["name"], one["port"]) for one in found] == [
        (1, "raw", 8888),
        (2, "v6", 9999),
        (3, "closed", None),
    ]


def test_buffers_are_counted_by_what_they_are_for(tables: Tables) -> None:
    tables.open(0).receive(CHUNK_BYTES + 1)
    found = stats(tables.live())["buffers"]
    assert found["chunks"] == found["chunks_free"] + found["chunks_leased"] + found["chunks_used"] == 32
    assert found["chunks_used"] == 2


def test_every_counter_of_every_process_is_reported(tables: Tables) -> None:
    for slot in (FIRST_WORKER_SLOT, FIRST_WORKER_SLOT + 1):
        tables.state.slots[slot, column(Role.WORKER, "checks")] = 21
    report = stats(tables.live())["counters"]
    assert report["worker"]["checks"] == 42
    assert {(role, name) for role in report for name in report[role]} == {(c.role.value, c.name) for c in COUNTERS}


def test_a_worker_is_described_by_its_slot(tables: Tables) -> None:
    row = tables.state.slots[FIRST_WORKER_SLOT + 1]
    row[Slot.CONNECTIONS], row[Slot.RATE_MILLI], row[Slot.CPU_MILLI], row[Slot.RSS_BYTES] = 3, 5_000_000, 125, 4096
    found = workers(tables.live())[1]
    assert (found["connections"], found["packets_per_s"], found["cpu_percent"], found["rss_bytes"]) == (
        3,
        5000.0,
        12.5,
        4096,
    )
    assert (found["index"], found["pid"], found["state"], found["restarts"]) == (1, 101, "running", 1)
    assert 0 <= found["heartbeat_age_s"] < 60


def test_a_daemon_without_a_storer_is_reported(tables: Tables) -> None:
    tables.facts["storer"] = None
    assert stats(tables.live())["storer"] is None
    assert failing(tables) == []


# -- ledger


def test_the_ledger_names_the_stream_that_is_off(tables: Tables) -> None:
    for row in range(3):
        tables.open(row, name=f"pump-{row}").receive(160)
    tables.state.streams[1, Str.SOCKET] += np.uint64(7)
    report = ledger(tables.live())
    assert not report["holds"]
    assert [account["stream"] for account in report["streams_off"]] == ["pump-1"]
    assert report["streams_off"][0]["socket_bytes"] == 167
    wrong = [one for one in report["equations"] if not one["holds"]]
    assert [(one["left"], one["right"]) for one in wrong] == [(487, 480)]
    assert "streams" not in report


def test_the_ledger_lists_every_stream_on_request(tables: Tables) -> None:
    for row in range(3):
        tables.open(row, name=f"pump-{row}").receive(160 * (row + 1))
    report = json.loads(json.dumps(ledger(tables.live(), every_stream=True)))
    assert [(one["stream"], one["received_bytes"]) for one in report["streams"]] == [
        ("pump-0", 160), ("pump-1", 320), ("pump-2", 480),
    ]  # fmt: skip
    assert set(DESIGN_LEDGER) <= set(report["streams"][0])
    assert report["totals"]["received_bytes"] == 960


# -- health


def test_a_daemon_that_works_is_healthy(tables: Tables) -> None:
    tables.open(0).receive(100)
    report = health(tables.live())
    assert report["healthy"], report
    assert {check["check"] for check in report["checks"]} >= {"workers", "storer", "spool", "ledger", "phase"}


def test_a_worker_that_does_not_run_is_unhealthy(tables: Tables) -> None:
    tables.facts["workers"][1]["state"] = "backoff"
    assert failing(tables) == ["workers"]
    tables.facts["workers"] = []
    assert failing(tables) == ["workers"]


def test_an_old_worker_that_leaves_after_a_reload_is_not_missed(tables: Tables) -> None:
    tables.facts["workers"].append(
        {"index": 1, "pid": 9, "state": "stopping", "restarts": 0, "slot": FIRST_WORKER_SLOT + 2, "wanted": False}
    )
    assert failing(tables) == []


@pytest.mark.parametrize("state", ["stuck", "backoff", "dead"])
def test_a_storer_that_does_not_run_is_unhealthy(tables: Tables, state: str) -> None:
    tables.facts["storer"]["state"] = state
    assert failing(tables) == ["storer"]


def test_a_full_spool_is_unhealthy(tables: Tables) -> None:
    tables.state.slots[STORER_SLOT, column(Role.STORER, "full")] = 1
    assert failing(tables) == ["spool"]


def test_a_spool_that_nobody_has_looked_at_is_not_called_fine(tables: Tables) -> None:
    tables.look_at_spool(free_bytes=0)
    assert failing(tables) == ["spool"]
    (found,) = [check for check in health(tables.live())["checks"] if check["check"] == "spool"]
    assert found["detail"] == "unknown: the storer has not looked yet"
    tables.state.slots[STORER_SLOT, column(Role.STORER, "spool_bytes")] = 1
    assert failing(tables) == []


def test_a_ledger_that_is_off_is_unhealthy(tables: Tables) -> None:
    tables.state.words[Head.GONE + Gone.STORED_BYTES] += 1
    assert failing(tables) == ["ledger"]


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.STOPPING])
def test_a_daemon_that_does_not_serve_is_unhealthy(tables: Tables, phase: Phase) -> None:
    tables.state.words[Head.PHASE] = phase
    assert failing(tables) == ["phase"]


@pytest.mark.parametrize(
    ("slot", "check"),
    [
        (SUPERVISOR_SLOT, "supervisor-heartbeat"),
        (STORER_SLOT, "storer-heartbeat"),
        (FIRST_WORKER_SLOT + 1, "worker-1-heartbeat"),
    ],
)
@pytest.mark.parametrize("age_s", [None, HEARTBEAT_AGE_S_MAX + 1])
def test_a_process_without_a_fresh_heartbeat_is_unhealthy(
    tables: Tables, slot: int, check: str, age_s: float | None
) -> None:
    beat_ns = 0 if age_s is None else max(1, time.monotonic_ns() - int(age_s * 1e9))
    tables.state.slots[slot, Slot.HEARTBEAT_MONO_NS] = beat_ns
    assert [one["check"] for one in health(tables.live())["checks"] if not one["ok"]] == [check]
