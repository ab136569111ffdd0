"""Runs a scenario in several sender processes, from the first connection to the merged result.

Rules: the processes talk over socket pairs (``messages.py``); all start at one time of the monotonic clock, which is
the same for all processes of a machine. The one that calls ``run`` decides when to stop and shows progress; a sender
that dies fails the run.

It judges nothing; that is ``results.py``.
"""

from __future__ import annotations

import multiprocessing
import selectors
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import Any

from mpserverd.client.pacing import NS_PER_S
from mpserverd.errors import MpserverdError, UnreachableError
from mpserverd.load.histogram import Histogram
from mpserverd.load.link import ClientResult, ConnectionRecord
from mpserverd.load.messages import Message, MessageStream
from mpserverd.load.scenario import Scenario, split_clients, targets_as_text
from mpserverd.load.sender import run_sender
from mpserverd.load.words import reason_text

TICK_S = 0.25
START_MARGIN_NS, START_MARGIN_NS_PER_CLIENT = 20_000_000, 50_000
"""Between the order to start and the start: every process has heard it by then and has made its clients' schedules."""
EXIT_DEADLINE_S = 5.0


@dataclass(frozen=True)
class Progress:
    """Sums over all clients, ``elapsed_s`` after the start."""

    elapsed_s: float
    packets: int
    bytes: int
    connected: int
    errors: int
    last_error: str | None
    acked: int = 0


@dataclass
class Outcome:
    """What all senders reported, in the order of the clients."""

    clients: list[ClientResult] = field(default_factory=list)
    lateness: Histogram = field(default_factory=Histogram)
    connect: Histogram = field(default_factory=Histogram)
    acknowledging: Histogram = field(default_factory=Histogram)
    started_unix_ns: int = 0
    start_ns: int = 0
    unix_offset_ns: int = 0
    elapsed_s: float = 0.0
    cpu_user_s: float = 0.0
    cpu_system_s: float = 0.0
    interrupted: bool = False


class Crew:
    """Use as a context manager: leaving it ends every process that is still there."""

    def __init__(self, scenario: Scenario, processes: int) -> None:
        self.scenario = scenario
        self.outcome = Outcome()
        self._stop_wanted = self._stop_sent = False
        self._said: dict[MessageStream, dict[str, Message]] = {}
        self._processes: list[BaseProcess] = []
        self._selector = selectors.DefaultSelector()
        self._spawn(split_clients(scenario.clients, processes))

    def _spawn(self, parts: list[range]) -> None:
        method = "fork" if sys.platform == "linux" else "spawn"
        context: Any = multiprocessing.get_context(method)
        ours: list[socket.socket] = []
        for clients in parts:
            our_end, their_end = socket.socketpair()
            ours.append(our_end)
            inherited = list(ours) if method == "fork" else []
            process = context.Process(target=run_sender, args=(self.scenario, clients, their_end, inherited))
            process.start()
            their_end.close()
            self._processes.append(process)
            stream = MessageStream(our_end)
            self._said[stream] = {}
            self._selector.register(stream, selectors.EVENT_READ)

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self._said:
            stream.close()
        for process in self._processes:
            process.join(EXIT_DEADLINE_S)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        self._selector.close()

    def request_stop(self) -> None:
        """End early and in order. Safe to call from a signal handler."""
        self._stop_wanted = True

    # --- the run

    def run(self, show: Callable[[Progress], None], before_close: Callable[[dict[str, int]], None]) -> Outcome:
        """Connect, send, close. Raises UnreachableError when not one client was let in.

        ``show`` is called about four times a second; ``before_close`` once, when everything is sent and the connections
        are still open, with the bytes that each of them took, by local address.
        """
        self._wait_for("ready", lambda _: None)
        if not self._stop_wanted:
            self._check_reachable()
            self._start()
        self._wait_for("sent", show)
        self.outcome.elapsed_s = (time.monotonic_ns() - self.outcome.start_ns) / NS_PER_S
        show(self._progress())
        before_close({address: sent for said in self._said.values() for address, sent in said["sent"]["open"].items()})
        self._tell("close")
        self._wait_for("result", lambda _: None)
        self._merge()
        return self.outcome

    def _check_reachable(self) -> None:
        ready = [said["ready"] for said in self._said.values()]
        if not any(message["ever_connected"] for message in ready):
            reasons = sorted({reason_text(message["last_error"] or "no attempt was made") for message in ready})
            raise UnreachableError(
                f"no client could connect to {targets_as_text(self.scenario.targets)}: {', '.join(reasons)}"
            )

    def _start(self) -> None:
        outcome = self.outcome
        outcome.start_ns = time.monotonic_ns() + START_MARGIN_NS + START_MARGIN_NS_PER_CLIENT * self.scenario.clients
        outcome.unix_offset_ns = time.time_ns() - time.monotonic_ns()
        outcome.started_unix_ns = outcome.start_ns + outcome.unix_offset_ns
        self._tell("start", start_ns=outcome.start_ns, unix_offset_ns=outcome.unix_offset_ns)

    def _wait_for(self, kind: str, show: Callable[[Progress], None]) -> None:
        """Until every sender has said ``kind``."""
        shown_s = time.monotonic()
        while not all(kind in said for said in self._said.values()):
            if self._stop_wanted and not self._stop_sent:
                self._stop_sent = self.outcome.interrupted = True
                self._tell("stop")
            for key, _ in self._selector.select(TICK_S):
                self._hear(key.fileobj)  # type: ignore[arg-type]
            if time.monotonic() - shown_s >= TICK_S:
                shown_s = time.monotonic()
                show(self._progress())

    def _hear(self, stream: MessageStream) -> None:
        messages = stream.receive()
        if messages is None:
            raise MpserverdError("a sender process died; its clients' results are lost")
        for message in messages:
            self._said[stream][message["kind"]] = message
            if message["kind"] == "result":
                self._selector.unregister(stream)

    def _tell(self, kind: str, **fields: Any) -> None:
        for stream in self._said:
            stream.send(kind, **fields)

    def _progress(self) -> Progress:
        latest = [said.get("progress") or said["ready"] for said in self._said.values() if said]
        errors = [message["last_error"] for message in latest if message["last_error"]]
        # as of the senders' reports, so that a rate made of two of them is exact
        at_ns = sum(message["at_ns"] for message in latest) // max(1, len(latest))
        return Progress(
            elapsed_s=max(0, at_ns - self.outcome.start_ns) / NS_PER_S if self.outcome.start_ns else 0.0,
            packets=sum(message["packets"] for message in latest),
            bytes=sum(message["bytes"] for message in latest),
            connected=sum(message["connected"] for message in latest),
            errors=sum(message["errors"] for message in latest),
            last_error=errors[-1] if errors else None,
            acked=sum(message["acked"] for message in latest),
        )

    def _merge(self) -> None:
        outcome = self.outcome
        for said in self._said.values():
            result = said["result"]
            for row in result["clients"]:
                connections = [ConnectionRecord(**record) for record in row.pop("connections")]
                outcome.clients.append(ClientResult(**row, connections=connections))
            outcome.lateness.merge(Histogram.from_json(result["lateness"]))
            outcome.connect.merge(Histogram.from_json(result["connect"]))
            outcome.acknowledging.merge(Histogram.from_json(result["acknowledging"]))
            outcome.cpu_user_s += result["cpu_user_s"]
            outcome.cpu_system_s += result["cpu_system_s"]
