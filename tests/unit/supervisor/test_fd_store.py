"""What is on its way to systemd's store waits when there is no room for it."""

from __future__ import annotations

import os
import resource
import socket

import pytest

from mpserverd.supervisor.fd_store import FdStore

NOBODY = 65_534
IN_FLIGHT_MAX, FDS, MESSAGES = 40, 20, 5


def push_more_than_may_be_in_flight(name: str) -> bool:
    """In a process of its own: it becomes somebody whom the limit holds for. Whether all came, in order."""
    os.closerange(3, 1024)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind("\0" + name)
        server.settimeout(20)
        resource.setrlimit(resource.RLIMIT_NOFILE, (IN_FLIGHT_MAX, IN_FLIGHT_MAX))
        os.setuid(NOBODY)
        store = FdStore({"NOTIFY_SOCKET": f"@{name}"})
        for number in range(MESSAGES):
            if store.waiting_count < 1:  # each of those keeps descriptors
                store.push(str(number), [0] * FDS)
                pushed = number + 1
        waited, came = store.waiting_count, []
        for _ in range(pushed):
            text, fds, _, _ = socket.recv_fds(server, 4096, FDS)
            came.append(text.decode().rpartition("=")[2])
            for fd in fds:
                os.close(fd)
            store.flush()
        return waited == 1 and store.waiting_count == 0 and came == [str(number) for number in range(pushed)]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody who has nothing in flight")
def test_descriptors_that_may_not_be_in_flight_yet_are_not_thrown_away() -> None:
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if push_more_than_may_be_in_flight(f"mpserverd-test-{os.getpid()}") else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
