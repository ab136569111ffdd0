"""Reloads: what each key does to what is open, what is refused whole, and that processes always come back.

Real supervisor and workers, a small storer; sockets of the daemon are looked at through a copy (pidfd_getfd).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import itertools
import os
import re
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mpserverd.arena.health import health
from mpserverd.arena.live import open_state
from mpserverd.arena.report import stats
from mpserverd.arena.state import SUPERVISOR_SLOT, CloseReason, Con, RefuseReason, Slot
from mpserverd.control.client import DaemonRefusedError
from mpserverd.net.listener import ACCEPT_BATCH_MAX
from tests.integration.freezing import Disk
from tests.integration.oracle import stored_streams
from tests.integration.supervisor_driver import RunningSupervisor, Systemd, packets, wait_for
from tests.integration.test_supervisor_death import Unit

SECOND = '[[listener]]\nname = "second"\naddress = "127.0.0.1:{port}"\npacket_size = 32\n'
IPV6 = os.path.exists("/proc/net/if_inet6")
SO_BUF_LOCK = 72
_PIDFD_GETFD = 438
_libc = ctypes.CDLL(None, use_errno=True)


def reload(supervisor: RunningSupervisor, *changes: tuple[str, str], **settings: Any) -> dict[str, Any]:
    """Take the settings over, with those changes of the file's text, once the reload before has ended."""
    if settings:
        supervisor.configure(**settings)
    text = supervisor.config_path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    supervisor.config_path.write_text(text)

    def answer() -> dict[str, Any] | None:
        try:
            answer: dict[str, Any] = supervisor.ask("reload")
        except DaemonRefusedError as error:
            if "under way" in str(error):
                return None
            raise
        return answer

    found: dict[str, Any] = wait_for(answer)
    return found


def refusal(supervisor: RunningSupervisor, **settings: Any) -> str:
    with pytest.raises(DaemonRefusedError) as error:
        reload(supervisor, **settings)
    return str(error.value)


def addresses(supervisor: RunningSupervisor) -> dict[str, str]:
    """Of the listeners that are open, by name."""
    listeners = supervisor.facts()["listeners"].values()
    return {each["name"]: each["address"] for each in listeners if each["address"]}


def listening(port: int) -> dict[str, str]:
    """Inode of each socket that listens on the port, by its address in hexadecimal."""
    found = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            words = line.split()
            host, _, local_port = words[1].rpartition(":")
            if words[3] == "0A" and int(local_port, 16) == port:
                found[host] = words[9]
    return found


def inode_of(client: socket.socket) -> str:
    """Of the daemon's end."""
    port, own_port = client.getpeername()[1], client.getsockname()[1]
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        if [int(word.rpartition(":")[2], 16) for word in words[1:3]] == [port, own_port]:
            return words[9]
    raise AssertionError("the daemon has no such connection")


def leads_to(pid: int, fd: str, target: str) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/fd/{fd}") == target
    except FileNotFoundError:  # closed meanwhile
        return False


@contextlib.contextmanager
def copy_of(supervisor: RunningSupervisor, inode: str) -> Iterator[socket.socket]:
    """A copy of the supervisor's socket with that inode."""
    pid = supervisor.process.pid
    numbers = [int(name) for name in os.listdir(f"/proc/{pid}/fd") if leads_to(pid, name, f"socket:[{inode}]")]
    pidfd = os.pidfd_open(pid)
    try:
        fd = _libc.syscall(_PIDFD_GETFD, pidfd, numbers[0], 0)
    finally:
        os.close(pidfd)
    if fd < 0:
        pytest.skip(f"pidfd_getfd: {os.strerror(ctypes.get_errno())}")
    with socket.socket(fileno=fd) as sock:
        yield sock


def serves(supervisor: RunningSupervisor, port: int, host: str = "127.0.0.1") -> None:
    """A connection to there is read."""
    with socket.create_connection((host, port), timeout=10) as client:
        client.sendall(packets(20))
        wait_for(lambda: 320 in supervisor.taken())
    wait_for(lambda: 320 not in supervisor.taken())


# -- refused whole


def test_a_log_file_that_cannot_be_opened_refuses_the_reload_and_workers_can_still_be_forked(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path) as supervisor:
        text = refusal(supervisor, max_clients=3, more=f'target = ["file"]\nfile = "{tmp_path}/none/x.log"\n')
        assert f"cannot open the log file {tmp_path}/none/x.log" in text
        assert supervisor.facts()["max_clients"] == 10
        first, second = [worker["pid"] for worker in supervisor.workers()]
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: len(supervisor.workers()) == 2 and first not in {each["pid"] for each in supervisor.workers()})
        os.kill(second, signal.SIGKILL)
        serves(supervisor, supervisor.port)
        assert not supervisor.log_contains("child crashed")


