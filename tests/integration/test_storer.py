"""The storer as a process: killed at random instants, stopped, refused, with this process as supervisor and worker."""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator

import pytest

from mpserverd.arena.counters import Role
from mpserverd.arena.launch import Launch
from mpserverd.arena.state import STORER_SLOT, Gone, Slot, Str, StreamFlag, StreamState
from mpserverd.config.schema import LogConfig
from mpserverd.config.words import LogTarget
from mpserverd.net.channel import Channel, Kind, Message
from mpserverd.storer import main as storer_main
from tests.unit.storer.rig import Client, Tables

DEADLINE_S = 20.0


class Process:
    """A forked storer on the tables of a ``Tables``; ``start`` again after it died."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.pid = 0
        self.messages: list[Message] = []
        self.doorbell = os.eventfd(0, os.EFD_NONBLOCK)
        self.ours = os.eventfd(0, os.EFD_NONBLOCK)
        self.worker = os.eventfd(0, os.EFD_NONBLOCK)
        self.channel: Channel | None = None

    def start(self) -> None:
        """Fork, with the command line's own log on standard error."""
        if self.channel is not None:
            self.channel.close()
        ours, theirs = Channel.pair()
        self.channel = Channel(ours)
        self.messages.clear()
        self.tables.state.slots[STORER_SLOT, Slot.DOZING] = 0
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid:
            theirs.close()
            return
        try:
            config = self.tables.config_with(log=LogConfig(target=(LogTarget.STDERR,)))
            storer_main.run(
                Launch(
                    role=Role.STORER,
                    name="storer",
                    index=0,
                    slot=STORER_SLOT,
                    lease=1,
                    parent_pid=parent,
                    config=config,
                    listeners=self.tables.listeners,
                    state_fd=self.tables.state.fd,
                    table_fd=self.tables.arena.table.fd,
                    data_fd=self.tables.arena.data_fd,
                    channel_fd=theirs.detach(),
                    doorbell_fd=self.doorbell,
                    supervisor_doorbell_fd=self.ours,
                    storer_doorbell_fd=self.doorbell,
                    worker_doorbell_fds=(self.worker,),
                )
            )
        finally:
            os._exit(70)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.pid = 0

    def wait(self) -> int:
        """Its exit code."""
        result: list[int] = []

        def gone() -> bool:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                result.append(os.waitstatus_to_exitcode(status))
            return bool(pid)

        self.until(gone, "the storer to leave")
        self.pid = 0
        return result[0]

    def close(self) -> None:
        if self.pid:
            self.kill()
        if self.channel is not None:
            self.channel.close()
        for descriptor in (self.doorbell, self.ours, self.worker):
            os.close(descriptor)

    def ring(self) -> None:
        os.eventfd_write(self.doorbell, 1)

    def say(self, kind: Kind) -> None:
        assert self.channel is not None
        assert self.channel.send(Message(kind))

    def hears(self, kind: Kind) -> bool:
        assert self.channel is not None
        with contextlib.suppress(EOFError):
            while (message := self.channel.receive()) is not None:
                self.messages.append(message)
        return any(message.kind is kind for message in self.messages)

    def until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, f"waited {DEADLINE_S} s for {what}"
            time.sleep(0.001)

    def until_durable(self, *clients: Client) -> None:
        self.ring()
        self.until(lambda: all(c.word(Str.DURABLE) == c.window.offered for c in clients), "everything to be durable")

    def until_free(self, *clients: Client) -> None:
        self.ring()
        self.until(lambda: all(c.state() is StreamState.FREE for c in clients), "all rows to be free")


Maker = Callable[..., Process]


@pytest.fixture
def make_process(tmp_path: pathlib.Path) -> Iterator[Maker]:
    made: list[Process] = []

    def make(path: pathlib.Path | None = None, **settings: object) -> Process:
        made.append(Process(Tables(path or tmp_path, **settings)))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for process in made:
        process.close()
        process.tables.close()


