"""Programs that are not ours stream through kills of everything, reloads and restarts, and need not do anything for it.

socat is fed through a pipe; the C program of contrib/ makes its own bytes. Neither knows of the daemon, neither may see
so much as a reset, and the sha256 of what each one sent is that of one stored stream.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from mpserverd.control.client import request_state
from mpserverd.errors import MpserverdError
from mpserverd.load.chaos_faults import Done, Faults
from mpserverd.load.chaos_plan import FaultKind
from tests.integration import senders
from tests.integration.senders import Sender, generated
from tests.integration.supervisor_driver import wait_for
from tests.integration.test_supervisor_death import SEED, Unit

ROUNDS = int(os.environ.get("MPSERVERD_TEST_STRANGER_ROUNDS", "3"))
"""In each round every kind of fault is done once, in an order of its own."""
SOCATS, CONNECTIONS = 3, 4
PIPE_PIECE_BYTES, PIPE_PAUSE_S = 20_000, 0.05
OWN_BYTES = 2_600_000
"""Of each connection of the C program: some 10 s of a write each 20 ms."""
WRITES, WRITE_PAUSE_US = "1,333,8192,16384", "30000"
STEP_S = 0.15


class Feeder:
    """Writes into the pipe of a socat until it is told to end."""

    def __init__(self, port: int, seed: int) -> None:
        self.process = senders.socat_from_pipe(port)
        self.sent_bytes, self._digest = 0, hashlib.sha256()
        self._chance, self._over = random.Random(seed), threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def finish(self) -> str:
        self._over.set()
        self._thread.join()
        senders.finish([self.process])
        return self._digest.hexdigest()

    def _run(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its exit code says it
            while not self._over.wait(PIPE_PAUSE_S):
                self._write(self._chance.randrange(1, PIPE_PIECE_BYTES))
            self._write(-self.sent_bytes % 16)
            self.process.stdin.flush()

    def _write(self, size_bytes: int) -> None:
        assert self.process.stdin is not None
        piece = self._chance.randbytes(size_bytes)
        self.process.stdin.write(piece)
        self.process.stdin.flush()
        self._digest.update(piece)
        self.sent_bytes += size_bytes


def facts_of(unit: Unit) -> dict[str, Any] | None:
    try:
        facts, *fds = request_state(f"{unit.home}/control.sock", deadline_s=0.3)
    except MpserverdError:
        return None
    for fd in fds:
        os.close(fd)
    return facts


def torment(unit: Unit, wanted: Callable[[], bool]) -> list[Done]:
    """Every kind of fault, at most ROUNDS times, while it is ``wanted``; once in any case."""
    done: list[Done] = []
    chance = random.Random(SEED)
    faults = Faults(
        unit.system, lambda: facts_of(unit), lambda workers: unit.configure(workers=workers), SEED, both=True
    )
    faults.workers = unit.settings["workers"]
    try:
        for turn in range(ROUNDS):
            for kind in chance.sample(list(FaultKind), len(FaultKind)):
                if turn and not wanted():
                    return done
                until_s = time.monotonic() + chance.uniform(0, 2 * STEP_S)
                done += faults.do(kind, faults.continue_due)
                while time.monotonic() < until_s or faults.anything_stopped:
                    faults.continue_due()
                    time.sleep(0.005)
    finally:
        faults.continue_due(everything=True)
    return done


@pytest.mark.slow
def test_socat_and_a_c_program_stream_through_everything_without_noticing(
    tmp_path: pathlib.Path, sender: Sender
) -> None:
    senders.needs("socat")
    with Unit(tmp_path) as unit:
        feeders = [Feeder(unit.port, SEED + number) for number in range(SOCATS)]
        options = ("-n", str(CONNECTIONS), "-g", str(OWN_BYTES), "-c", WRITES, "-p", WRITE_PAUSE_US, "-s", str(SEED))
        program = sender.start(unit.port, *options)
        try:
            wait_for(lambda: unit.active() == SOCATS + CONNECTIONS)
            done = torment(unit, lambda: program.poll() is None)
            digests = [feeder.finish() for feeder in feeders]
            senders.finish([program])
        finally:
            for process in [program, *(feeder.process for feeder in feeders)]:
                process.kill()
                process.wait()
        assert set(Counter(each.kind for each in done)) == set(FaultKind), f"seed {SEED}"
        digests += [hashlib.sha256(generated(each, OWN_BYTES, SEED)).hexdigest() for each in range(CONNECTIONS)]
        sent = sum(feeder.sent_bytes for feeder in feeders) + CONNECTIONS * (OWN_BYTES // 16 * 16)
        unit.system.wait_ready(start=unit.system.state.starts)
        wait_for(lambda: unit.durable() == sent, 30)
        assert unit.stored() == sorted(digests), f"seed {SEED}"
        assert unit.system.stop() == 0
