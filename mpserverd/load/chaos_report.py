"""The outcome of one run of ``mpload chaos``: figures, what is wrong, and the lines and JSON that say so. Pure."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from mpserverd.load.chaos_compare import Comparison
from mpserverd.load.chaos_faults import Done
from mpserverd.load.chaos_plan import ChaosOptions, FaultKind
from mpserverd.load.chaos_sent import SentStream

SCHEMA_VERSION = 2
AFTER_NS = 500_000_000
"""A pause belongs to a fault that was over at most so long before it began: buffers fill first."""
PAUSES_MAX = 20_000
LINES_MAX = 100
MUST_BE_ZERO = ("repeats", "reordered", "dropped_bytes", "lost_bytes", "in_arena_bytes")


class Pauses:
    """Begin and end of what clients waited for, monotonic ns; of very many the longest."""

    def __init__(self) -> None:
        self.all: list[tuple[int, int]] = []

    def add(self, pauses: Iterable[tuple[int, int]]) -> None:
        self.all += pauses
        if len(self.all) > 2 * PAUSES_MAX:
            self.all = sorted(self.all, key=lambda pause: pause[0] - pause[1])[:PAUSES_MAX]

    def by_kind(self, done: Iterable[Done]) -> dict[str, dict[str, float]]:
        """For each kind of fault the longest pause in the wake of each one of it: median and longest, in ms. A fault
        that nobody noticed counts with 0; ``none`` are pauses that no fault explains."""
        faults = sorted(done, key=lambda each: each.begin_ns)
        longest_ns = dict.fromkeys(range(len(faults)), 0)
        unexplained = []
        for begin, end in self.all:
            cause = _cause(faults, begin, end)
            if cause is None:
                unexplained.append(end - begin)
            else:
                longest_ns[cause] = max(longest_ns[cause], end - begin)
        by_kind: dict[str, list[int]] = {"none": unexplained} if unexplained else {}
        for number, each in enumerate(faults):
            by_kind.setdefault(each.kind.value, []).append(longest_ns[number])
        return {
            name: {
                "count": len(values),
                "median_ms": round(statistics.median(values) / 1e6, 1),
                "longest_ms": round(max(values) / 1e6, 1),
            }
            for name, values in sorted(by_kind.items())
        }


def _cause(faults: list[Done], begin: int, end: int) -> int | None:
    """Place of the fault that explains a pause: a process that stood still does, whatever else happened; else the last
    fault before the pause began; else the first one within it. Buffers fill first, so it may be over by then."""
    near = [n for n, each in enumerate(faults) if each.begin_ns <= end and begin <= each.end_ns + AFTER_NS]
    if not near:
        return None
    stops = [n for n in near if faults[n].kind is FaultKind.STOP]
    before = [n for n in near if faults[n].begin_ns <= begin]
    return stops[0] if stops else before[-1] if before else near[0]


class ChaosReport:
    def __init__(self, options: ChaosOptions) -> None:
        self.options = options
        self.keeps_descriptors = False
        self.done: list[Done] = []
        self.missed = 0
        self.streams: list[SentStream] = []
        self.totals: dict[str, int] = {}
        self.clients_done = False
        self.pauses = Pauses()
        self.troubles: list[str] = []
        self.comparison = Comparison()
        self.ledger: Mapping[str, Any] | None = None
        """Totals, as the daemon gave them last."""
        self.restarts_s: list[float] = []
        self.looks = self.ledger_checks = 0
        self._failures: list[str] = []

    # --- what is found out

    def fail(self, text: str) -> None:
        if len(self._failures) < LINES_MAX:
            self._failures.append(text)

    def take_clients(self, streams: list[SentStream], totals: Mapping[str, int]) -> None:
        self.streams, self.totals, self.clients_done = list(streams), dict(totals), True

    def watched(self, looks: int, ledger_checks: int, faults: Iterable[str]) -> None:
        self.looks, self.ledger_checks = looks, ledger_checks
        for text in faults:
            self.fail(text)

    def compare_ledger(self) -> None:
        """The daemon's accounts with the clients', to the byte; call it after the comparison."""
        if self.ledger is None:
            return
        comparison = self.comparison
        expected = dict.fromkeys(MUST_BE_ZERO, 0) | {"gaps": comparison.gaps, "missing": comparison.missing}
        if not self.disconnects:  # what was under way then, nobody knows
            sent = self.sent_bytes
            expected |= {"received_bytes": sent, "stored_bytes": sent, "durable_bytes": sent}
            expected |= {"socket_bytes": self.totals["sent_bytes"], "truncated_bytes": self.torn_bytes}
        for name, value in expected.items():
            if self.ledger[name] != value:
                self.fail(f"the ledger says {self.ledger[name]} {name}, {value} would be right")

    # --- figures

    @property
    def kills(self) -> int:
        return sum(each.kills for each in self.done)

    @property
    def kills_by_kind(self) -> dict[str, int]:
        counts = Counter({each.kind.value: 0 for each in self.done if each.kills})
        for each in self.done:
            if each.kills:
                counts[each.kind.value] += each.kills
        return dict(sorted(counts.items()))

    @property
    def sent_bytes(self) -> int:
        """Of whole packets, over all connections."""
        return sum(stream.wanted_bytes for stream in self.streams)

    @property
    def torn_bytes(self) -> int:
        return self.totals.get("truncated_bytes", 0)

    @property
    def disconnects(self) -> int:
        """Connections that the daemon ended."""
        return self.totals.get("disconnects", 0)

    @property
    def failures(self) -> list[str]:
        """Everything that makes this run a failed one, one line each."""
        found = list(self._failures)
        if not self.clients_done:
            found.append("the run did not come to its end")
        for name, count in (("disconnects", self.disconnects), ("refusals", self.totals.get("refusals", 0))):
            if count:
                found.append(f"{count} {name}")
        comparison = self.comparison
        found += comparison.lines
        if not comparison.is_exact and not comparison.lines:
            found.append(f"{comparison.lost_bytes} bytes lost, {comparison.doubled_bytes} doubled")
        if self.options.faults is not None and len(self.done) < self.options.faults:
            found.append(f"only {len(self.done)} of {self.options.faults} faults could be done")
        return found

    def as_json(self) -> dict[str, Any]:
        comparison, options = self.comparison, self.options
        kinds = Counter(each.kind.value for each in self.done)
        return {
            "schema_version": SCHEMA_VERSION,
            "seed": options.seed,
            "duration_s": options.duration_s,
            "clients": options.clients,
            "connections": self.totals.get("connections", 0),
            "streams": comparison.streams,
            "split_streams": comparison.split_streams,
            "sent_bytes": self.sent_bytes,
            "torn_bytes": self.torn_bytes,
            "stored_bytes": comparison.stored_bytes,
            "lost_bytes": comparison.lost_bytes,
            "doubled_bytes": comparison.doubled_bytes,
            "strange_bytes": comparison.strange_bytes,
            "disconnects": self.disconnects,
            "refusals": self.totals.get("refusals", 0),
            "longest_pause_ms": round(self.totals.get("longest_pause_ns", 0) / 1e6, 1),
            "pauses_by_cause": self.pauses.by_kind(self.done),
            "longest_restart_ms": round(max(self.restarts_s, default=0.0) * 1000, 1),
            "keeps_descriptors": self.keeps_descriptors,
            "kills": self.kills,
            "kills_by_kind": self.kills_by_kind,
            "faults": {kind.value: kinds[kind.value] for kind in FaultKind},
            "faults_without_target": self.missed,
            "looks": self.looks,
            "ledger_checks": self.ledger_checks,
            "failures": self.failures,
            "fine": not self.failures,
        }

    def lines(self) -> list[str]:
        """For people."""
        found = self.as_json()
        faults = ", ".join(f"{count} {kind}" for kind, count in found["faults"].items() if count) or "none"
        kills = ", ".join(f"{count} {kind}" for kind, count in found["kills_by_kind"].items()) or "none"
        return [
            f"sent        {found['sent_bytes']:,} bytes of whole packets over {found['connections']} connections",
            f"stored      {found['stored_bytes']:,} bytes in {found['streams']} streams",
            f"lost        {found['lost_bytes']:,} bytes",
            f"doubled     {found['doubled_bytes']:,} bytes, {found['strange_bytes']:,} that nobody sent",
            f"disconnects {found['disconnects']}, {found['refusals']} refused",
            f"pause       {found['longest_pause_ms']:g} ms at most",
            *(
                f"  {name:<10} median {each['median_ms']:g} ms, longest {each['longest_ms']:g} ms of {each['count']}"
                for name, each in found["pauses_by_cause"].items()
            ),
            f"kills       {found['kills']}: {kills}",
            f"faults      {faults}",
            f"watched     {found['looks']} looks at the counters, {found['ledger_checks']} at the ledger",
            *(f"WRONG: {text}" for text in found["failures"]),
            "everything is there" if found["fine"] else "FAILED",
        ]
