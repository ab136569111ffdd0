"""``mpload chaos``: a daemon and clients of its own, faults at random moments, and then: is every byte there?

    1. the daemon under the stand-in for systemd, in a directory of its own; the clients in a process of their own
    2. at seeded random moments one fault after another, while counters and ledger are watched
    3. clients end; the daemon becomes quiet; its ledger must name exactly what was sent; it stops with exit code 0
    4. everything that was sent is compared with everything that is stored

Rules: nothing runs longer than its deadline; whatever happens, nothing is left behind, unless the directory is to be
kept. The daemon's own words are used for figures only; what decides is what clients sent and what files hold.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

from mpserverd.errors import MpserverdError, StartError
from mpserverd.load.chaos_clients import plan_message
from mpserverd.load.chaos_compare import Comparison, compare
from mpserverd.load.chaos_faults import Facts, Faults
from mpserverd.load.chaos_plan import (
    WORKERS_MIN,
    ChaosOptions,
    FaultKind,
    config_text,
    listener_name,
    plan_clients,
    plan_daemon,
    plan_faults,
)
from mpserverd.load.chaos_report import ChaosReport, Pauses
from mpserverd.load.chaos_sent import SentStream, from_plain
from mpserverd.load.chaos_watch import Watch
from mpserverd.load.messages import MessageStream
from mpserverd.load.stand_in import StandIn, UnitSettings

LOOK_S = 0.2
LEDGER_S = 3.0
TURN_S = 0.01
WARM_UP_S_MAX = 20.0
OVERTIME_S = 60.0
"""After the duration: for faults that had to wait for their targets, and as much again for the clients' ends."""
QUIET_S_MAX = 60.0
DAEMON_COMMAND = (sys.executable, "-c", "import sys; from mpserverd.cli.daemon import main; sys.exit(main())")

Say = Callable[[str], None]


class InterruptedRunError(MpserverdError):
    """Ctrl-C or SIGTERM; nothing was judged."""

    exit_code = 130


