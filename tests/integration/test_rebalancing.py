"""Hot connections that share a worker are parted, and not a byte of them is lost or moved."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from mpserverd.arena.counters import Role, column
from mpserverd.arena.state import SUPERVISOR_SLOT, Con
from tests.integration.supervisor_driver import RunningSupervisor, packets, wait_for


def handed_over(supervisor: RunningSupervisor) -> int:
    with supervisor.tables() as (_, state, _):
        return int(state.slots[SUPERVISOR_SLOT, column(Role.SUPERVISOR, "handed_over")])


def test_two_hot_connections_on_one_worker_are_parted_once(tmp_path: Path) -> None:
    body = packets(2_000)
    over = threading.Event()
    sent = [0, 0]

    with RunningSupervisor(tmp_path, workers=2) as supervisor:
        clients = [supervisor.connect() for _ in range(4)]
        for number, client in enumerate(clients):
            client.sendall(packets(1))
            wait_for(lambda number=number: sum(supervisor.taken()) == 16 * (number + 1))  # type: ignore[misc]
        homes = supervisor.word(Con.WORKER)
        hot = [client for client, home in zip(clients, homes, strict=True) if home == homes[0]]
        assert len(hot) == 2

        def send(number: int) -> None:
            while not over.is_set():
                hot[number].sendall(body)
                sent[number] += len(body)
                over.wait(0.05)

        threads = [threading.Thread(target=send, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        try:
            wait_for(lambda: handed_over(supervisor) == 1)
            until_s = time.monotonic() + 3.0  # long enough for three more moves, if there were a reason
            wait_for(lambda: time.monotonic() > until_s)
            assert handed_over(supervisor) == 1
        finally:
            over.set()
            for thread in threads:
                thread.join()
        wait_for(lambda: sorted(supervisor.taken()) == sorted([16, 16, 16 + sent[0], 16 + sent[1]]))
        for client in clients:
            client.close()
        wait_for(lambda: len(supervisor.stored()) == 4)
        wait_for(lambda: sum(map(len, supervisor.stored().values())) == 64 + sum(sent))
        wanted = sorted([packets(1)] * 2 + [packets(1) + body * (count // len(body)) for count in sent])
        assert sorted(supervisor.stored().values()) == wanted