def test_children_start_without_a_log_file_that_is_gone(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    more = f'target = ["stderr", "file"]\nfile = "{logs}/x.log"\n'
    with RunningSupervisor(tmp_path, workers=1, more=more) as supervisor:
        logs.rename(tmp_path / "away")
        (worker,) = supervisor.workers()
        os.kill(worker["pid"], signal.SIGKILL)
        serves(supervisor, supervisor.port)
        assert supervisor.log_contains("worker-0 ERROR no log file")
        assert "child died" in (tmp_path / "away" / "x.log").read_text(), "the supervisor goes on with the open file"


def test_what_a_reload_keeps_must_go_together_with_the_rest(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path) as supervisor:
        text = refusal(supervisor, buffers="64 MiB", workers=64)
        assert "buffers.bytes = 8388608: too little" in text
        assert "a restart takes over buffers.bytes too" in text
        assert len(supervisor.workers()) == 2


def test_a_refused_reload_is_told_until_the_next_good_one(tmp_path: Path) -> None:
    with Unit(tmp_path) as unit:
        good = (tmp_path / "mpserverd.toml").read_text()
        (tmp_path / "mpserverd.toml").write_text("[server]\nworkerz = 3\n")
        with pytest.raises(DaemonRefusedError, match="workerz"):
            unit.ask("reload")
        assert unit.system.wait_for(lambda state: state.status.startswith("reload refused: ")), unit.system.state.status
        assert "workerz" in unit.system.state.status
        live = open_state(f"{tmp_path}/control.sock")
        assert "workerz" in stats(live)["reload_error"]
        (check,) = [check for check in health(live)["checks"] if check["check"] == "reload"]
        assert check["ok"], "it serves"
        assert "workerz" in check["detail"]
        (tmp_path / "mpserverd.toml").write_text(good)
        unit.ask("reload")
        assert unit.system.wait_for(lambda state: "clients" in state.status), unit.system.state.status
        live = open_state(f"{tmp_path}/control.sock")
        assert stats(live)["reload_error"] is None
        assert "reload" not in {check["check"] for check in health(live)["checks"]}


def test_a_reload_while_old_workers_leave_is_refused_and_a_signal_is_remembered(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path, workers=1) as supervisor:
        (worker,) = supervisor.workers()
        os.kill(worker["pid"], signal.SIGSTOP)
        supervisor.ask("reload")
        with pytest.raises(DaemonRefusedError, match="under way; try again") as error:
            supervisor.ask("reload")
        assert error.value.exit_code == 1
        supervisor.configure(max_clients=3)
        supervisor.signal(signal.SIGHUP)
        os.kill(worker["pid"], signal.SIGCONT)
        wait_for(lambda: supervisor.facts()["max_clients"] == 3)
        assert not supervisor.log_contains("reload refused")


# -- listeners


def test_a_listener_with_a_new_name_goes_on_with_its_socket(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path) as supervisor:
        port = supervisor.port
        with supervisor.connect(port) as client:
            client.sendall(packets(1))
            wait_for(lambda: supervisor.taken() == [16])
            reload(supervisor, port=port)
            before = listening(port)
            answer = reload(supervisor, ('name = "raw"', 'name = "fresh"'))
            assert answer["changed"][:2] == [
                "listener raw closed; its connections go on",
                f"listener fresh opened on 127.0.0.1:{port}",
            ]
            assert addresses(supervisor) == {"fresh": f"127.0.0.1:{port}"}
            assert listening(port) == before
            serves(supervisor, port)
            client.sendall(packets(1))
            wait_for(lambda: supervisor.taken() == [32])


def test_two_listeners_can_swap_their_ports(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path, more=SECOND.format(port=0)) as supervisor:
        ports = {name: int(address.rpartition(":")[2]) for name, address in addresses(supervisor).items()}
        inodes = {port: listening(port) for port in ports.values()}
        reload(supervisor, port=ports["second"], more=SECOND.format(port=ports["raw"]))
        wanted = {"raw": f"127.0.0.1:{ports['second']}", "second": f"127.0.0.1:{ports['raw']}"}
        assert addresses(supervisor) == wanted
        assert {port: listening(port) for port in ports.values()} == inodes
        for port in ports.values():
            serves(supervisor, port)


def test_one_address_and_all_addresses_can_take_turns_on_a_port(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path) as supervisor, supervisor.connect() as client:
        port = supervisor.port
        client.sendall(packets(1))
        wait_for(lambda: supervisor.taken() == [16])
        reload(supervisor, port=port)
        turns = ["127.0.0.1", "0.0.0.0", *(["[::]"] if IPV6 else []), "0.0.0.0", "127.0.0.1"]
        for old, new in itertools.pairwise(turns):
            reload(supervisor, (f'address = "{old}:', f'address = "{new}:'))
            assert addresses(supervisor) == {"raw": f"{new}:{port}"}
            assert len(listening(port)) == 1
            serves(supervisor, port)
        client.sendall(packets(1))
        wait_for(lambda: supervisor.taken() == [32])


@pytest.mark.skipif(not IPV6, reason="no IPv6 here")
def test_a_listener_on_all_ipv6_addresses_takes_ipv4_exactly_while_no_other_does(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path) as supervisor:
        port = supervisor.port
        six = f'[[listener]]\nname = "six"\naddress = "[::]:{port}"\npacket_size = 16\n'
        reload(supervisor, ("127.0.0.1:0", f"[::]:{port}"))
        serves(supervisor, port)
        reload(supervisor, port=port, more=six)
        assert len(listening(port)) == 2
        serves(supervisor, port)
        serves(supervisor, port, "::1")


def test_a_listener_that_cannot_take_all_addresses_goes_on_with_the_one_that_it_had(tmp_path: Path) -> None:
    """Also one whose port was the kernel's choice, which a shutdown gives back."""
    with RunningSupervisor(tmp_path) as supervisor, socket.socket() as holder:
        port = supervisor.port
        holder.bind(("127.0.0.2", port))
        holder.listen()
        text = supervisor.config_path.read_text()
        for address in (f"127.0.0.1:{port}", "127.0.0.1:0"):
            supervisor.config_path.write_text(text)
            with pytest.raises(DaemonRefusedError, match="Address already in use by pid"):
                reload(supervisor, ("127.0.0.1:0", f"0.0.0.0:{port}"))
            assert addresses(supervisor) == {"raw": f"127.0.0.1:{port}"}
            serves(supervisor, port)
            supervisor.config_path.write_text(text)
            reload(supervisor, ("127.0.0.1:0", address))


def test_a_listener_that_goes_on_after_a_refused_reload_is_kept_for_the_next_supervisor(tmp_path: Path) -> None:
    """The store drops what hangs up, and a listener does when it makes place for another."""
    with Unit(tmp_path) as unit, socket.socket() as holder:
        port = unit.port
        holder.bind(("127.0.0.2", port))
        holder.listen()
        text = (tmp_path / "mpserverd.toml").read_text()
        (tmp_path / "mpserverd.toml").write_text(text.replace("127.0.0.1:0", f"0.0.0.0:{port}"))
        with pytest.raises(DaemonRefusedError, match="Address already in use"):
            unit.ask("reload")
        (tmp_path / "mpserverd.toml").write_text(text)
        unit.kill()
        assert unit.port == port
        socket.create_connection(("127.0.0.1", port), timeout=10).close()


def test_who_waits_to_be_accepted_is_accepted_before_a_listener_closes(tmp_path: Path) -> None:
    """More than are accepted in one turn of the loop."""
    count = ACCEPT_BATCH_MAX + 20
    more = SECOND.format(port=0)
    with RunningSupervisor(tmp_path, more=more, max_clients=2 * count, buffers="32 MiB") as supervisor:
        port = int(addresses(supervisor)["second"].rpartition(":")[2])
        supervisor.configure(more="")
        supervisor.signal(signal.SIGSTOP)
        with contextlib.ExitStack() as clients:
            for _ in range(count):
                clients.enter_context(supervisor.connect(port)).sendall(packets(2))
            supervisor.signal(signal.SIGHUP)
            supervisor.signal(signal.SIGCONT)
            wait_for(lambda: supervisor.taken() == [32] * count)
            assert "second" not in addresses(supervisor)


def test_nobody_who_connects_during_reloads_is_refused_and_no_byte_is_lost(tmp_path: Path) -> None:
    """Every key that does not move the listener to other addresses, and its name.

    The rows of those who have just left are taken for a moment more, so there are more than one client needs.
    """
    over = threading.Event()
    sent: list[bytes] = []

    def connect_again_and_again(port: int) -> None:
        while not over.is_set():
            body = packets(3, len(sent))
            with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
                client.sendall(body)
                client.shutdown(socket.SHUT_WR)
                assert client.recv(1) == b""
            sent.append(body)

    running = RunningSupervisor(tmp_path, max_clients=100, buffers="16 MiB")
    with running as supervisor, concurrent.futures.ThreadPoolExecutor(1) as pool:
        port = supervisor.port
        reload(supervisor, port=port)
        sending = pool.submit(connect_again_and_again, port)
        try:
            for name, key in (
                ("raw", "nodelay = false\nkeepalive = false"),
                ("other", "receive_buffer_bytes = 0\nsend_buffer_bytes = 0"),
                ("raw", "idle_timeout_s = 50\nhandshake_timeout_s = 50"),
                ("third", 'allow = ["127.0.0.0/8"]\ndeny = ["192.0.2.1"]'),
                ("raw", "store = true\nmax_connections = 90\nmax_connections_per_address = 90"),
            ):
                count = len(sent)
                reload(supervisor, ('name = "raw"', f'name = "{name}"'), listener=key)
                wait_for(lambda count=count: len(sent) > count + 5 or sending.done())
        finally:
            over.set()
        sending.result()
        wait_for(lambda: sorted(supervisor.stored().values()) == sorted(sent))
        assert not supervisor.log_contains("child died")


def test_the_backlog_and_the_receive_buffer_of_an_open_listener_change(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path) as supervisor:
        port = supervisor.port
        (inode,) = listening(port).values()
        backlog = "max_clients = 10\nbacklog = 77"
        reload(supervisor, ("max_clients = 10", backlog), listener="receive_buffer_bytes = 300000")
        assert list(listening(port).values()) == [inode]
        with copy_of(supervisor, inode) as sock:
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
            assert struct.unpack_from("I", info, 28)[0] == 77  # tcpi_sacked of a listener is its backlog
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 600_000


def test_socket_options_of_live_connections_change(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path) as supervisor, supervisor.connect() as client:
        client.sendall(packets(1))
        wait_for(lambda: supervisor.taken() == [16])
        inode = inode_of(client)
        assert options(supervisor, inode) == {"keepalive": 1, "nodelay": 1, "receive": 262_144, "send": 262_144}
        more = "keepalive = false\nnodelay = false\nreceive_buffer_bytes = 50000\nsend_buffer_bytes = 40000"
        reload(supervisor, listener=more)
        changed = {"keepalive": 0, "nodelay": 0, "receive": 100_000, "send": 80_000}
        wait_for(lambda: options(supervisor, inode) == changed)
        client.sendall(packets(1))
        wait_for(lambda: supervisor.taken() == [32])
        reload(supervisor, listener="receive_buffer_bytes = 0\nsend_buffer_bytes = 0")
        wait_for(lambda: options(supervisor, inode)["keepalive"] == 1)
        with copy_of(supervisor, inode) as sock:
            assert sock.getsockopt(socket.SOL_SOCKET, SO_BUF_LOCK) == 0, "the kernel tunes them again"


def test_deadlines_reach_connections_whose_listener_changed_its_streams_too(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path) as supervisor, supervisor.connect() as talker, supervisor.connect() as silent:
        talker.sendall(packets(1))
        wait_for(lambda: sorted(supervisor.taken()) == [0, 16])
        reload(supervisor, ("packet_size = 16", "packet_size = 32"), listener="idle_timeout_s = 0.2")
        wait_for(lambda: closed(supervisor, CloseReason.IDLE) == 1)
        reload(supervisor, ("packet_size = 16", "packet_size = 32"), listener="handshake_timeout_s = 0.2")
        wait_for(lambda: closed(supervisor, CloseReason.SILENT) == 1)
        assert talker.recv(1) == silent.recv(1) == b""


def test_limits_and_networks_change(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path) as supervisor:
        for listener, reason in (
            ('deny = ["127.0.0.0/8"]', RefuseReason.DENIED),
            ('allow = ["192.0.2.0/24"]', RefuseReason.DENIED),
            ("max_connections = 1", RefuseReason.LISTENER_LIMIT),
            ("max_connections_per_address = 1", RefuseReason.ADDRESS_LIMIT),
        ):
            before = refused(supervisor, reason)
            reload(supervisor, listener=listener)
            with supervisor.connect(), supervisor.connect():
                wait_for(lambda reason=reason, before=before: refused(supervisor, reason) > before)
            wait_for(lambda: not supervisor.word(Con.STATE))
        reload(supervisor, listener="")
        serves(supervisor, supervisor.port)


def closed(supervisor: RunningSupervisor, reason: CloseReason) -> int:
    with supervisor.tables() as (_, state, _):
        return int(state.slots[:, Slot.REASONS + reason].sum())


def refused(supervisor: RunningSupervisor, reason: RefuseReason) -> int:
    with supervisor.tables() as (_, state, _):
        return int(state.slots[SUPERVISOR_SLOT, Slot.REASONS + reason])


def options(supervisor: RunningSupervisor, inode: str) -> dict[str, int]:
    with copy_of(supervisor, inode) as sock:
        return {
            "keepalive": sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
            "nodelay": sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY),
            "receive": sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF),
            "send": sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF),
        }


