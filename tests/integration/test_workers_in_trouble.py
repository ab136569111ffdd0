"""Workers that hang in the kernel, crash at every start, or run where they should not: what clients and people see."""

from __future__ import annotations

import os
import pathlib
import socket
from typing import Any

import pytest

from tests.integration import senders
from tests.integration.driver import Daemon, connect
from tests.integration.freezing import Disk, thread_states
from tests.integration.oracle import sent_digests, stored_digests
from tests.integration.trouble import Trouble

EXACT = {"listener": {"on_full": "block"}}
HEARTBEAT_S = 2.5


def rows(daemon: Daemon) -> dict[str, dict[str, Any]]:
    """What ``mpserverctl workers`` shows, by name."""
    return {f"worker-{worker['index']}": worker for worker in daemon.ctl_json("workers")}


def owner_of(daemon: Daemon, client: socket.socket) -> str:
    """Name of the worker that has this connection."""
    peer = "{}:{}".format(*client.getsockname())
    (row,) = [row for row in daemon.clients() if row["peer"] == peer]
    return f"worker-{row['worker']}"


def received(daemon: Daemon, client: socket.socket) -> int:
    peer = "{}:{}".format(*client.getsockname())
    (row,) = [row for row in daemon.clients() if row["peer"] == peer]
    return int(row["bytes"])


def holds(pid: int, client: socket.socket, port: int) -> bool:
    """Whether the process has the daemon's end of this connection open, by its inode in /proc/net/tcp."""
    ends = [f"{port:04X}", f"{client.getsockname()[1]:04X}"]
    lines = [line.split() for line in pathlib.Path("/proc/net/tcp").read_text().splitlines()[1:]]
    (inode,) = [line[9] for line in lines if [line[1][-4:], line[2][-4:]] == ends]
    links = [os.readlink(path) for path in pathlib.Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()]
    return f"socket:[{inode}]" in links


@pytest.mark.root
def test_a_worker_that_hangs_in_the_kernel_is_called_stuck_and_nobody_else_reads_its_sockets(
    tmp_path: pathlib.Path,
) -> None:
    trouble = Trouble(tmp_path)
    contents = [senders.payload(seed, 320_000) for seed in (1, 2, 3)]
    settings = EXACT | {"server": {"workers": 2, "heartbeat_timeout_s": HEARTBEAT_S}}
    with (
        Disk(tmp_path, trouble.disk, 16) as disk,
        Daemon(tmp_path, settings, prefix=trouble.prefix) as daemon,
        connect(daemon.port()) as caught,
        connect(daemon.port()) as free,
    ):
        port = daemon.port()
        for client, content in zip((caught, free), contents, strict=False):
            client.sendall(content[:160_000])
        daemon.wait_for_total("durable_bytes", 320_000)
        name, other = owner_of(daemon, caught), owner_of(daemon, free)
        assert name != other
        pid = int(rows(daemon)[name]["pid"])
        with disk.frozen_here():
            trouble.hang(pid)
            daemon.wait_for(lambda: thread_states(pid) == "D", what="state D")
            caught.sendall(contents[0][160_000:])
            daemon.wait_for(lambda: rows(daemon)[name]["state"] == "stuck", what="a worker that is called stuck")
            assert rows(daemon)[name]["pid"] == pid and thread_states(pid) == "D"
            assert daemon.ctl("check", check=False).returncode != 0
            assert daemon.log_contains("SIGKILL does not end it")

            free.sendall(contents[1][160_000:])
            with connect(port) as newcomer:
                newcomer.sendall(contents[2])
                daemon.wait_for(lambda: daemon.account("received_bytes") == 160_000 + 640_000, what="all others")
                assert owner_of(daemon, newcomer) == other
            assert owner_of(daemon, caught) == name and received(daemon, caught) == 160_000
            assert holds(pid, caught, port) and not holds(int(rows(daemon)[other]["pid"]), caught, port)
        daemon.wait_for(lambda: rows(daemon)[name]["state"] == "running", what="a successor")
        caught.close()
        free.close()
        daemon.wait_until_quiet()
        daemon.wait_for_total("durable_bytes", 960_000)
        assert stored_digests(daemon.spool) == sent_digests(contents, 16)


