"""The tables that ``mpload`` prints at the end, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from mpserverd.load.link import ClientResult
from mpserverd.load.results import client_rate, client_rows
from mpserverd.load.words import reason_text


def print_summary(console: Console, report: Mapping[str, Any], clients: Sequence[ClientResult]) -> None:
    """A row a client (the first and the worst ones), then the totals."""
    first, worst = client_rows(clients)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("client", "packets", "bytes", "packets/s", "unsent", "reconnects", "errors"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("local address", no_wrap=True)
    for client in first:
        table.add_row(*_client_cells(client))
    if worst:
        table.add_section()
        for client in worst:
            table.add_row(*_client_cells(client))
    console.print(table)
    hidden = len(clients) - len(first) - len(worst)
    if hidden:
        console.print(f"{hidden} more clients; --json has them all, shown are the first {len(first)} and the worst")
    console.print()
    for line in total_lines(report):
        console.print(line, highlight=False, soft_wrap=True)


def _client_cells(client: ClientResult) -> list[str]:
    local = client.connections[-1].local_address if client.connections else "never connected"
    figures = (client.packets, client.bytes, client_rate(client), client.packets_unsent)
    counts = (client.reconnects, client.errors)
    return [str(client.client), *(f"{figure:,.0f}" for figure in figures), *(str(count) for count in counts), local]


def total_lines(report: Mapping[str, Any]) -> list[str]:
    """The figures of the whole run, a line for each question."""
    target = report["target_rate"]
    wanted = "flat out" if target is None else f"target {target:,.1f}, {100 * report['rate'] / target:.3f} %"
    lines = [
        f"sent        {report['packets_sent']:,} packets, {report['bytes_sent']:,} bytes, {report['duration_s']:.3f} s",
        f"rate        {report['rate']:,.1f} packets/s ({wanted}), {_bytes_per_s(report):,.0f} bytes/s",
        f"connecting  {_figures(report['connect_ms'])}",
        f"lateness    {_figures(report['lateness_ms'])}",
        f"{_success(report)}; {report['packets_unsent']:,} packets unsent, "
        f"{report['reconnects']} reconnects, {report['unconfirmed_bytes']:,} bytes unconfirmed",
    ]
    if report["daemon"] is not None:
        told = report["daemon"]
        lines.append(
            f"daemon      {told['received_bytes']:,} bytes received, {told['stored_bytes']:,} stored, "
            f"{told['dropped_bytes']:,} dropped" + _unstored(told["unstored_bytes"])
        )
    if report["packets_acked"] is not None:
        lines += _ack_lines(report)
    if report["latency_ms"] is not None:
        lines.append(f"latency     {_figures(report['latency_ms'])} (scheduled to received, the worst client each)")
    if report["verify"] is not None:
        found = report["verify"]
        lines.append(
            f"verified    {found['connections']} connections, {found['stored_packets']:,} packets stored, "
            f"{len(found['mismatches'])} mismatches"
        )
    if report["errors"]:
        reasons = ", ".join(f"{count} x {reason_text(word)}" for word, count in report["errors_by_reason"].items())
        lines.append(f"errors      {report['errors']}: {reasons}")
    cpu = report["cpu"]
    if cpu["ns_per_packet"] is not None:
        lines.append(
            f"cpu         {cpu['ns_per_packet']:g} ns a packet, {cpu['user_s']:g} s user, {cpu['system_s']:g} s kernel"
        )
    return lines


def _ack_lines(report: Mapping[str, Any]) -> list[str]:
    again = f", {report['packets_resent']:,} sent again" if report["packets_resent"] else ""
    gone = f", {report['packets_withdrawn']:,} WITHDRAWN" if report["packets_withdrawn"] else ""
    rate = "" if report["acked_rate"] is None else f", {report['acked_rate']:,.1f} packets/s"
    return [
        f"acked       {report['packets_acked']:,} packets {report['level'] or ''}{rate}{again}{gone}",
        f"until ack   {_figures(report['ack_latency_ms'])} (scheduled to acknowledged)",
    ]


def _bytes_per_s(report: Mapping[str, Any]) -> float:
    return float(report["rate"] * report["packet_size"])


def _figures(figures: Mapping[str, float] | None) -> str:
    return "-" if figures is None else ", ".join(f"{name} {value:.3f} ms" for name, value in figures.items())


def _success(report: Mapping[str, Any]) -> str:
    """What was stored is success; where nobody looked, what the other kernel took is all that can be said."""
    if report["success_rate"] is not None:
        word = "acknowledged" if report["packets_acked"] is not None and report["verify"] is None else "stored"
        return f"success     {100 * report['success_rate']:.4f} % {word}"
    return f"delivered   {report['packets_delivered']:,} packets to the server's kernel; what was stored is not known"


def _unstored(unstored_bytes: int) -> str:
    return f", {unstored_bytes:,} checked and not to be stored" if unstored_bytes else ""