def test_a_renamed_listener_can_be_closed_after_a_restart(tmp_path: Path) -> None:
    """systemd's store keeps the first name of a socket, and takes it no second time."""
    with Unit(tmp_path) as unit:
        port = unit.port
        unit.configure(port=port)
        text = (tmp_path / "mpserverd.toml").read_text()
        (tmp_path / "mpserverd.toml").write_text(text.replace('name = "raw"', 'name = "other"'))
        unit.leave()
        assert f"other=127.0.0.1:{port}" in unit.log()
        assert "listener-raw" in unit.system.stored_names()
        (tmp_path / "mpserverd.toml").write_text(text.replace(f"127.0.0.1:{port}", "127.0.0.1:0"))
        assert "listener other closed; its connections go on" in unit.ask("reload")["changed"]
        wait_for(lambda: [name for name in unit.system.stored_names() if "listener" in name] == ["listener-raw"])
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=10)
        unit.kill()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=10)


def test_an_address_can_change_over_a_restart(tmp_path: Path) -> None:
    """The old socket waits in systemd's store, and has the port."""
    with Unit(tmp_path) as unit:
        port = unit.port
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(packets(1))
            wait_for(lambda: unit.active() == 1)
            text = (tmp_path / "mpserverd.toml").read_text()
            (tmp_path / "mpserverd.toml").write_text(text.replace("127.0.0.1:0", f"0.0.0.0:{port}"))
            unit.leave()
            assert f"raw=0.0.0.0:{port}" in unit.log()
            client.sendall(packets(1))
        wait_for(lambda: unit.durable() == 32)


