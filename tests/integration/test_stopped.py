"""Processes that stand still (SIGSTOP) for longer than anybody waits for them, and then go on."""

from __future__ import annotations

import os
import pathlib
import signal
import time

import pytest

from tests.integration.driver import session_pids
from tests.integration.streaming import Streamer
from tests.integration.supervisor_driver import wait_for
from tests.integration.test_frozen_filesystem import FrozenUnit

BYTES_PER_S = 200_000
STOPPED_S = 4.5
"""Longer than the heartbeat's deadline of 2.5 s and the look once a second."""


@pytest.mark.parametrize("who", ["supervisor", "everybody"])
def test_after_a_long_stop_nobody_is_killed_for_being_late(tmp_path: pathlib.Path, who: str) -> None:
    """As when a laptop sleeps: the children could not beat, or nobody could look."""
    with FrozenUnit(tmp_path) as unit:
        client = Streamer(unit.port, BYTES_PER_S, 1).start()
        try:
            wait_for(lambda: unit.durable() > 0)
            main = unit.system.state.pid
            before = sorted(session_pids(main))
            stopped = [main] if who == "supervisor" else before
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            until_s = time.monotonic() + STOPPED_S
            wait_for(lambda: time.monotonic() >= until_s)
            for pid in reversed(stopped):
                os.kill(pid, signal.SIGCONT)
            sent = client.sent_bytes
            wait_for(lambda: unit.durable() > sent)
            until_s = time.monotonic() + 2.0  # two more looks at the heartbeats
            wait_for(lambda: time.monotonic() >= until_s)
            assert sorted(session_pids(main)) == before, unit.log()[-2000:]
        finally:
            digest = client.finish()
        wait_for(lambda: unit.durable() == client.sent_bytes)
        assert unit.stored() == [digest]
