"""The report counts what happened, and the judgement names what was missed."""

from __future__ import annotations

import io
import socket
from fractions import Fraction
from typing import Any

from rich.console import Console

from mpserverd.load.crew import Outcome, Progress
from mpserverd.load.daemon_figures import DaemonFigures
from mpserverd.load.link import ClientResult, ConnectionRecord
from mpserverd.load.progress import ProgressView, progress_share, progress_text
from mpserverd.load.results import Thresholds, client_rows, misses, summarize
from mpserverd.load.scenario import Scenario
from mpserverd.load.tables import print_summary
from mpserverd.load.verify import Verification

TARGET = ((int(socket.AF_INET), ("127.0.0.1", 1)),)
STRICT = Thresholds(rate_percent_min=99.0, reconnects_max=0)


def scenario(**options: Any) -> Scenario:
    return Scenario(TARGET, **({"clients": 2, "rate": Fraction(100), "duration_s": 10.0} | options))


def connection(broken: str | None = None, unconfirmed_bytes: int = 0) -> ConnectionRecord:
    return ConnectionRecord("127.0.0.1:7", 0, 0, 16_000, unconfirmed_bytes, broken, "ab" * 32)


def client(number: int, packets: int = 1000, connections: int = 1, **options: Any) -> ClientResult:
    records = options.pop("records", [connection()] * connections)
    values = {"packets_unsent": 0, "elapsed_s": 10.0, "errors": 0, "errors_by_reason": {}, "reconnects": 0}
    return ClientResult(client=number, packets=packets, bytes=packets * 16, connections=records, **(values | options))


def test_the_report_has_the_fields_that_others_rely_on() -> None:
    report = summarize(scenario(), Outcome([client(0), client(1)]), 2)
    assert report["schema_version"] == 1
    assert (report["clients"], report["packets_sent"], report["bytes_sent"]) == (2, 2000, 32_000)
    assert (report["rate"], report["target_rate"], report["duration_s"]) == (200.0, 200.0, 10.0)
    assert (report["packets_acked"], report["latency_ms"], report["success_rate"]) == (None, None, None)
    wanted = {"errors", "reconnects", "connect_ms", "lateness_ms", "per_client", "unconfirmed_bytes"}
    assert wanted <= report.keys()
    wanted = {"client", "packets", "bytes", "rate", "local_address", "reconnects", "errors", "sha256"}
    assert wanted <= report["per_client"][0].keys()
    assert report["per_client"][0]["sha256"] == "ab" * 32


def test_a_clean_run_misses_nothing() -> None:
    assert misses(scenario(), Outcome([client(0), client(1)]), STRICT, Verification()) == []


def test_each_miss_is_named() -> None:
    clients = [client(0, packets=500), client(1, records=[])]
    clients[0].connections = [connection("ECONNRESET"), connection()]
    found = misses(scenario(), Outcome(clients), STRICT, Verification(mismatches=["x"]))
    assert [line.split(",", maxsplit=1)[0] for line in found] == [
        "rate 150.0 packets/s is 75.00 % of 200.0",
        "1 connections were lost",
        "1 of 2 clients never had a connection",
        "1 connections are not stored as they were sent",
    ]
    lenient = Thresholds(rate_percent_min=50, reconnects_max=1)
    assert len(misses(scenario(), Outcome(clients), lenient, None)) == 1


def test_what_was_not_sent_in_time_is_a_miss_however_short_the_run() -> None:
    short = [client(0, 10, elapsed_s=0.1, packets_unsent=990), client(1, elapsed_s=0.1)]
    assert misses(scenario(), Outcome(short), STRICT, None) == ["990 of 2000 packets could not be sent in time"]
    assert misses(scenario(), Outcome(short, interrupted=True), STRICT, None) == []


def test_a_flat_out_run_has_no_rate_to_miss() -> None:
    assert misses(scenario(rate=Fraction(0)), Outcome([client(0, 1), client(1, 1)]), STRICT, None) == []


def figures(stored: int, dropped: int = 0, unstored: int = 0) -> DaemonFigures:
    received = stored + dropped + unstored
    fields = {"received_bytes": received, "stored_bytes": stored, "unstored_bytes": unstored, "dropped_bytes": dropped}
    return DaemonFigures({"p50": 1.0}, {}, {}, fields)


def lines(report: dict[str, Any], clients: list[ClientResult]) -> str:
    output = io.StringIO()
    print_summary(Console(file=output, width=140), report, clients)
    return output.getvalue()


