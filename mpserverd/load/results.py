"""What a run came to: the JSON object, the judgement, and the tables for people. Pure.

Rules: fields are only ever added; the rate of a client is its packets over the time that they stand for, or over the
time that they took when that was longer; the rate of the run is the sum of its clients' rates.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mpserverd.load.crew import Outcome
from mpserverd.load.daemon_figures import DaemonFigures
from mpserverd.load.link import ClientResult
from mpserverd.load.scenario import Scenario
from mpserverd.load.totals import ack_totals
from mpserverd.load.verify import Verification
from mpserverd.version import VERSION

SCHEMA_VERSION = 1
RATE_JUDGED_FROM_S = 1.0
"""A run that is over sooner has no rate to speak of: one batch late by a millisecond would decide."""
CLIENT_ROWS_FIRST, CLIENT_ROWS_WORST = 20, 5


@dataclass(frozen=True)
class Thresholds:
    """What must be reached for exit code 0."""

    rate_percent_min: float
    reconnects_max: int


def client_rate(client: ClientResult) -> float:
    """Packets a second."""
    return client.packets / client.elapsed_s if client.elapsed_s > 0 else 0.0


def summarize(
    scenario: Scenario,
    outcome: Outcome,
    processes: int,
    *,
    figures: DaemonFigures | None = None,
    verification: Verification | None = None,
) -> dict[str, Any]:
    """The object of ``--json``, without its ``misses``."""
    clients = outcome.clients
    packets = sum(client.packets for client in clients)
    cpu_s = outcome.cpu_user_s + outcome.cpu_system_s
    return {
        "schema_version": SCHEMA_VERSION,
        "version": VERSION,
        "protocol": scenario.protocol,
        "started": _iso_utc(outcome.started_unix_ns),
        "interrupted": outcome.interrupted,
        "clients": scenario.clients,
        "processes": processes,
        "packet_size": scenario.packet_size,
        "batch": scenario.batch_packets(max(1, scenario.clients // processes)),
        "packets_sent": packets,
        "bytes_sent": sum(client.bytes for client in clients),
        "packets_delivered": _packets_delivered(scenario, clients),
        "packets_unsent": sum(client.packets_unsent for client in clients),
        **ack_totals(clients),
        "rate": round(sum(client_rate(client) for client in clients), 3),
        "target_rate": None if scenario.flat_out else float(scenario.rate * scenario.clients),
        "errors": sum(client.errors for client in clients),
        "errors_by_reason": _errors_by_reason(clients),
        "reconnects": sum(client.reconnects for client in clients),
        "unconfirmed_bytes": sum(_unconfirmed_bytes(client) for client in clients),
        "connect_ms": outcome.connect.as_ms(50, 99),
        "lateness_ms": outcome.lateness.as_ms(50, 99, 99.9),
        "ack_latency_ms": outcome.acknowledging.as_ms(50, 99, 99.9),
        "latency_ms": None if figures is None else figures.latency_ms,
        "duration_s": round(max((client.elapsed_s for client in clients), default=0.0), 6),
        "success_rate": _success_rate(clients, verification, figures),
        "cpu": {
            "user_s": round(outcome.cpu_user_s, 3),
            "system_s": round(outcome.cpu_system_s, 3),
            "ns_per_packet": round(cpu_s * 1e9 / packets, 2) if packets else None,
        },
        "daemon": None if figures is None else figures.ledger,
        "verify": None if verification is None else verification.as_json(),
        "per_client": [_client_json(client) for client in clients],
    }


def misses(
    scenario: Scenario, outcome: Outcome, thresholds: Thresholds, verification: Verification | None
) -> list[str]:
    """Everything that makes the answer "no", one sentence each."""
    found = [] if scenario.flat_out else _pace_misses(scenario, outcome, thresholds.rate_percent_min)
    broken = sum(record.broken is not None for client in outcome.clients for record in client.connections)
    if broken > thresholds.reconnects_max:
        found.append(f"{broken} connections were lost, at most {thresholds.reconnects_max} may be")
    never = sum(not client.connections for client in outcome.clients)
    if never:
        found.append(f"{never} of {scenario.clients} clients never had a connection")
    found += _promise_misses(outcome.clients)
    if verification is not None and verification.mismatches:
        noun = "connections" if scenario.protocol == "raw" else "streams"
        found.append(f"{len(verification.mismatches)} {noun} are not stored as they were sent")
    return found


def _pace_misses(scenario: Scenario, outcome: Outcome, percent_min: float) -> list[str]:
    found: list[str] = []
    rate, target = sum(client_rate(client) for client in outcome.clients), float(scenario.rate * scenario.clients)
    elapsed_s = max((client.elapsed_s for client in outcome.clients), default=0.0)
    if elapsed_s >= RATE_JUDGED_FROM_S and 100 * rate < percent_min * target:
        found.append(
            f"rate {rate:.1f} packets/s is {100 * rate / target:.2f} % of {target:.1f}, "
            f"at least {percent_min:g} % are wanted"
        )
    wanted = (scenario.packets_per_client or 0) * scenario.clients
    unsent = sum(client.packets_unsent for client in outcome.clients)
    if not outcome.interrupted and 100 * (wanted - unsent) < percent_min * wanted:
        found.append(f"{unsent} of {wanted} packets could not be sent in time")
    return found


def _promise_misses(clients: Sequence[ClientResult]) -> list[str]:
    """Of mps clients: what nobody has acknowledged, and what was acknowledged and is gone all the same."""
    waiting = sum(client.packets - client.packets_acked for client in clients if client.packets_acked is not None)
    withdrawn = sum(client.packets_withdrawn for client in clients)
    found = []
    if waiting > 0:
        found.append(f"{waiting} packets that were sent are not acknowledged")
    if withdrawn:
        found.append(f"{withdrawn} packets were acknowledged and then asked for again")
    return found


def client_rows(clients: Sequence[ClientResult]) -> tuple[list[ClientResult], list[ClientResult]]:
    """Which clients a table shows: the first ones, and the worst of the others (lost connections, then lowest rate)."""
    first, others = list(clients[:CLIENT_ROWS_FIRST]), clients[CLIENT_ROWS_FIRST:]
    worst = sorted(others, key=lambda client: (-client.errors, client_rate(client)))[:CLIENT_ROWS_WORST]
    return first, worst


def _client_json(client: ClientResult) -> dict[str, Any]:
    last = client.connections[-1] if client.connections else None
    return {
        "client": client.client,
        "packets": client.packets,
        "bytes": client.bytes,
        "packets_unsent": client.packets_unsent,
        "rate": round(client_rate(client), 3),
        "elapsed_s": round(client.elapsed_s, 6),
        "local_address": None if last is None else last.local_address,
        "reconnects": client.reconnects,
        "errors": client.errors,
        "errors_by_reason": client.errors_by_reason,
        "client_id": client.client_id,
        "epoch": client.epoch,
        "level": client.level,
        "packets_acked": client.packets_acked,
        "packets_resent": client.packets_resent,
        "packets_withdrawn": client.packets_withdrawn,
        "acked_s": None if client.acked_s is None else round(client.acked_s, 6),
        "sha256": last.sha256 if last is not None and len(client.connections) == 1 else None,
        "connections": [asdict(record) for record in client.connections],
    }


def _packets_delivered(scenario: Scenario, clients: Sequence[ClientResult]) -> int:
    """Without those that were not acknowledged by the other kernel when their connection broke. Nobody says that they
    were read, much less stored. An mps server says it: acknowledged is delivered."""
    if scenario.protocol == "mps":
        return sum(client.packets_acked or 0 for client in clients)
    records = [record for client in clients for record in client.connections]
    lost = sum(-(-record.unconfirmed_bytes // scenario.packet_size) for record in records)
    return max(0, sum(client.packets for client in clients) - lost)


def _success_rate(
    clients: Sequence[ClientResult], verification: Verification | None, figures: DaemonFigures | None
) -> float | None:
    """Stored over sent, by the spool, or by acknowledgements, or else by the daemon's ledger; None where none of them
    tells what became of ours.

    What a listener with ``store = false`` checked and gave up counts as stored: it did what it was told.
    """
    packets = sum(client.packets for client in clients)
    if not packets:
        return None
    if verification is not None:
        return verification.stored_packets / packets
    if clients[0].packets_acked is not None:
        return sum(client.packets_acked or 0 for client in clients) / packets
    ledger = None if figures is None else figures.ledger
    sent_bytes = sum(client.bytes for client in clients)
    if ledger is None or ledger["received_bytes"] > sent_bytes:  # more than ours: somebody else sent too
        return None
    return (ledger["stored_bytes"] + ledger["unstored_bytes"]) / sent_bytes


def _unconfirmed_bytes(client: ClientResult) -> int:
    return sum(record.unconfirmed_bytes for record in client.connections)


def _errors_by_reason(clients: Sequence[ClientResult]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for client in clients:
        total.update(client.errors_by_reason)
    return dict(total.most_common())


def _iso_utc(unix_ns: int) -> str:
    moment = datetime.datetime.fromtimestamp(unix_ns / 1e9, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
