"""The stand-in for systemd: what it hears, keeps, hands back and starts again. The service is a few lines of Python."""

from __future__ import annotations

import os
import pathlib
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from mpserverd.errors import StartError
from mpserverd.load.stand_in import StandIn, UnitSettings
from mpserverd.load.stand_in_socket import NotifySocket
from mpserverd.load.stand_in_spawn import session_pids
from mpserverd.load.stand_in_store import DEFAULT_NAME, FdStore, is_same_file

DEADLINE_S = 20.0

SERVICE = """
import os, socket, signal, sys, time
def tell(text, *fds):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        out.connect(os.environ["NOTIFY_SOCKET"])
        socket.send_fds(out, [text.encode()], fds)
def given():
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return {}
    names = os.environ["LISTEN_FDNAMES"].split(":")
    assert len(names) == int(os.environ["LISTEN_FDS"])
    return {name: 3 + place for place, name in enumerate(names)}
def barrier():
    theirs, ours = os.pipe()
    tell("BARRIER=1", ours)
    os.close(ours)
    assert os.read(theirs, 1) == b""
    os.close(theirs)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
"""
WAIT = "\nwhile True: signal.pause()\n"


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def service(directory: pathlib.Path, body: str, settings: UnitSettings | None = None) -> StandIn:
    """A stand-in for a service that does ``body`` and then waits; its output is in ``directory/output``."""
    with open(directory / "output", "ab") as output:
        return StandIn(
            [sys.executable, "-c", SERVICE + body + WAIT],
            directory=directory,
            settings=settings or UnitSettings(restart_delay_s=0.01),
            output=os.dup(output.fileno()),
        )


@pytest.fixture(autouse=True)
def outputs_are_closed() -> Iterator[None]:
    """Descriptors of this process are the same afterwards, but for the services' outputs."""
    before = len(os.listdir("/proc/self/fd"))
    yield
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").endswith("/output"):
                os.close(int(name))
        except FileNotFoundError:
            continue
    assert len(os.listdir("/proc/self/fd")) == before


# -- the store alone


@pytest.fixture
def store() -> Iterator[FdStore]:
    store = FdStore(4)
    yield store
    store.close()


def memfd() -> int:
    return os.memfd_create("x", os.MFD_CLOEXEC)


def test_a_copy_of_a_stored_file_is_not_stored_again_and_keeps_its_first_name(store: FdStore) -> None:
    one = memfd()
    store.push([os.dup(one)], "first")
    store.push([one], "second")
    assert store.names() == ["first"]


def test_the_same_file_opened_twice_is_two_files() -> None:
    one = memfd()
    other, copy = os.open(f"/proc/self/fd/{one}", os.O_RDONLY), os.dup(one)
    try:
        assert is_same_file(one, copy) and not is_same_file(one, other)
    finally:
        for fd in (one, other, copy):
            os.close(fd)


def test_past_its_maximum_descriptors_are_dropped_silently(store: FdStore) -> None:
    assert store.push([memfd() for _ in range(6)], "many") == 4
    assert (store.names(), store.dropped_full) == (["many"] * 4, 2)


def test_removing_a_name_removes_all_of_its_entries_and_no_other(store: FdStore) -> None:
    store.push([memfd(), memfd()], "a")
    store.push([memfd()], "b")
    assert (store.remove("a"), store.remove("unknown"), store.names()) == (2, 0, ["b"])


@pytest.mark.parametrize("name", [None, "a:b", "a\tb", "é", "x" * 256])
def test_a_name_that_is_none_is_stored_under_the_default_one(store: FdStore, name: str | None) -> None:
    store.push([memfd()], name)
    assert store.names() == [DEFAULT_NAME]


def test_a_hung_up_socket_leaves_the_store_and_a_half_closed_one_stays() -> None:
    store = FdStore(8)
    hung, half = socket.socketpair(), socket.socketpair()
    store.push([os.dup(hung[0].fileno())], "hung")
    store.push([os.dup(half[0].fileno())], "half")
    hung[1].close()
    half[1].shutdown(socket.SHUT_WR)
    assert (store.drop_dead(), store.names()) == (1, ["half"])
    store.close()
    for sock in (*hung, *half):
        sock.close()


def test_a_reset_of_the_client_removes_its_connection_and_a_fin_does_not(store: FdStore) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        clients = [socket.create_connection(server.getsockname()) for _ in range(2)]
        accepted = [server.accept()[0] for _ in clients]
    for name, sock in zip(("reset", "fin"), accepted, strict=True):
        store.push([os.dup(sock.fileno())], name)
    clients[0].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    for client in clients:
        client.close()
    wait_until(store.drop_dead)
    assert store.names() == ["fin"]
    for sock in accepted:
        sock.close()


def test_an_entry_that_is_not_polled_stays_when_it_hangs_up(store: FdStore) -> None:
    ours, theirs = socket.socketpair()
    store.push([os.dup(ours.fileno())], "kept", polled=False)
    theirs.close()
    assert (store.drop_dead(), store.names()) == (0, ["kept"])
    ours.close()