def test_a_worker_that_cannot_start_is_given_up_the_others_go_on_and_a_reload_tries_again(
    tmp_path: pathlib.Path,
) -> None:
    trouble = Trouble(tmp_path)
    contents = [senders.payload(seed, 320_000) for seed in range(4)]
    settings = EXACT | {"server": {"workers": 2, "restart_backoff_s_max": 0.1}}
    with Daemon(tmp_path, settings, prefix=trouble.prefix) as daemon:
        clients = [connect(daemon.port()) for _ in contents]
        for client, content in zip(clients, contents, strict=True):
            client.sendall(content[:100_000])
        daemon.wait_for_total("received_bytes", 400_000)
        trouble.crash("worker-1")
        daemon.kill("worker-1")
        daemon.wait_for(lambda: rows(daemon)["worker-1"]["state"] == "given-up", what="a worker that is given up")
        assert rows(daemon)["worker-1"]["pid"] == 0 and rows(daemon)["worker-0"]["connections"] == 4
        assert "given-up" in daemon.ctl("workers").stdout
        checked = daemon.ctl("check", check=False)
        assert checked.returncode != 0 and "given-up" in checked.stdout
        assert daemon.log_contains("child given up") and daemon.log_contains("signal=SIGSEGV")
        for client, content in zip(clients, contents, strict=True):
            client.sendall(content[100_000:200_000])
        daemon.wait_for_total("received_bytes", 800_000)

        trouble.heal("worker-1")
        daemon.reload()
        daemon.wait_for(
            lambda: [row["state"] for row in rows(daemon).values()] == ["running"] * 2, what="two workers again"
        )
        assert daemon.ctl("check").returncode == 0
        for client, content in zip(clients, contents, strict=True):
            client.sendall(content[200_000:])
            client.close()
        daemon.wait_until_quiet()
        daemon.wait_for_total("durable_bytes", 4 * 320_000)
        assert stored_digests(daemon.spool) == sent_digests(contents, 16)


def test_when_no_worker_can_start_the_daemon_ends_with_exit_code_1_and_says_what_was_at_risk(
    tmp_path: pathlib.Path,
) -> None:
    trouble = Trouble(tmp_path)
    content = senders.payload(5, 160_000)
    settings = EXACT | {"server": {"workers": 2, "restart_backoff_s_max": 0.1, "stop_timeout_s": 2.0}}
    with Daemon(tmp_path, settings, prefix=trouble.prefix) as daemon, connect(daemon.port()) as client:
        assert daemon.process is not None
        client.sendall(content)
        daemon.wait_for_total("durable_bytes", 160_000)
        trouble.crash("worker-0")
        trouble.crash("worker-1")
        daemon.kill("worker-0")
        daemon.kill("worker-1")
        client.sendall(bytes(1_600))
        assert daemon.process.wait(60) == 1
        assert daemon.log_contains("no worker can be started")
        (line,) = daemon.log_lines(" stopped ")
        assert "at_risk_bytes=1600" in line and "not everything became durable" in line
        assert ended(client)
        assert stored_digests(daemon.spool) == sent_digests([content], 16)


def ended(client: socket.socket) -> bool:
    """Whether the connection has ended, in whatever way."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def cpus_of(pid: int) -> str:
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("Cpus_allowed_list:")]
    return line.split()[1]


def test_workers_run_where_cpu_affinity_says_also_after_a_death_and_a_reload(tmp_path: pathlib.Path) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("needs two CPUs")
    first, second = cpus[:2]
    whole = cpus_of(os.getpid())

    def where(daemon: Daemon) -> list[str]:
        return [cpus_of(row["pid"]) for row in rows(daemon).values() if row["pid"]]

    with Daemon(tmp_path, {"server": {"workers": 3, "cpu_affinity": [second, first]}}) as daemon:
        assert where(daemon) == [str(second), str(first), str(second)]
        assert {cpus_of(daemon.pid_of(name)) for name in ("supervisor", "storer")} == {whole}
        killed = daemon.kill("worker-1")
        daemon.wait_for(lambda: rows(daemon)["worker-1"]["pid"] not in (0, killed), what="a successor")
        assert where(daemon) == [str(second), str(first), str(second)]

        daemon.settings["server"]["cpu_affinity"] = [first]
        before = daemon.worker_pids()
        daemon.reload()
        daemon.wait_for(lambda: not set(before) & set(daemon.worker_pids()), what="fresh workers")
        assert where(daemon) == [str(first)] * 3

        daemon.settings["server"]["cpu_affinity"] = []
        before = daemon.worker_pids()
        daemon.reload()
        daemon.wait_for(lambda: not set(before) & set(daemon.worker_pids()), what="fresh workers")
        assert where(daemon) == [whole] * 3
