"""Hot connections that share a worker are parted, and not a byte of them is lost or moved."""

from __future__ import annotations

import random
import threading
from pathlib import Path

from mpserverd.arena.counters import Role, column
from mpserverd.arena.state import SUPERVISOR_SLOT, Con
from tests.integration.supervisor_driver import RunningSupervisor, wait_for

PARTED_S = 90.0
"""Three measurements of CPU time, 5 s apart, and a machine that is loaded."""

LISTENER = """
[[listener]]
name = "checked"
address = "127.0.0.1:0"
layout = "numbers"
store = false
[layout.numbers]
size = 2
fields = { sequence = "<u2" }
sequence = "sequence"
"""


def counter(supervisor: RunningSupervisor, name: str) -> int:
    with supervisor.tables() as (_, state, _):
        return int(state.slots[SUPERVISOR_SLOT, column(Role.SUPERVISOR, name)])


def homes(supervisor: RunningSupervisor) -> dict[int, int]:
    """Workers by the port of the client."""
    return dict(zip(supervisor.word(Con.PEER_PORT), supervisor.word(Con.WORKER), strict=True))


def test_two_hot_connections_on_one_worker_are_parted(tmp_path: Path) -> None:
    """Numbers that are all wrong: their check costs a worker more time than they cost who sends them."""
    noise = random.Random(1).randbytes(1 << 16)
    over = threading.Event()
    sent = [0, 0]

    with RunningSupervisor(tmp_path, workers=2, more=LISTENER) as supervisor:
        ports = {each["name"]: each["address"] for each in supervisor.facts()["listeners"].values()}
        clients = [supervisor.connect(int(ports["checked"].rpartition(":")[2])) for _ in range(4)]
        for number, client in enumerate(clients):
            client.sendall(bytes(2))
            wait_for(lambda number=number: sum(supervisor.taken()) == 2 * (number + 1))  # type: ignore[misc]
        at = homes(supervisor)
        hot = [client for client in clients if at[client.getsockname()[1]] == at[clients[0].getsockname()[1]]]
        assert len(hot) == 2

        def send(number: int) -> None:
            while not over.is_set():
                hot[number].sendall(noise)
                sent[number] += len(noise)

        threads = [threading.Thread(target=send, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        try:
            wait_for(lambda: counter(supervisor, "rebalanced") == 1, PARTED_S)
            wait_for(lambda: counter(supervisor, "handed_over") == 1)
            at = homes(supervisor)
            assert len({at[client.getsockname()[1]] for client in hot}) == 2
        finally:
            over.set()
            for thread in threads:
                thread.join()
        wait_for(lambda: sorted(supervisor.taken()) == sorted([2, 2, 2 + sent[0], 2 + sent[1]]))
        for client in clients:
            client.close()