def test_what_is_handed_back_has_another_order_than_what_was_pushed() -> None:
    store = FdStore(20)
    for number in range(20):
        store.push([memfd()], str(number))
    order = [entry.name for entry in store.hand_back()]
    assert sorted(order, key=int) == [str(number) for number in range(20)] != order
    store.close()


# -- the notify socket alone


def test_messages_that_systemd_ignores_are_ignored_and_their_descriptors_closed(tmp_path: pathlib.Path) -> None:
    notify = NotifySocket(tmp_path / "notify.sock")
    before = len(os.listdir("/proc/self/fd"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        out.connect(notify.name)
        socket.send_fds(out, [b"READY=1\0STATUS=x"], [0])
        socket.send_fds(out, [b"X=" + b"x" * 5000], [0])
        out.send(b"READY=1\nSTATUS=a=b\n\0")
        message = notify.receive()
    assert message is not None and message.pid == os.getpid()
    assert message.lines == ("READY=1", "STATUS=a=b") and message.value("STATUS") == "a=b"
    assert notify.receive() is None and len(os.listdir("/proc/self/fd")) == before
    notify.close()


# -- a whole unit


def test_entering_waits_for_ready_and_leaving_stops_it(tmp_path: pathlib.Path) -> None:
    with service(tmp_path, 'tell("STATUS=hello\\nREADY=1")') as unit:
        pid = unit.state.pid
        assert unit.state.status == "hello" and os.getsid(pid) == pid
    assert unit.state.last_exit == 0 and not session_pids(pid)
    assert not (tmp_path / "notify.sock").exists()


def test_a_killed_service_comes_back_with_what_it_had_stored(tmp_path: pathlib.Path) -> None:
    body = """
found = given()
for name in sorted(found):
    print(name, os.pread(found[name], 100, 0).decode(), flush=True)
if not found:
    for name in "abcdefgh":
        fd = os.memfd_create(name)
        os.write(fd, b"content of " + name.encode())
        tell("FDSTORE=1\\nFDNAME=" + name, fd)
    barrier()
tell("READY=1")
"""
    with service(tmp_path, body) as unit:
        assert unit.stored_names() == list("abcdefgh") and unit.state.barriers == 1
        for _ in range(3):
            unit.wait_ready(start=unit.kill())
        assert unit.state.starts == 4 and unit.stored_names() == list("abcdefgh")
    lines = (tmp_path / "output").read_text().splitlines()
    assert lines == [f"{name} content of {name}" for name in "abcdefgh"] * 3
    assert unit.state.last_exit == 0


def test_a_restart_keeps_the_store_and_a_stop_drops_it(tmp_path: pathlib.Path) -> None:
    body = 'tell("FDSTORE=1\\nFDNAME=x", os.memfd_create("x")) if not given() else None\ntell("READY=1")'
    settings = UnitSettings(restart_delay_s=30.0, restart_signal=signal.SIGUSR1)
    with service(tmp_path, body, settings) as unit:
        unit.wait_ready(start=unit.restart())  # without the delay
        assert unit.state.last_exit == -signal.SIGUSR1
        assert (unit.state.starts, unit.state.store_messages, unit.stored_names()) == (2, 1, ["x"])
        assert unit.stop() == 0
        assert unit.stored_names() == [] and unit.state.starts == 2


def test_a_connection_goes_on_while_its_service_is_killed(tmp_path: pathlib.Path) -> None:
    """The listener and the connection lie in the store; connects meanwhile wait in the listener's queue."""
    body = """
found = given()
listener = socket.socket(fileno=found["listener"]) if found else socket.create_server(("127.0.0.1", 0))
if not found:
    tell("FDSTORE=1\\nFDNAME=listener", listener.fileno())
    print(listener.getsockname()[1], flush=True)
tell("READY=1")
if "client" in found:
    client = socket.socket(fileno=found["client"])
else:
    client, _ = listener.accept()
    tell("FDSTORE=1\\nFDNAME=client", client.fileno())
while True:
    client.sendall(client.recv(100) + b" from %d" % os.getpid())
"""
    with service(tmp_path, body) as unit:
        first = unit.state.pid
        port = int((tmp_path / "output").read_text())
        with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S) as client:
            client.sendall(b"one")
            assert client.recv(100) == b"one from %d" % first
            start = unit.kill()
            # a recv that was under way could take it to the grave
            assert unit.wait_for(lambda state: state.deaths == 1, DEADLINE_S)
            client.sendall(b"two")
            assert client.recv(100) == b"two from %d" % unit.wait_ready(start=start)


def test_only_the_main_process_is_heard(tmp_path: pathlib.Path) -> None:
    body = """
if os.fork() == 0:
    tell("FDSTORE=1\\nFDNAME=child\\nREADY=1\\nSTATUS=child", 0)
    os._exit(0)
os.wait()
barrier()
tell("FDSTORE=1\\nFDNAME=main", os.memfd_create("x"))
tell("READY=1\\nSTATUS=main")
"""
    with service(tmp_path, body) as unit:
        assert (unit.stored_names(), unit.state.status) == (["main"], "main")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.connect(str(tmp_path / "notify.sock"))
            out.send(b"STATUS=stranger")
        wait_until(lambda: unit.state.status == "main")


def test_what_a_process_said_before_it_died_counts(tmp_path: pathlib.Path) -> None:
    """A message and the death that follows it are often seen together; twenty times."""
    body = """
print(len(given()), flush=True)
tell("READY=1")
time.sleep(0.002)
tell("FDSTORE=1\\nFDNAME=x%d" % len(given()), os.memfd_create("x"))
os.kill(os.getpid(), signal.SIGKILL)
"""
    with service(tmp_path, body, UnitSettings(restart_delay_s=0.0)) as unit:
        assert unit.wait_for(lambda state: state.starts > 20)
    found = [int(line) for line in (tmp_path / "output").read_text().split()]
    assert found == list(range(len(found)))


def test_a_reload_is_over_when_the_service_is_ready_again(tmp_path: pathlib.Path) -> None:
    body = """
def reload(*_):
    tell("RELOADING=1")
    barrier()
    signal.sigwait([signal.SIGUSR1])
    tell("READY=1")
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
signal.signal(signal.SIGHUP, reload)
tell("READY=1")
"""
    with service(tmp_path, body) as unit:
        unit.kill(signal.SIGHUP)
        assert unit.wait_for(lambda state: not state.ready, DEADLINE_S) and unit.state.starts == 1
        unit.kill(signal.SIGUSR1)
        unit.wait_ready(DEADLINE_S)


def test_a_service_that_hangs_is_killed_by_the_watchdog(tmp_path: pathlib.Path) -> None:
    body = """
assert os.environ["WATCHDOG_PID"] == str(os.getpid())
every = int(os.environ["WATCHDOG_USEC"]) / 1e6 / 2
tell("READY=1")
while True:
    tell("WATCHDOG=1")
    time.sleep(every)
"""
    with service(tmp_path, body, UnitSettings(restart_delay_s=0.0, watchdog_s=0.2)) as unit:
        unit.kill(signal.SIGSTOP)
        unit.wait_ready(DEADLINE_S, start=2)
        assert unit.state.watchdog_kills == 1


def test_a_service_that_cannot_start_is_reported_after_three_tries(tmp_path: pathlib.Path) -> None:
    with pytest.raises(StartError, match="exit status 7"), service(tmp_path, "sys.exit(7)"):
        pass


def test_a_service_that_never_says_ready_is_not_waited_for_for_ever(tmp_path: pathlib.Path) -> None:
    unit = service(tmp_path, 'tell("STATUS=thinking")')
    unit.start()
    assert unit.wait_for(lambda state: state.status == "thinking", DEADLINE_S)
    with pytest.raises(StartError, match="thinking"):
        unit.wait_ready(0.01)
    unit.close()


def test_a_service_that_ignores_the_stop_is_killed(tmp_path: pathlib.Path) -> None:
    body = 'signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntell("READY=1")'
    with service(tmp_path, body, UnitSettings(stop_timeout_s=0.05)) as unit:
        assert unit.stop() == -signal.SIGKILL


def test_children_that_outlive_the_main_process_are_ended_at_the_end(tmp_path: pathlib.Path) -> None:
    """KillMode=process: a stop ends the main process alone, and says nothing of the others."""
    unit = service(tmp_path, 'os.fork() or (signal.pause() or os._exit(0))\ntell("READY=1")')
    unit.start()
    main = unit.wait_ready(DEADLINE_S)
    child = next(pid for pid in session_pids(main) if pid != main)
    unit.stop()
    assert session_pids(main) == [child]
    assert unit.close() == [child]
    wait_until(lambda: not session_pids(main))


def test_a_service_dies_with_the_stand_in(tmp_path: pathlib.Path) -> None:
    program = f"""
import pathlib, sys, time
from mpserverd.load.stand_in import StandIn
service = {SERVICE + 'tell("READY=1")' + WAIT!r}
with StandIn([sys.executable, "-c", service], directory=pathlib.Path({str(tmp_path)!r})) as unit:
    print(unit.state.pid, flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        pid = int(process.stdout.readline())
        process.kill()
        process.wait()
        wait_until(lambda: not session_pids(pid))


def test_many_random_pushes_and_removals_end_as_a_plain_list_says() -> None:
    """Seeded; the model is a multiset of names."""
    chance, store, model = random.Random(4), FdStore(50), list[str]()
    for _ in range(500):
        name = chance.choice("abcdef")
        if chance.random() < 0.3:
            assert store.remove(name) == model.count(name)
            model = [each for each in model if each != name]
        else:
            count = chance.randrange(1, 6)
            fits = min(count, 50 - len(model))
            assert store.push([memfd() for _ in range(count)], name) == fits
            model += [name] * fits
        assert store.names() == sorted(model)
    store.close()