def hello(port: int, client: str) -> tuple[socket.socket, bytes]:
    """A connection that speaks mps, and the level that OK has promised it."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=10)
    sock.sendall(f"MPS/1 {client} 16\n".encode())
    return sock, sock.makefile("rb", 0).readline().split()[2]


def test_a_level_that_was_promised_holds_as_long_as_the_client_is_connected(tmp_path: Path) -> None:
    mps = '[[listener]]\nname = "mps"\naddress = "127.0.0.1:0"\nprotocol = "mps"\npacket_size = 16\n'
    with Unit(tmp_path, more=mps) as unit:
        port = int(re.findall(r"mps=127\.0\.0\.1:(\d+)", unit.log())[-1])
        sock, level = hello(port, "a")
        with sock:
            assert level == b"durable"
            unit.configure(more=f'sync = "none"\n{mps}')
            assert unit.ask("reload")["needs_restart"] == ["spool.sync"]
            unit.leave()
            assert "needs a stop key=spool.sync" in unit.log()
            sock.sendall(packets(3))
            assert sock.makefile("rb", 0).readline() in (b"ACK 3\n", b"\n")
            other, level = hello(port, "b")
            other.close()
            assert level == b"durable"
        wait_for(lambda: unit.active() == 0)
        unit.leave()
        sock, level = hello(port, "a")
        sock.close()
        assert level == b"stored"


# -- the log


def test_a_level_that_was_set_holds_for_later_children_and_until_a_reload(tmp_path: Path) -> None:
    """A worker that may not run where cpu_affinity says warns."""
    text = "cpu affinity not applied"
    with RunningSupervisor(tmp_path, workers=1, stop_timeout_s="10.0\ncpu_affinity = [4000]") as supervisor:
        wait_for(lambda: supervisor.log().count(text) == 1)
        assert supervisor.ask("loglevel", level="error") == {"level": "error"}
        (worker,) = supervisor.workers()
        os.kill(worker["pid"], signal.SIGKILL)
        serves(supervisor, supervisor.port)
        assert supervisor.log().count(text) == 1
        assert not supervisor.log_contains("child started child=worker-0 pid=" + str(supervisor.workers()[0]["pid"]))
        supervisor.ask("reload")
        wait_for(lambda: supervisor.log().count(text) == 2)
        wait_for(lambda: supervisor.log_contains("DEBUG child state child=worker-0 was=stopping now=dead"))


def test_level_target_and_file_of_the_log_change(tmp_path: Path) -> None:
    file = tmp_path / "fresh.log"
    with RunningSupervisor(tmp_path) as supervisor:
        change = ('level = "debug"', f'level = "info"\ntarget = ["file"]\nfile = "{file}"')
        answer = reload(supervisor, change)
        assert {"log.level", "log.target", "log.file"} <= set(answer["changed"])
        wait_for(lambda: "processes replaced" in file.read_text())
        assert " DEBUG " not in file.read_text()


def test_a_log_disk_that_hangs_keeps_newcomers_waiting_and_nobody_else(tmp_path: Path) -> None:
    """A file is the one target that can wait; see [log] in docs/configuration.md."""
    with Disk(tmp_path, tmp_path / "logs", 16) as disk:
        more = f'target = ["stderr", "file"]\nfile = "{disk.mount_point}/x.log"\n'
        with RunningSupervisor(tmp_path, more=more) as supervisor, supervisor.connect() as client:
            client.sendall(packets(1))
            wait_for(lambda: supervisor.stored() and list(supervisor.stored().values()) == [packets(1)])
            disk.freeze()
            supervisor.signal(signal.SIGUSR1)  # a line
            wait_for(lambda: not supervisor.answers())
            client.sendall(packets(1))
            wait_for(lambda: list(supervisor.stored().values()) == [packets(1) * 2])
            disk.thaw()
            serves(supervisor, supervisor.port)
            assert not supervisor.log_contains("child killed")
            assert supervisor.stop() == 0


# -- processes


def test_a_storer_that_does_not_leave_is_called_stuck_and_never_killed(tmp_path: Path) -> None:
    with RunningSupervisor(tmp_path, heartbeat_timeout_s=2.5) as supervisor:
        storer = supervisor.facts()["storer"]["pid"]
        os.kill(storer, signal.SIGSTOP)
        supervisor.ask("reload")
        wait_for(lambda: supervisor.log_contains("processes replaced"), 40)
        assert supervisor.facts()["storer"]["pid"] == storer
        assert supervisor.facts()["storer"]["state"] == "stuck"
        serves(supervisor, supervisor.port)
        os.kill(storer, signal.SIGCONT)
        wait_for(lambda: (supervisor.facts()["storer"] or {}).get("pid") not in (None, 0, storer))
        assert not supervisor.log_contains("child killed")


def test_an_old_worker_that_does_not_hand_over_is_killed_and_its_clients_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before its heartbeat would be missed; systemd is told what the reload waits for, and when it is over."""
    content = packets(20_000)
    workers = "1\nreload_timeout_s = 1.0"
    with (
        Systemd(tmp_path, monkeypatch) as systemd,
        RunningSupervisor(tmp_path, workers=workers, heartbeat_timeout_s=600.0, real_storer=True) as supervisor,
        supervisor.connect() as client,
    ):
        client.sendall(content[:160_000])
        wait_for(lambda: supervisor.taken() == [160_000])
        (old,) = supervisor.workers()
        os.kill(old["pid"], signal.SIGSTOP)
        client.sendall(content[160_000:])  # less than the kernel holds
        systemd.said()  # so that there is room for more
        supervisor.ask("reload")
        assert systemd.heard("STATUS=reloading: 1 fresh workers start")
        wait_for(lambda: systemd.said() and supervisor.log_contains("processes replaced"))
        assert supervisor.ask("ping")
        assert systemd.heard("old processes hand over")
        statuses = [message for message in systemd.said() if message.startswith("STATUS=")]
        assert statuses[-1].startswith("STATUS=1 clients, "), statuses
        (line,) = [line for line in supervisor.log().splitlines() if "child killed" in line]
        assert f'pid={old["pid"]} why="did not hand over within 1 s"' in line
        wait_for(lambda: supervisor.taken() == [320_000])
        assert supervisor.word(Con.ADOPTIONS) == [1]
        client.close()
        wait_for(lambda: supervisor.word(Con.STATE) == [])
        assert supervisor.stop() == 0
    assert [stream.content for stream in stored_streams(supervisor.spool)] == [content]