class ClientsProcess:
    """The process with all clients, and what it has told."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "mpserverd.load.chaos_clients", str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        self._control = MessageStream(ours)
        self.streams: list[SentStream] = []
        self.pauses = Pauses()
        self.troubles: list[str] = []
        self.totals: dict[str, int] = {}
        self.is_over = False

    def send(self, kind: str, **fields: Any) -> None:
        self._control.send(kind, **fields)

    def hear(self) -> list[str]:
        """Take what it says; the troubles of clients among it. Raises MpserverdError when it died."""
        messages = self._control.receive()
        if messages is None:
            if self.is_over:
                return []
            raise MpserverdError("the process of the clients died")
        told = []
        for message in messages:
            kind = message.pop("kind")
            if kind == "streams":
                self.streams += [from_plain(fields) for fields in message["streams"]]
            elif kind == "pauses":
                self.pauses.add((begin, end) for begin, end in message["pauses"])
            elif kind == "trouble":
                told.append(message["text"])
            else:
                self.totals, self.is_over = message, kind == "result"
        self.troubles += told
        return told

    def close(self) -> None:
        self._control.close()
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Chaos:
    """One run. ``say`` gets a line for each thing that happens; ``before_compare`` may look at the spool, for tests."""

    def __init__(
        self,
        options: ChaosOptions,
        *,
        say: Say = print,
        directory: pathlib.Path | None = None,
        keep: bool = False,
        unit_settings: UnitSettings = UnitSettings(),  # noqa: B008  (frozen)
        before_compare: Callable[[pathlib.Path], None] = lambda spool: None,
    ) -> None:
        self.options, self._say_line, self._keep = options, say, keep
        self._before_compare = before_compare
        self.clients_plan, self.daemon_plan = plan_clients(options), plan_daemon(options)
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="mpload-chaos-", dir=directory))
        self.spool = self.directory / "spool"
        self.report = ChaosReport(options)
        self._began_ns = time.monotonic_ns()
        self._config = self.directory / "mpserverd.toml"
        self._configure(WORKERS_MIN)
        self._stack = contextlib.ExitStack()
        self._log = self._stack.enter_context((self.directory / "daemon.log").open("ab"))
        self._unit = StandIn(
            [*DAEMON_COMMAND, "--config", str(self._config)],
            directory=self.directory,
            settings=dataclasses.replace(unit_settings, seed=options.seed, restart_signal=signal.SIGQUIT),
            environ={**os.environ, "OPENBLAS_NUM_THREADS": "1", "MPSERVERD_CRASHES_MAX": "0"},
            output=self._log.fileno(),
        )
        self._watch = Watch(str(self.directory / "control.sock"))
        self._clients: ClientsProcess | None = None
        self._faults: Faults | None = None
        self._interrupted = False
        self._look_due_s = self._ledger_due_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing behind."""
        if self._faults is not None:
            self._faults.continue_due(everything=True)
        if self._clients is not None:
            self._clients.close()
        self._unit.close()
        self._stack.close()
        if self._keep:
            self._say_line(f"kept: {self.directory}")
        else:
            shutil.rmtree(self.directory, ignore_errors=True)

    # --- the run

    def run(self) -> ChaosReport:
        """Raises MpserverdError when the run itself failed; a daemon that failed is in the report."""
        with self._interruptible():
            try:
                self._start()
                self._torment()
                self._finish()
            except StartError as error:
                self.report.fail(f"the daemon did not come back: {error}")
                self.report.fail(f"its last lines: {self._log_tail()}")
            self._judge()
        return self.report

    def _start(self) -> None:
        self._unit.start()
        self._unit.wait_ready()
        stats = self._watch.look()
        if stats is None:
            raise StartError("the daemon does not answer on its control socket")
        ports = {listener["name"]: int(listener["port"]) for listener in stats["listeners"]}
        sizes = {plan.packet_size for plan in self.clients_plan}
        targets = {size: ("127.0.0.1", ports[listener_name(size)]) for size in sizes}
        self.report.keeps_descriptors = self._unit.state.store_messages > 0
        self.say(f"daemon ready, {'stores' if self.report.keeps_descriptors else 'does not store'} its descriptors")
        self._clients = ClientsProcess()
        self._clients.send("plan", **plan_message(self.clients_plan, targets, self.options.seed))
        kinds = self.options.kinds
        both = FaultKind.WORKER in kinds and FaultKind.STORER in kinds
        self._faults = Faults(self._unit, self._watch.ask_facts, self._configure, self.options.seed, both=both)
        self._faults.workers = WORKERS_MIN
        self._wait(lambda: self._connections() >= len(self.clients_plan), WARM_UP_S_MAX)
        self.say(f"{self._connections()} connections of {len(self.clients_plan)} clients")

    def _connections(self) -> int:
        return 0 if self._clients is None else self._clients.totals.get("connections", 0)

    def _torment(self) -> None:
        assert self._faults is not None
        kinds = [kind for kind in self.options.kinds if self.report.keeps_descriptors or not kind.needs_store]
        for kind in self.options.kinds:
            if kind not in kinds:
                self.say(f"no {kind.value}: clients of a daemon that does not store its descriptors would notice")
        plan = plan_faults(self.options, kinds)
        begin_s = time.monotonic()
        deadline_s = begin_s + self.options.duration_s + OVERTIME_S
        for fault in plan:
            if len(self.report.done) >= self.options.fault_count or time.monotonic() >= deadline_s:
                break
            self._wait_until(begin_s + fault.at_s)
            done = self._faults.do(fault.kind, self._turn)
            for each in done:
                self.say(each.text)
            self.report.done += done
            if not done:
                self.say(f"no target for {fault.kind.value}")
                self.report.missed += 1
        self._wait_until(begin_s + self.options.duration_s)
        self._faults.continue_due(everything=True)

    def _finish(self) -> None:
        """The clients end, the daemon gets everything to disk, names it, and stops."""
        assert self._clients is not None and self._faults is not None
        self._clients.send("finish")
        if not self._wait(lambda: self._clients is not None and self._clients.is_over, OVERTIME_S):
            self.report.fail(f"clients did not come to their end within {OVERTIME_S:.0f} s")
        self.report.take_clients(self._clients.streams, self._clients.totals)
        self.say(f"clients are done: {self.report.sent_bytes} bytes of whole packets")
        if not self._wait(self._is_quiet, QUIET_S_MAX):
            self.report.fail(f"the daemon was not quiet within {QUIET_S_MAX:.0f} s")
        self._check_workers()
        self._check_chunks()
        self._check_ledger()
        code = self._unit.stop()
        self.say(f"daemon stopped, exit code {code}")
        if code != 0:
            self.report.fail(f"the daemon's exit code was {code}; its last lines: {self._log_tail()}")

    def _is_quiet(self) -> bool:
        stats = self._watch.look()
        if stats is None or stats["active_connections"]:
            return False
        ledger = stats["ledger"]
        stored: bool = ledger["durable_bytes"] == ledger["received_bytes"] and not ledger["in_arena_bytes"]
        return stored

    def _check_workers(self) -> None:
        """What the last reload said is so."""
        assert self._faults is not None
        wanted = self._faults.workers
        facts: Facts = self._watch.facts or {}
        if not self._wait(lambda: _running(self._watch.ask_facts()) == wanted, QUIET_S_MAX):
            found = _running(facts)
            self.report.fail(f"{found} workers run; the last configuration says {wanted}")

    def _check_chunks(self) -> None:
        """Every chunk is free or leased to somebody who lives, whoever died with it in hand."""
        wrong = "not looked at"

        def right() -> bool:
            nonlocal wrong
            wrong = self._watch.stray_chunks()
            return not wrong

        if not self._wait(right, QUIET_S_MAX):
            self.report.fail(f"nothing is held any more, but {wrong}")

    def _check_ledger(self) -> None:
        try:
            ledger = self._watch.ledger()
        except (MpserverdError, subprocess.TimeoutExpired) as error:
            self.report.fail(str(error))
            return
        if not ledger["holds"]:
            self.report.fail("at the end the ledger does not balance")
        self.report.ledger = ledger["totals"]

    def _judge(self) -> None:
        report = self.report
        report.pauses = self._clients.pauses if self._clients is not None else report.pauses
        report.watched(self._watch.looks, self._watch.ledger_checks, self._watch.faults)
        report.restarts_s = self._faults.restarts_s if self._faults is not None else []
        report.troubles = self._clients.troubles if self._clients is not None else []
        if not report.clients_done or self._faults is None:
            return
        self._before_compare(self.spool)
        self.say("comparing")
        try:
            report.comparison = compare(self.spool, report.streams, self.options.seed)
        except Exception as error:  # a spool in ruins must not hide the rest of the report
            report.comparison = Comparison(lost_bytes=report.sent_bytes)
            report.fail(f"the spool cannot be compared: {type(error).__name__}: {error}")
        report.compare_ledger()

    # --- while it goes on

    def _wait(self, condition: Callable[[], bool], deadline_s: float) -> bool:
        """Whether it came true in time; everything else goes on meanwhile."""
        until_s = time.monotonic() + deadline_s
        while not condition():
            if time.monotonic() >= until_s:
                return False
            self._turn()
            time.sleep(TURN_S)
        return True

    def _wait_until(self, moment_s: float) -> None:
        self._wait(lambda: time.monotonic() >= moment_s, moment_s - time.monotonic())

    def _turn(self) -> None:
        if self._interrupted:
            raise InterruptedRunError("interrupted")
        assert self._clients is not None and self._faults is not None
        self._faults.continue_due()
        for text in self._clients.hear():
            self.say(text)
        now_s = time.monotonic()
        if not self._unit.state.ready or self._faults.anything_stopped:
            return
        if now_s >= self._ledger_due_s:
            self._ledger_due_s = now_s + LEDGER_S
            self._ask_for_ledger()
        elif now_s >= self._look_due_s:
            self._look_due_s = now_s + LOOK_S
            self._watch.look()

    def _ask_for_ledger(self) -> None:
        deaths = self._unit.state.deaths
        if not self._watch.check_ledger() and not self._watch.check_ledger() and self._unit.state.deaths == deaths:
            self._watch.fault("mpserverctl ledger said no, twice")

    def say(self, text: str) -> None:
        self._say_line(f"{(time.monotonic_ns() - self._began_ns) / 1e9:8.3f}  {text}")

    def _configure(self, workers: int) -> None:
        text = config_text(self.daemon_plan, self.clients_plan, self.directory, workers)
        fresh = self._config.with_suffix(".new")
        fresh.write_text(text)
        fresh.replace(self._config)

    def _log_tail(self) -> str:
        return (self.directory / "daemon.log").read_text(errors="replace")[-2000:]

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        def interrupt(*_: object) -> None:
            self._interrupted = True

        before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _running(facts: Facts | None) -> int:
    if facts is None:
        return 0
    return sum(worker["state"] == "running" and worker["wanted"] for worker in facts["workers"])
