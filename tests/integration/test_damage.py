"""Spools of the real daemon, damaged as disks and people do: the start, ``verify`` and ``repair`` afterwards.

Two spools are made once: one of a daemon that was stopped, one of a daemon whose processes were all killed while
clients were sending. Each test damages a copy. What clients sent is the oracle: nothing else may be in a stream, and
nothing that was durable may be missing unless the file that had it was taken away.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import pathlib
import shutil
import signal
import sqlite3
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from mpserverd.cli.ctl import main as mpserverctl
from tests.integration import senders
from tests.integration.driver import Daemon, connect
from tests.integration.oracle import stored_streams

PACKET = 16
SEGMENT = 1 << 20
NAMES = {"press-7": "127.0.0.2", "lathe": "127.0.0.3"}
SETTINGS = {
    "listener": {"on_full": "block"},
    "client": [{"id": name, "address": address} for name, address in NAMES.items()],
}
CONTENT = {name: senders.payload(seed, 3 * SEGMENT + 40_000) for seed, name in enumerate([*NAMES, "peer"], 1)}
MORE = {name: senders.payload(10 + seed, 160_000) for seed, name in enumerate(NAMES)}
LATE = {name: senders.payload(20 + seed, 480_000) for seed, name in enumerate(CONTENT)}
"""Sent right before the kill: how much of it is stored nobody knows."""


@dataclasses.dataclass
class Made:
    """A spool as a daemon left it. ``durable`` is what was durable for sure, ``sent`` what at most can be there."""

    spool: pathlib.Path
    durable: dict[str, int]
    sent: dict[str, bytes]


def kill_all(daemon: Daemon) -> None:
    """kill -9 of every process at once, as far as that goes."""
    assert daemon.process is not None
    while daemon.pids():
        for pid in daemon.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        daemon.process.wait()


def ask(spool: pathlib.Path, question: str) -> list[tuple[object, ...]]:
    with contextlib.closing(sqlite3.connect(f"file:{spool}/catalog.sqlite?mode=ro", uri=True)) as catalog:
        return catalog.execute(question).fetchall()


def fill(daemon: Daemon) -> dict[str, object]:
    """Every client sends its content, and stays; every sealed segment gets its checksum."""
    sources = {**NAMES, "peer": "127.0.0.9"}
    clients = {name: connect(daemon.port(), source=source) for name, source in sources.items()}
    for name, client in clients.items():
        client.sendall(CONTENT[name])
    daemon.wait_for_total("durable_bytes", sum(len(content) for content in CONTENT.values()))
    question = "SELECT count(*) FROM segment WHERE end IS NOT NULL AND sha256 IS NULL"
    daemon.wait_for(lambda: ask(daemon.spool, question) == [(0,)], what="the checksums")
    return dict(clients)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    daemon = Daemon(tmp_path_factory.mktemp("killed"), SETTINGS).start()
    try:
        clients = fill(daemon)
        for name, client in clients.items():
            client.sendall(LATE[name])  # type: ignore[attr-defined]
        kill_all(daemon)
        for client in clients.values():
            client.close()  # type: ignore[attr-defined]
        sent = {name: content + LATE[name] for name, content in CONTENT.items()}
        yield Made(daemon.spool, {name: len(content) for name, content in CONTENT.items()}, sent)
    finally:
        daemon.discard()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    daemon = Daemon(tmp_path_factory.mktemp("stopped"), SETTINGS).start()
    try:
        for client in fill(daemon).values():
            client.close()  # type: ignore[attr-defined]
        daemon.wait_until_quiet()
        daemon.stop()
        yield Made(daemon.spool, {name: len(content) for name, content in CONTENT.items()}, CONTENT)
    finally:
        daemon.discard()


Maker = Callable[[Made], Daemon]


@pytest.fixture
def copy_of(tmp_path: pathlib.Path) -> Iterator[Maker]:
    """A daemon that is not started yet, on a copy of a spool; unwritten place stays unwritten."""
    made: list[Daemon] = []

    def make(source: Made) -> Daemon:
        subprocess.run(["cp", "-a", "--sparse=auto", str(source.spool), str(tmp_path / "spool")], check=True)
        made.append(Daemon(tmp_path, SETTINGS))
        return made[-1]

    yield make
    for daemon in made:
        daemon.discard()


def ctl(spool: pathlib.Path, *arguments: str, code: int = 0) -> str:
    """The program's own main, in this process: a fresh interpreter for each answer takes longer than the answers."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        found = mpserverctl(["--socket", "/nowhere", "--spool", str(spool), *arguments])
    assert found == code, f"{arguments}: {found}\n{text.getvalue()}"
    return text.getvalue()