def open_named(process: Process, name: str, packet: int, seed: int) -> Client:
    tables = process.tables
    tables.lease()
    row = tables.take_row(name, packet, StreamFlag.STORE | StreamFlag.NAMED, StreamState.OPENING)
    process.ring()
    process.until(lambda: tables.state.streams[row, Str.STATE] == StreamState.OPEN, "the stream to open")
    return Client(tables, row, seed)


def send(process: Process, client: Client, length: int) -> None:
    while length:
        process.tables.lease()
        taken = client.receive(length)
        client.offer()
        process.ring()
        length -= taken
        if not taken:
            time.sleep(0.0005)


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_instants_it_loses_no_byte_and_doubles_none(make_process: Maker, seed: int) -> None:
    rng = random.Random(seed)
    process = make_process(chunks=400, rows=32, segment_bytes=128 << 10, commit_interval_s=0.001)
    tables = process.tables
    process.start()
    clients = [tables.fresh(f"peer-{number}", rng.choice([7, 24, 1500])) for number in range(8)]
    kills = 0
    while kills < 25:
        until_s = time.monotonic() + rng.random() * 0.03
        while time.monotonic() < until_s:
            client = rng.choice(clients)
            tables.lease()
            client.receive(rng.randrange(1, 20_000))
            client.offer()
            process.ring()
        process.kill()
        kills += 1
        if rng.random() < 0.3:
            client = clients.pop(rng.randrange(len(clients)))
            client.offer(closing=True)
            client.leave()
            clients.append(tables.fresh(f"peer-{kills}-more", rng.choice([7, 24, 1500])))
        process.start()
    for client in clients:
        client.leave()
    process.until_free(*tables.clients)
    process.say(Kind.DRAIN)
    process.until(lambda: process.hears(Kind.DRAINED), "DRAINED")
    assert process.wait() == 0
    for client in tables.clients:
        if client.sent:
            tables.assert_stored(client, client.name)
    assert tables.free_chunks() == tables.arena.count
    assert tables.gone(Gone.RECEIVED_BYTES) == tables.gone(Gone.DURABLE_BYTES) == sum(c.sent for c in tables.clients)
    assert tables.gone(Gone.STREAMS) == sum(c.sent > 0 for c in tables.clients)


def test_a_stopped_storer_costs_time_and_nothing_else(make_process: Maker) -> None:
    process = make_process()
    process.start()
    client = process.tables.fresh("peer", 24)
    send(process, client, 24 * 100)
    process.until_durable(client)
    os.kill(process.pid, signal.SIGSTOP)
    client.receive(24 * 1000)
    client.offer()
    assert client.word(Str.DURABLE) == 2400
    os.kill(process.pid, signal.SIGCONT)
    process.until_durable(client)
    process.tables.assert_stored(client)


def test_clients_that_come_back_go_on_across_lives_of_the_storer(make_process: Maker) -> None:
    process = make_process()
    process.start()
    sent = 0
    for length in (5000, 1, 70_000, 4096):
        client = open_named(process, "one", 1, seed=3)
        assert client.word(Str.POSITION) == sent
        send(process, client, length)
        sent += length
        client.leave()
        process.until_free(client)
        process.kill()
        process.start()
    process.until(lambda: process.hears(Kind.READY), "READY")
    client.window.position = sent
    process.tables.assert_stored(client, "one", upto=sent)


def test_drain_makes_everything_durable_and_leaves(make_process: Maker) -> None:
    process = make_process(commit_interval_s=60.0)
    process.start()
    clients = [process.tables.fresh(f"peer-{number}", 16) for number in range(5)]
    for client in clients:
        client.receive(16 * 300)
        client.offer()
    process.until(lambda: process.hears(Kind.READY), "READY")
    process.say(Kind.DRAIN)
    assert process.wait() == 0
    assert process.hears(Kind.DRAINED)
    for client in clients:
        process.tables.assert_stored(client)
    assert process.tables.one("SELECT sum(connected) FROM stream") == 0


