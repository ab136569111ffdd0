"""``make bench``: what a packet costs here, as ratios against plain programs measured in the same run.

Rules: rounds of the daemon and of what it is compared with alternate, and medians are told, so that a busy machine
hurts both alike. Everything lies below build/ and is removed; the spool is bounded by retention. Prints a table and
then one JSON object, and writes nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.bench import acknowledged, baselines, readings  # noqa: E402
from tests.integration.driver import BIN, Daemon  # noqa: E402

PACKET_BYTES = 16
BATCH_PACKETS = acknowledged.BATCH_PACKETS
FIELDS = {"sequence": "<u8", "time": "<u8"}
LAYOUT = {"sample16": {"size": PACKET_BYTES, "fields": FIELDS, "sequence": "sequence", "time": "time"}}
FAST = {"receive_buffer_bytes": 0}
"""The kernel sizes the receive buffer, as it does for socat; 131,072 bytes halve what one ``recv`` brings."""
BIG = {"bytes": "256 MiB"}
"""One flat-out stream may hold a third of it, which is what the disk takes in about 50 ms."""
SETTLE_S = 1.0
DURABLE_DEADLINE_S = 60.0


@dataclasses.dataclass(frozen=True)
class Result:
    """``aim`` is the bound that the value is held to; ``higher_is_better`` says on which side of it."""

    name: str
    value: float
    unit: str
    aim: float | None = None
    higher_is_better: bool = False

    @property
    def verdict(self) -> str:
        if self.aim is None:
            return ""
        return "yes" if (self.value >= self.aim if self.higher_is_better else self.value <= self.aim) else "NO"


@dataclasses.dataclass(frozen=True)
class Cost:
    """``ns`` is CPU time of the whole daemon a packet, ``storer_ns`` the storer's part of it. ``rate`` is in packets/s:
    until the last one is durable, or as they are sent when nothing is stored."""

    ns: float
    storer_ns: float
    rate: float


class Bench:
    def __init__(self, directory: pathlib.Path, rounds: int, duration_s: float) -> None:
        self.directory = directory
        self.rounds = rounds
        self.duration_s = duration_s
        self.results: list[Result] = []

    def add(self, *result: Any, **more: Any) -> None:
        self.results.append(Result(*result, **more))
        latest = self.results[-1]
        print(f"  {latest.name}: {latest.value:.4g} {latest.unit}", file=sys.stderr, flush=True)

    # -- the daemon and its load

    @contextlib.contextmanager
    def daemon(self, **changes: Any) -> Iterator[Daemon]:
        """Four workers and 64 MiB of buffers, the defaults, unless ``changes`` say otherwise; removed afterwards."""
        home = pathlib.Path(tempfile.mkdtemp(prefix="daemon-", dir=self.directory))
        settings: dict[str, Any] = {
            "server": {"workers": 4, "max_clients": 300},
            "buffers": {"bytes": "64 MiB"},
            "layout": LAYOUT,
            "listener": [{"name": "raw", "address": "127.0.0.1:0", "layout": "sample16", "on_full": "block"}],
            "spool": {"path": str(home / "spool"), "segment_bytes": "64 MiB", "max_bytes": "4 GiB"},
            "log": {"level": "info"},
        }
        for section, table in changes.items():
            old = settings[section]
            settings[section] = [old[0] | table] if isinstance(old, list) else old | table
        try:
            with Daemon(home, settings) as daemon:
                yield daemon
        finally:
            shutil.rmtree(home, ignore_errors=True)

    def load(
        self, port: int, *, clients: int = 1, rate: float = 0.0, duration_s: float = 0.0, protocol: str = "raw"
    ) -> dict[str, Any]:
        """Run mpload to its end; its results. Rate 0 is flat out."""
        report = self.directory / "load.json"
        command = load_command(port, clients, rate, duration_s or self.duration_s)
        command += ["--protocol", protocol, "--json", str(report)]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode:
            raise RuntimeError(f"mpload exited {answer.returncode}: {answer.stdout[-2000:]}{answer.stderr[-2000:]}")
        result: dict[str, Any] = json.loads(report.read_text())
        return result

    def flat_out(self, clients: int = 1, **changes: Any) -> Cost:
        stored = changes.get("listener", {}).get("store", True)
        with self.daemon(**changes) as daemon:
            port, pids, storer = daemon.port(), daemon.pids(), daemon.pid_of("storer")
            before, storer_before = readings.cpu_s(pids), readings.cpu_s([storer])
            report = self.load(port, clients=clients)
            sent = int(report["packets_sent"])
            account = "durable_bytes" if stored else "received_bytes"
            daemon.wait_for(lambda: daemon.account(account) == sent * PACKET_BYTES, DURABLE_DEADLINE_S)
            cpu_s, storer_s = readings.cpu_s(pids) - before, readings.cpu_s([storer]) - storer_before
            wall_s = stored_within_s(daemon.spool) if stored else float(report["duration_s"])
            daemon.ledger()
        return Cost(cpu_s / sent * 1e9, storer_s / sent * 1e9, sent / wall_s)

    # -- the measurements

    def acknowledged_rate(self) -> None:
        acknowledged.rate(self, {"listener": acknowledged.LISTENER | FAST, "buffers": BIG})

    def acknowledgement_latency(self) -> None:
        more = {"server": {"max_clients": 1000}, "buffers": BIG}
        acknowledged.latency(self, {"listener": acknowledged.LISTENER, **more})

    def cpu_of_one_client(self) -> None:
        """One flat-out client against socat and against a plain writer, round by round."""
        names = ("socat", "stored", "storer", "unstored", "stored_rate", "writer_rate")
        rows: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(self.rounds):
            cpu, sent_bytes = baselines.socat_cpu_s(lambda port: int(self.load(port)["bytes_sent"]))
            rows["socat"].append(cpu / (sent_bytes / PACKET_BYTES) * 1e9)
            cost = self.flat_out(listener=FAST, buffers=BIG)
            rows["stored"].append(cost.ns)
            rows["storer"].append(cost.storer_ns)
            rows["stored_rate"].append(cost.rate)
            writer = baselines.direct_writer_bytes_per_s(self.directory, self.duration_s)
            rows["writer_rate"].append(writer / PACKET_BYTES)
            rows["unstored"].append(self.flat_out(listener=FAST | {"store": False}, buffers=BIG).ns)
        socat, stored, storer, unstored, stored_rate, writer_rate = (statistics.median(rows[name]) for name in names)
        self.add("socat to /dev/null", socat, "CPU ns/packet")
        self.add("received, checked, stored, synced", stored, "CPU ns/packet")
        self.add("  the storer's part of it", storer, "CPU ns/packet")
        self.add("  against socat", stored / socat, "times", 3.0)
        self.add("received, checked, not stored", unstored, "CPU ns/packet")
        self.add("  against socat", unstored / socat, "times", 1.7)
        self.add("plain O_DIRECT writer", writer_rate / 1e6, "M packets/s")
        self.add("synced, one client", stored_rate / 1e6, "M packets/s")
        self.add("  against the plain writer", stored_rate / writer_rate, "times", 0.8, higher_is_better=True)

    def many_connections(self) -> None:
        """1,000 connections with the load beside the daemon on the same cores."""
        for stored in (True, False):
            more: dict[str, Any] = {"listener": {"store": stored}, "server": {"max_clients": 1000}}
            more["buffers"] = {"bytes": "256 MiB"}
            cost = self.flat_out(1000, **more)
            words = "stored" if stored else "not stored"
            self.add(f"1,000 connections, {words}", cost.rate / 1e6, "M packets/s")
            self.add(f"  daemon alone, {words}", cost.ns, "CPU ns/packet")

    def ordinary_load(self) -> None:
        """10 clients at 10,050 packets/s each, and nothing at all."""
        with self.daemon() as daemon:
            pids = daemon.pids()
            self.add("idle CPU", self._share(pids, lambda: time.sleep(10.0)), "% of a core", 0.3)
            self.add("idle memory, buffers whole", readings.memory_bytes(pids)["total"] / 1e6, "MB")
            report: dict[str, Any] = {}
            port = daemon.port()
            share = self._share(pids, lambda: report.update(self.load(port, clients=10, rate=10_050, duration_s=15.0)))
            self.add("CPU at 10 x 10,050/s", share, "% of a core", 2.0)
            self.add("memory at 10 x 10,050/s, buffers whole", readings.memory_bytes(pids)["total"] / 1e6, "MB", 150.0)
            self.add("rate error of mpload", abs(report["rate"] / report["target_rate"] - 1) * 100, "%", 0.1)

    def memory_of_clients(self) -> None:
        """Private memory that 250 connected clients add; the buffers are shared and fixed."""
        clients = 250
        with self.daemon() as daemon:
            pids, port = daemon.pids(), daemon.port()
            before = readings.memory_bytes(pids)["private"]
            command = load_command(port, clients, 804.0, 6.0)
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as load:
                daemon.wait_until_connected(clients)
                time.sleep(2 * SETTLE_S)
                after = readings.memory_bytes(pids)["private"]
                load.wait()
        self.add("memory a client, 250 connected", (after - before) / clients / 1024, "KiB")

    def _share(self, pids: list[int], action: Callable[[], object]) -> float:
        """Percent of one core that the processes take while ``action`` runs."""
        time.sleep(SETTLE_S)
        before, started = readings.cpu_s(pids), time.monotonic()
        action()
        return (readings.cpu_s(pids) - before) / (time.monotonic() - started) * 100


def stored_within_s(spool: pathlib.Path) -> float:
    """From the first connection to the last commit, by the catalog."""
    with contextlib.closing(sqlite3.connect(f"file:{spool}/catalog.sqlite?mode=ro", uri=True)) as catalog:
        query = "SELECT max(updated_unix_ns) - min(created_unix_ns) FROM stream"
        return int(catalog.execute(query).fetchone()[0]) / 1e9


def load_command(port: int, clients: int, rate: float, duration_s: float) -> list[str]:
    command = [str(BIN / "mpload"), "run", "--host", "127.0.0.1", "--port", str(port), "--clients", str(clients)]
    command += ["--rate", f"{rate:g}", "--packet-size", str(PACKET_BYTES), "--duration", f"{duration_s:g}"]
    if rate or clients > 1:  # one client that is flat out sends as much at a time as the socket takes
        command += ["--batch", str(BATCH_PACKETS)]
    return command


def main() -> int:
    parts = {
        "cpu": Bench.cpu_of_one_client,
        "connections": Bench.many_connections,
        "load": Bench.ordinary_load,
        "memory": Bench.memory_of_clients,
        "acknowledged": Bench.acknowledged_rate,
        "latency": Bench.acknowledgement_latency,
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3, help="how often baselines and daemon alternate")
    parser.add_argument("--duration", type=float, default=4.0, help="seconds of load in each round")
    parser.add_argument("--only", choices=parts, action="append", help="measure this part; may be repeated")
    arguments = parser.parse_args()
    if shutil.which("socat") is None:
        print("bench: needs socat; type: sudo apt-get install socat", file=sys.stderr)
        return 2
    (ROOT / "build").mkdir(exist_ok=True)
    directory = pathlib.Path(tempfile.mkdtemp(prefix="bench-", dir=ROOT / "build"))
    try:
        bench = Bench(directory, arguments.rounds, arguments.duration)
        for name, part in parts.items():
            if arguments.only is None or name in arguments.only:
                part(bench)
    except KeyboardInterrupt:
        print("bench: interrupted, everything is stopped", file=sys.stderr)
        return 130
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print_results(bench.results)
    return 0


def print_results(results: list[Result]) -> None:
    print(f"\n{'measured':<44} {'value':>10}  {'unit':<15} {'aim':>8}  met")
    for result in results:
        aim = "" if result.aim is None else f"{'>=' if result.higher_is_better else '<='} {result.aim:g}"
        print(f"{result.name:<44} {result.value:>10.4g}  {result.unit:<15} {aim:>8}  {result.verdict}")
    machine = {"kernel": platform.release(), "cores": os.cpu_count(), "python": platform.python_version()}
    rows = [dataclasses.asdict(result) | {"met": result.verdict != "NO"} for result in results]
    print()
    print(json.dumps({"schema_version": 1, "machine": machine, "results": rows}))


if __name__ == "__main__":
    sys.exit(main())