def contents(spool: pathlib.Path) -> dict[str, bytes]:
    """By client; a name that was made up is the peer's."""
    return {stream.name if stream.name in NAMES else "peer": stream.content for stream in stored_streams(spool)}


def assert_nothing_is_missing(made: Made, spool: pathlib.Path) -> None:
    """A prefix of what was sent, and not shorter than what was durable."""
    found = contents(spool)
    assert found.keys() == made.sent.keys()
    for name, content in found.items():
        assert made.durable[name] <= len(content) <= len(made.sent[name]), name
        assert content == made.sent[name][: len(content)], f"{name} has other bytes than were sent"
        assert len(content) % PACKET == 0


def assert_clients_go_on(daemon: Daemon) -> None:
    """In the same epoch, right behind what is there."""
    before = {stream.name: stream for stream in stored_streams(daemon.spool)}
    with daemon:
        for number, (name, source) in enumerate(NAMES.items(), 1):
            with connect(daemon.port(), source=source) as client:
                client.sendall(MORE[name])
            daemon.wait_until_served(number)
        daemon.ledger()
        daemon.stop()
    after = {stream.name: stream for stream in stored_streams(daemon.spool)}
    assert after.keys() == before.keys()
    for name in NAMES:
        assert after[name].epoch == before[name].epoch
        assert after[name].content == before[name].content + MORE[name]
    ctl(daemon.spool, "verify")


# --- the catalog


def catalog(spool: pathlib.Path) -> pathlib.Path:
    return spool / "catalog.sqlite"


def lose(spool: pathlib.Path) -> None:
    for path in spool.glob("catalog.sqlite*"):
        path.unlink()


def lose_the_file_only(spool: pathlib.Path) -> None:
    catalog(spool).unlink()


def lose_the_log(spool: pathlib.Path) -> None:
    for path in spool.glob("catalog.sqlite-*"):
        path.unlink()


