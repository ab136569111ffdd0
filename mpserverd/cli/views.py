"""The reports of mpserverctl as people read them. Pure formatting: each takes a report and prints it."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from typing import Any, TextIO

from mpserverd.cli.tables import (
    Column,
    Table,
    count_text,
    duration_text,
    human_bytes,
    ms_text,
    percent_text,
    print_pairs,
    print_table,
    rate_text,
)

LEDGER_COLUMNS = (
    ("received", "received_bytes"),
    ("in arena", "in_arena_bytes"),
    ("stored", "stored_bytes"),
    ("durable", "durable_bytes"),
    ("dropped", "dropped_bytes"),
    ("lost", "lost_bytes"),
    ("truncated", "truncated_bytes"),
    ("gaps", "gaps"),
    ("at risk", "at_risk_bytes"),
)


def stats_view(report: dict[str, Any], out: TextIO) -> None:
    spool, host, totals, buffers = report["spool"], report["host"], report["ledger"], report["buffers"]
    errors = ", ".join(f"{name} {count:,}" for name, count in report["errors_by_reason"].items() if count)
    memory = f"{buffers['chunks_used']:,} of {buffers['chunks']:,} chunks of {human_bytes(buffers['chunk_bytes'])} used"
    pairs = [
        ("mpserverd", f"{report['version']}, {report['phase']}, up {duration_text(report['uptime_s'])}"),
        (
            "connections",
            f"{report['active_connections']:,} of {report['max_connections']:,} now, "
            f"{report['total_connections']:,} in all",
        ),
        ("packets", f"{count_text(report['total_packets'])}, {rate_text(report['packets_per_s'], 'packets')}"),
        ("bytes", f"{count_text(report['total_bytes'])}, {human_bytes(round(report['bytes_per_s']))}/s"),
        ("errors", f"{report['errors']:,} ({100 * report['error_rate']:.4g} %)" + (f": {errors}" if errors else "")),
        ("ledger", _ledger_text(totals)),
        ("buffers", memory),
        ("spool", _spool_text(spool)),
        ("storer", _storer_text(report["storer"])),
        (
            "machine",
            f"CPU {percent_text(host['cpu_percent'])}, memory {percent_text(host['memory_percent'])}, network "
            + ("-" if host["net_bytes_per_s"] is None else f"{human_bytes(host['net_bytes_per_s'])}/s"),
        ),
    ]
    if report["reload_error"]:
        pairs.insert(1, ("reload refused", report["reload_error"]))
    print_pairs("", pairs, out)
    print(file=out)
    workers_view(report["worker_list"], out)


def _ledger_text(totals: dict[str, Any]) -> str:
    word = "balances" if totals["holds"] else "DOES NOT BALANCE (see mpserverctl ledger)"
    return (
        f"{word}; {human_bytes(totals['durable_bytes'])} durable, {human_bytes(totals['at_risk_bytes'])} at risk, "
        f"{human_bytes(totals['dropped_bytes'])} dropped, {human_bytes(totals['lost_bytes'])} lost"
    )


def _spool_text(spool: dict[str, Any]) -> str:
    if spool["full"]:
        return f"{spool['path']}: FULL"
    if not (spool["bytes"] or spool["free_bytes"]):
        return f"{spool['path']}: unknown, the storer has not looked yet"
    full = "" if spool["time_to_full_s"] is None else f", full in {duration_text(spool['time_to_full_s'])}"
    return f"{spool['path']}: {human_bytes(spool['bytes'])}, {human_bytes(spool['free_bytes'])} free{full}"


def _storer_text(storer: dict[str, Any] | None) -> str:
    if storer is None:
        return "none"
    return (
        f"{storer['state']}, pid {storer['pid']}, {storer['cycles']:,} cycles, last {storer['cycle_ns'] / 1e6:.1f} ms, "
        f"{storer['write_errors']:,} write errors"
    )


def workers_view(report: list[dict[str, Any]], out: TextIO) -> None:
    titles = ("pid", "state", "restarts", "connections", "packets/s", "CPU", "memory", "blocked so far")
    table = Table("", (Column("worker"), *(Column(title, number=title != "state") for title in titles)))
    for worker in report:
        table.add(
            str(worker["index"]),
            str(worker["pid"] or "-"),
            worker["state"],
            count_text(worker["restarts"]),
            count_text(worker["connections"]),
            f"{worker['packets_per_s']:,.0f}",
            percent_text(worker["cpu_percent"]),
            human_bytes(worker["rss_bytes"]),
            count_text(worker["blocked"]),
        )
    print_table(table, out, 0)


def clients_view(report: list[dict[str, Any]], out: TextIO, rows_max: int) -> None:
    titles = ("connected", "packets", "packets/s", "gaps", "p50 ms", "p99 ms", "max ms")
    words = ("stream", "peer", "worker", "state", "level")
    columns = (*(Column(word) for word in words), *(Column(title, number=True) for title in titles), Column("at risk"))
    table = Table("", columns)
    for client in report:
        latency = client["latency_ms"]
        table.add(
            client["stream"] or "-",
            client["peer"],
            "-" if client["worker"] is None else str(client["worker"]),
            next((word for word in ("paused", "blocked") if client[word]), client["state"]),
            client["level"],
            duration_text(client["connected_s"]),
            count_text(client["packets"]),
            f"{client['packets_per_s']:,.0f}",
            count_text(client["gaps"]),
            *(ms_text(latency[name]) for name in ("p50", "p99", "max")),
            client["at_risk"],
        )
    print_table(table, out, rows_max)
    noun = "connection" if len(report) == 1 else "connections"
    print(f"{len(report):,} {noun}", file=out)


def ledger_view(report: dict[str, Any], out: TextIO, rows_max: int) -> None:
    totals = report["totals"]
    names = [name for name in totals if isinstance(totals[name], int)]
    print_pairs("", ((name.replace("_", " "), count_text(totals[name])) for name in names), out)
    print(file=out)
    table = Table("", (Column("equation"), Column("left", True), Column("right", True), Column("")))
    for one in report["equations"]:
        verdict = "holds" if one["holds"] else f"OFF by {abs(one['left'] - one['right']):,}"
        table.add(one["equation"].replace("_bytes", ""), count_text(one["left"]), count_text(one["right"]), verdict)
    print_table(table, out, 0)
    print(f"\n{report['stream_count']:,} streams in the table, {report['gone_streams']:,} closed", file=out)
    if report.get("streams"):
        _accounts_view("every stream in the table", report["streams"], out, rows_max)
    if report["streams_off"]:
        _accounts_view("streams that are OFF", report["streams_off"], out, rows_max)
    if not report["gone_readable"]:
        print("the totals of closed streams are being written; the storer may have died doing so", file=out)
    print("the ledger balances" if report["holds"] else "the ledger DOES NOT BALANCE", file=out)


def _accounts_view(title: str, accounts: Iterable[dict[str, Any]], out: TextIO, rows_max: int) -> None:
    table = Table(title, (Column("stream"), *(Column(name, True) for name, _ in LEDGER_COLUMNS)))
    for account in accounts:
        table.add(account["stream"], *(count_text(account[field]) for _, field in LEDGER_COLUMNS))
    print_table(table, out, rows_max)


def health_view(report: dict[str, Any], out: TextIO) -> None:
    table = Table("", (Column("check"), Column(""), Column("")))
    for check in report["checks"]:
        table.add(check["check"], "ok" if check["ok"] else "FAILS", check["detail"])
    print_table(table, out, 0)
    print("healthy" if report["healthy"] else "NOT healthy", file=out)


def event_line(event: dict[str, Any]) -> str:
    """One line: UTC time, source, what, and the rest as key=value."""
    known = {"number", "unix_ns", "time", "source", "kind"}
    rest = "".join(f" {name}={value}" for name, value in event.items() if name not in known)
    return f"{event['time']} {event['source']}: {event['kind']}{rest}"


def event_time(unix_ns: int) -> str:
    """ISO 8601 in UTC, to the millisecond."""
    moment = datetime.datetime.fromtimestamp(unix_ns // 1_000_000 / 1000, datetime.UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z"


def quarantine_view(entries: list[dict[str, Any]], out: TextIO) -> None:
    for entry in entries:
        until = event_time(round(entry["until_unix_s"] * 1e9)) if entry["until_unix_s"] else "released"
        since = event_time(round(entry["since_unix_s"] * 1e9))
        print(f"{entry['client']}  stream {entry['stream']}, since {since}, until {until}", file=out)
    if not entries:
        print("nobody is in quarantine", file=out)


def target_view(command: str, report: dict[str, Any], out: TextIO) -> None:
    """What kick, pause or resume was passed on to."""
    connections = report["connections"]
    for connection in connections:
        print(f"{connection['peer']}  {connection['stream'] or '-'}", file=out)
    print(f"{command}: {len(connections):,} connection{'' if len(connections) == 1 else 's'}", file=out)


def reload_view(report: dict[str, Any], out: TextIO) -> None:
    for text in report.get("changed") or ["nothing changed"]:
        print(text, file=out)
    for key in report.get("needs_restart", []):
        print(f"{key}: needs a restart", file=out)