def test_success_is_what_is_stored_and_unknown_where_nobody_looked() -> None:
    outcome = Outcome([client(0, records=[connection("EPIPE", unconfirmed_bytes=33)]), client(1)])
    report = summarize(scenario(), outcome, 1)
    assert (report["success_rate"], report["packets_delivered"], report["daemon"]) == (None, 1997, None)
    text = lines(report, outcome.clients)
    assert "delivered   1,997 packets to the server's kernel; what was stored is not known" in text
    assert "success" not in text


def test_success_is_by_the_spool_or_else_by_the_ledger() -> None:
    outcome = Outcome([client(0), client(1)])
    report = summarize(scenario(), outcome, 1, figures=figures(8_000, dropped=24_000))
    assert report["success_rate"] == 0.25 and report["daemon"]["dropped_bytes"] == 24_000
    assert report["latency_ms"] == {"p50": 1.0}
    text = lines(report, outcome.clients)
    assert "success     25.0000 % stored" in text
    assert "daemon      32,000 bytes received, 8,000 stored, 24,000 dropped\n" in text
    stored = Verification(stored_packets=1500)
    report = summarize(scenario(), outcome, 1, figures=figures(8_000), verification=stored)
    assert report["success_rate"] == 0.75


def test_what_is_not_to_be_stored_is_a_success_and_said() -> None:
    outcome = Outcome([client(0), client(1)])
    report = summarize(scenario(), outcome, 1, figures=figures(0, unstored=32_000))
    assert report["success_rate"] == 1.0
    assert "32,000 checked and not to be stored" in lines(report, outcome.clients)


def test_a_ledger_that_others_filled_too_tells_nothing() -> None:
    outcome = Outcome([client(0), client(1)])
    assert summarize(scenario(), outcome, 1, figures=figures(32_016))["success_rate"] is None
    begun_anew = DaemonFigures(None, {}, {}, None)
    assert summarize(scenario(), outcome, 1, figures=begun_anew)["success_rate"] is None


def test_tables_show_the_first_clients_and_the_worst_others() -> None:
    clients = [client(number) for number in range(40)]
    clients[35] = client(35, packets=10)
    clients[30] = client(30, errors=3)
    first, worst = client_rows(clients)
    assert [row.client for row in first] == list(range(20))
    assert [row.client for row in worst][:2] == [30, 35]
    output = io.StringIO()
    report = summarize(scenario(clients=40), Outcome(clients), 1, verification=Verification(40, 40_000))
    print_summary(Console(file=output, width=140), report, clients)
    assert "15 more clients" in output.getvalue()
    assert "verified    40 connections, 40,000 packets stored, 0 mismatches" in output.getvalue()


def test_a_run_without_a_packet_prints_too() -> None:
    output = io.StringIO()
    nothing = [client(0, packets=0, elapsed_s=0.0, records=[])]
    report = summarize(scenario(clients=1, rate=Fraction(0)), Outcome(nothing), 1)
    print_summary(Console(file=output, width=140), report, nothing)
    assert "never connected" in output.getvalue()
    assert report["success_rate"] is None


def test_progress_elsewhere_than_on_a_terminal_is_a_line_a_second() -> None:
    output = io.StringIO()
    with ProgressView(Console(file=output), scenario(), quiet=False) as view:
        for quarter in range(13):
            view.show(Progress(quarter / 4, quarter * 50, quarter * 800, 2, 0, None))
    lines = output.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[1] == "2 s  200 packets/s (target 200)  400 packets 6,400 bytes sent  2/2 clients  0 errors"


def test_progress_says_the_last_error() -> None:
    text = progress_text(scenario(rate=Fraction(0)), Progress(1.0, 1, 16, 0, 2, "ECONNRESET"), 1.0)
    assert text.endswith("(flat out)  1 packets 16 bytes sent  0/2 clients  2 errors (connection reset by peer)")


def test_progress_counts_packets_or_else_time() -> None:
    now = Progress(2.5, 500, 8000, 2, 0, None)
    assert progress_share(scenario(), now) == 0.25
    assert progress_share(scenario(rate=Fraction(0)), now) == 0.25


def test_quiet_means_nothing_at_all() -> None:
    output = io.StringIO()
    with ProgressView(Console(file=output, force_terminal=True), scenario(), quiet=True) as view:
        view.show(Progress(5.0, 1, 1, 1, 0, None))
    assert output.getvalue() == ""