def truncate_to_half(spool: pathlib.Path) -> None:
    settle(spool)
    os.truncate(catalog(spool), catalog(spool).stat().st_size // 2)


def truncate_to_a_few_bytes(spool: pathlib.Path) -> None:
    """With a whole log beside it SQLite would bring all pages back."""
    lose_the_log(spool)
    os.truncate(catalog(spool), 50)


def empty(spool: pathlib.Path) -> None:
    lose_the_log(spool)
    os.truncate(catalog(spool), 0)


def overwrite(spool: pathlib.Path) -> None:
    lose_the_log(spool)
    catalog(spool).write_bytes(senders.payload(99, 60_000))


def overwrite_a_page(spool: pathlib.Path) -> None:
    """The one in the middle: the file opens, and is not whole."""
    settle(spool)
    with catalog(spool).open("r+b") as file:
        file.seek(catalog(spool).stat().st_size // 4096 // 2 * 4096)
        file.write(senders.payload(98, 4096))


def settle(spool: pathlib.Path) -> None:
    """The log goes into the file, so that damage to the file counts."""
    with contextlib.closing(sqlite3.connect(catalog(spool), isolation_level=None)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    lose_the_log(spool)


CATALOG_DAMAGE = [
    lose, lose_the_file_only, truncate_to_half, truncate_to_a_few_bytes, empty, overwrite, overwrite_a_page,
]  # fmt: skip


@pytest.mark.parametrize("damage", CATALOG_DAMAGE)
@pytest.mark.parametrize("which", ["killed", "stopped"])
def test_a_broken_catalog_ends_the_start_untouched_and_is_repaired_from_the_segments(
    request: pytest.FixtureRequest, copy_of: Maker, which: str, damage: Callable[[pathlib.Path], None]
) -> None:
    made: Made = request.getfixturevalue(which)
    daemon = copy_of(made)
    damage(daemon.spool)
    before = {path: path.stat().st_mtime_ns for path in daemon.spool.rglob("*") if path.is_file()}
    assert daemon.run_to_its_end() == 1
    assert daemon.log_contains("run mpserverctl repair"), daemon.log()
    left = {path: path.stat().st_mtime_ns for path in daemon.spool.rglob("*") if path.is_file()}
    for path in before.keys() | left.keys():
        assert path.name.endswith(("-shm", "-wal")) or before.get(path) == left.get(path), f"{path} was touched"
    assert ctl(daemon.spool, "verify", code=1).splitlines()[-1] == "next: stop the daemon and run mpserverctl repair"
    said = ctl(daemon.spool, "repair")
    assert "the catalog could not be used" in said
    ctl(daemon.spool, "verify")
    assert_nothing_is_missing(made, daemon.spool)
    assert "nothing to repair" in ctl(daemon.spool, "repair")
    assert_clients_go_on(daemon)


def test_a_catalog_that_is_older_than_the_files_is_refused_found_and_mended(stopped: Made, copy_of: Maker) -> None:
    """Two entries of the time index that it does not know prove it; nothing that was acknowledged is written over."""
    daemon = copy_of(stopped)
    durable = stopped.durable["press-7"]
    pairs = (struct.pack("<QQ", offset, time.time_ns()) for offset in (durable - 16, durable))
    segment(daemon.spool, -1).with_suffix(".idx").write_bytes(b"".join(pairs))
    with contextlib.closing(sqlite3.connect(catalog(daemon.spool), isolation_level=None)) as opened:
        opened.execute("UPDATE stream SET durable = durable - 1600 WHERE name = 'press-7'")
    assert daemon.run_to_its_end() == 1
    assert daemon.log_contains("is older than the files"), daemon.log()
    assert "durable to at least" in ctl(daemon.spool, "verify", code=1)
    ctl(daemon.spool, "repair")
    ctl(daemon.spool, "verify")
    assert_nothing_is_missing(stopped, daemon.spool)
    assert_clients_go_on(daemon)


# --- segments


def segment(spool: pathlib.Path, number: int, name: str = "press-7") -> pathlib.Path:
    """``number`` -1 is the one that was written last, and has no checksum."""
    return sorted((spool / "streams" / name).glob("*.seg"))[number]


def remove(spool: pathlib.Path) -> set[int]:
    segment(spool, 1).unlink()
    return {1}


def remove_the_first(spool: pathlib.Path) -> set[int]:
    segment(spool, 0).unlink()
    return {0}


def remove_the_directory(spool: pathlib.Path) -> set[int]:
    shutil.rmtree(spool / "streams" / "press-7")
    return {0, 1, 2, 3}


def shorten(spool: pathlib.Path) -> set[int]:
    """To nothing: what is there of a short one is kept, and unit tests say how much."""
    os.truncate(segment(spool, 1), 0)
    return {1}


def flip_a_bit(spool: pathlib.Path) -> set[int]:
    with segment(spool, 2).open("r+b") as file:
        file.seek(SEGMENT // 3)
        byte = file.read(1)[0]
        file.seek(SEGMENT // 3)
        file.write(bytes([byte ^ 1]))
    return {2}


def swap_two(spool: pathlib.Path) -> set[int]:
    exchange(segment(spool, 0), segment(spool, 2))
    return {0, 2}


def swap_with_another_stream(spool: pathlib.Path) -> set[int]:
    """Both have a segment of the other's now; the other one is repaired just so."""
    exchange(segment(spool, 1), segment(spool, 1, "lathe"))
    return {1}


def swap_directories(spool: pathlib.Path) -> set[int]:
    exchange(spool / "streams" / "press-7", spool / "streams" / "lathe")
    return set()


def write_over_the_identity(spool: pathlib.Path) -> set[int]:
    (spool / "streams" / "press-7" / "stream.json").write_text("garbage")
    return set()


def add_a_segment_of_nobody(spool: pathlib.Path) -> set[int]:
    """Zeros in the middle of a listed one."""
    stale = spool / "streams" / "press-7" / f"{SEGMENT // 2:020d}.seg"
    stale.touch()
    os.truncate(stale, SEGMENT)
    return set()


def exchange(one: pathlib.Path, other: pathlib.Path) -> None:
    between = one.with_name("between")
    for source, target in ((one, between), (other, one), (between, other)):
        source.rename(target)


SEGMENT_DAMAGE = [
    remove, remove_the_first, remove_the_directory, shorten, flip_a_bit, swap_two, swap_with_another_stream,
    swap_directories, write_over_the_identity, add_a_segment_of_nobody,
]  # fmt: skip


@pytest.mark.parametrize("damage", SEGMENT_DAMAGE)
def test_damaged_segments_are_found_and_what_verify_says_mends_them(
    stopped: Made, copy_of: Maker, damage: Callable[[pathlib.Path], set[int]]
) -> None:
    """Whatever is left is what was sent, at its place; only what was damaged is missing; clients go on behind it."""
    daemon = copy_of(stopped)
    gone = damage(daemon.spool)
    advice = ctl(daemon.spool, "verify", code=1).splitlines()[-1]
    command = advice.removeprefix("next: stop the daemon and run mpserverctl ").split()
    said = ctl(daemon.spool, *command, code=1 if gone else 0)
    assert not gone or "a hole, kind lost" in said
    ctl(daemon.spool, "verify")
    assert "nothing to repair" in ctl(daemon.spool, *command)
    found = contents(daemon.spool)
    sent = stopped.sent["press-7"]
    pieces = [sent[at : at + SEGMENT] for at in range(0, len(sent), SEGMENT)]
    assert found["press-7"] == b"".join(piece for number, piece in enumerate(pieces) if number not in gone)
    assert found["peer"] == stopped.sent["peer"]
    assert_clients_go_on(daemon)


# --- beside a running daemon


def test_verify_beside_a_busy_daemon_finds_nothing(tmp_path: pathlib.Path) -> None:
    """Segments are begun, sealed and retired, streams come and go, all the time."""
    limits = {"max_bytes_per_stream": 4 * SEGMENT, "max_bytes": 24 * SEGMENT, "commit_interval_s": 0.01}
    settings = {**SETTINGS, "spool": {"segment_bytes": SEGMENT, **limits}}
    piece = senders.payload(30, 200_000)
    over = threading.Event()

    def send_for_ever(port: int, source: str) -> None:
        """A named client stays for a while; another comes back under a fresh name each time."""
        while not over.is_set():
            with connect(port, source=source) as client:
                for _ in range(20):
                    client.sendall(piece)

    with Daemon(tmp_path, settings) as daemon:
        sources = [*NAMES.values(), "127.0.0.9", "127.0.0.10"]
        threads = [threading.Thread(target=send_for_ever, args=(daemon.port(), source)) for source in sources]
        for thread in threads:
            thread.start()
        try:
            daemon.wait_for(lambda: daemon.log_contains("segments retired"), what="retention")
            for _ in range(12):
                ctl(daemon.spool, "verify")
        finally:
            over.set()
            for thread in threads:
                thread.join()
        daemon.wait_until_quiet()
        ctl(daemon.spool, "verify")
        daemon.stop()