def test_on_detach_all_it_leaves_at_once_and_its_successor_goes_on(make_process: Maker) -> None:
    process = make_process()
    process.start()
    client = process.tables.fresh("peer", 16)
    send(process, client, 1600)
    process.until_durable(client)
    process.say(Kind.DETACH_ALL)
    assert process.wait() == 0
    assert process.hears(Kind.DRAINED)
    process.start()
    send(process, client, 1600)
    process.until_durable(client)
    process.tables.assert_stored(client)


def test_idle_it_wakes_about_twice_a_second_and_writes_nothing(make_process: Maker) -> None:
    """One wake is the loop's, one the heartbeat's."""
    process = make_process()
    process.start()
    client = process.tables.fresh("peer", 16)
    send(process, client, 1600)
    process.until_durable(client)
    switches = pathlib.Path(f"/proc/{process.pid}/status")

    def wakes() -> int:
        total = 0
        for task in pathlib.Path(f"/proc/{process.pid}/task").iterdir():
            text = (task / "status").read_text()
            total += int(next(line for line in text.splitlines() if line.startswith("voluntary")).split()[1])
        return total

    assert switches.exists()
    process.until(lambda: bool(process.tables.state.slots[STORER_SLOT, Slot.DOZING]), "the storer to doze")
    time.sleep(1.2)  # the background thread may still make a checksum
    before, beats = wakes(), int(process.tables.state.slots[STORER_SLOT, Slot.HEARTBEAT_MONO_NS])
    cycles = process.tables.counter("cycles")
    time.sleep(2.0)
    assert wakes() - before <= 8
    assert int(process.tables.state.slots[STORER_SLOT, Slot.HEARTBEAT_MONO_NS]) > beats
    assert process.tables.counter("cycles") == cycles


def test_an_offer_wakes_a_dozing_storer(make_process: Maker) -> None:
    process = make_process()
    process.start()
    client = process.tables.fresh("peer", 16)
    process.until(lambda: bool(process.tables.state.slots[STORER_SLOT, Slot.DOZING]), "the storer to doze")
    client.receive(16 * 1000)
    client.offer()
    before = time.monotonic()
    process.until_durable(client)
    assert time.monotonic() - before < 0.9


def test_streams_are_readable_by_everybody_else_while_it_runs(make_process: Maker) -> None:
    process = make_process()
    process.start()
    client = process.tables.fresh("peer", 16)
    for _ in range(20):
        send(process, client, 16 * 500)
        process.until_durable(client)
        with contextlib.closing(sqlite3.connect(process.tables.spool / "catalog.sqlite")) as reader:
            assert reader.execute("SELECT durable FROM stream").fetchone()[0] <= client.sent


def without_rights(path: pathlib.Path) -> int:
    """Start a storer as nobody; its exit code."""
    tables = Tables(path)
    process = Process(tables)
    try:
        pid = os.fork()
        if pid == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            process.start()
            code = process.wait() if process.pid else 70
            words = [m.payload["text"] for m in process.messages if m.payload] if process.hears(Kind.EVENT) else []
            os._exit(code if any("permission" in text.lower() for text in words) else 99)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        process.close()
        tables.close()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="giving up rights needs root")
def test_without_permission_it_says_what_to_do_and_exits_1(tmp_path: pathlib.Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "spool").mkdir(mode=0o700)
    assert without_rights(tmp_path) == 1


def test_a_catalog_of_another_version_is_refused_untouched(make_process: Maker) -> None:
    process = make_process()
    spool = process.tables.spool
    spool.mkdir()
    with contextlib.closing(sqlite3.connect(spool / "catalog.sqlite", isolation_level=None)) as catalog:
        catalog.execute("CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT)")
        catalog.execute("INSERT INTO meta VALUES ('layout_version', '99')")
    process.start()
    assert process.wait() == 1
    assert process.hears(Kind.EVENT)
    assert "layout 99" in str(process.messages[0].payload)
    with contextlib.closing(sqlite3.connect(spool / "catalog.sqlite")) as catalog:
        assert catalog.execute("SELECT count(*) FROM sqlite_master WHERE name = 'stream'").fetchone()[0] == 0
